"""Adapters of blocks whose weights accelerate keeps on the CPU or on disk, and moves to a device when they run.

An adapter is small, so it stays on that device. transformers looks up in the model's `hf_device_map` where to load an adapter's
tensors; without an entry it silently skips those of a block on disk, and leaves the adapter there untrained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def execution_device(block: nn.Module) -> torch.device | None:
    """Return the device on which accelerate runs a block; None if it does not manage the block."""
    for module in block.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook contains hooks
            device = getattr(one, "execution_device", None)
            if isinstance(device, int | str | torch.device):
                return torch.device(device)
    return None


def place_adapter(model: nn.Module, name: str, block: nn.Module) -> None:
    """Enter the adapter `name` of a block in a model's device map, on the device on which the block runs."""
    device_map, device = getattr(model, "hf_device_map", None), execution_device(block)
    offloaded = any(parameter.is_meta for parameter in block.parameters())
    if isinstance(device_map, dict) and device is not None and offloaded:
        # In the form that transformers uses there, since the entries are compared.
        is_plain = device.type == "cpu" or device.index is None
        device_map[name] = str(device) if is_plain else device.index


def forget_adapter(model: nn.Module, name: str) -> None:
    """Undo `place_adapter`."""
    device_map = getattr(model, "hf_device_map", None)
    if isinstance(device_map, dict):
        device_map.pop(name, None)
