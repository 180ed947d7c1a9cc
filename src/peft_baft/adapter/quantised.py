"""What bitsandbytes does to quantised weights, as far as adapters depend on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' name for: this layer may pack its weights


def is_quantised(weight: Tensor) -> bool:
    """Return whether a weight is quantised: it may be stored in a dtype that nothing is computed in."""
    return hasattr(weight, "quant_state") or weight.element_size() == 1


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from repacking 4-bit weights for CPUs with bf16 instructions; unpack those that it has packed.

    It packs in a layer's first forward without gradients. Packed weights pass no gradient to earlier blocks, and any
    `state_dict()`, such as that of a saved adapter, corrupts them (both with bitsandbytes 0.50).

    Returns:
        The layers, for `allow_packing`.
    """
    layers: list[Any] = [module for module in model.modules() if getattr(module, PACKS, False)]
    for layer in layers:
        setattr(layer, PACKS, False)
        state: Any = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
            layer.weight.data, _ = unpacked(layer.weight.data, state)
            state.absmax = scales
    return layers


def allow_packing(layers: list[nn.Module]) -> None:
    """Undo `keep_unpacked`; the next forward without gradients packs again."""
    for layer in layers:
        setattr(layer, PACKS, True)
