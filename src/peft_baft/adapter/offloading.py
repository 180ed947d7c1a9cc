"""Adapters of blocks whose weights accelerate keeps on the CPU or on disk, and brings to a device when they run.

An adapter is small, and so it stays on that device. transformers reads from the model's `hf_device_map` where to load the tensors
of an adapter; it loads none that belong to a block on disk, and leaves the adapter there untrained, without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def execution_device(block: nn.Module) -> torch.device | None:
    """Return the device on which accelerate runs a block; None where it does not manage the block."""
    for module in block.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a sequence of hooks is one as well
            device = getattr(one, "execution_device", None)
            if isinstance(device, int | str | torch.device):
                return torch.device(device)
    return None


def place_adapter(model: nn.Module, name: str, block: nn.Module) -> None:
    """Note in a model's device map that the adapter `name` of a block is on the device on which the block runs."""
    device_map, device = getattr(model, "hf_device_map", None), execution_device(block)
    offloaded = any(parameter.is_meta for parameter in block.parameters())
    if isinstance(device_map, dict) and device is not None and offloaded:
        # As transformers writes devices there, which are compared with each other.
        is_plain = device.type == "cpu" or device.index is None
        device_map[name] = str(device) if is_plain else device.index


def forget_adapter(model: nn.Module, name: str) -> None:
    """Undo `place_adapter`."""
    device_map = getattr(model, "hf_device_map", None)
    if isinstance(device_map, dict):
        device_map.pop(name, None)
