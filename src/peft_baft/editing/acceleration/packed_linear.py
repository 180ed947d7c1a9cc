"""Products with frozen weights on a CPU, in the layout in which oneDNN multiplies few tokens fastest.

A step of an edit multiplies some ten tokens with every weight, forward and backward. For so few, a CPU's time goes into
fetching the weights, and it fetches them about twice as fast from blocks that are laid out for that product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 500_000_000  # weights of a model that are packed; each then takes 12 bytes instead of 4
TOKENS = 8  # the number of tokens that blocks are laid out for; they serve any other number


class PackedWeight:
    """A weight (out, in) laid out for products with it, and, once a backward needs it, its transpose.

    Attributes:
        state: which values of the layer's weight these are.
    """

    def __init__(self, weight: Tensor, state: tuple) -> None:
        self._weight, self.state = weight, state
        self.weight = _pack(weight)

    @cached_property
    def transposed(self) -> Tensor:
        """The packed transpose, (in, out)."""
        return _pack(self._weight.t().contiguous())


def packed_forwards(
    modules: Iterable[nn.Module], packed: dict[nn.Module, PackedWeight]
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Make forwards for those linear layers among the modules whose weights are frozen, in float32 and on the CPU.

    They give what the layers' own forwards give, to float noise, and gradients of the layers' inputs alone.

    Args:
        packed: weights that were packed before; new ones are added.

    Returns:
        A forward by layer; none where torch has no such product, or there are more than `LARGEST` weights.
    """
    layers: list[Any] = [module for module in modules if _can_pack(module)]
    count = sum(layer.weight.numel() for layer in layers)
    if not torch.backends.mkldnn.is_available() or count > LARGEST:
        return {}
    return {layer: partial(_linear, layer, packed_weight(layer, packed)) for layer in layers}


def _can_pack(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    frozen = not any(p.requires_grad or p.is_inference() for p in module.parameters())
    plain = type(module.weight) is nn.Parameter and module.weight.dtype == torch.float32
    return frozen and plain and module.weight.device.type == "cpu"


def packed_weight(layer: Any, packed: dict[nn.Module, PackedWeight]) -> PackedWeight:
    """Pack a layer's weight as it is now, or take it from `packed` if it has not changed since."""
    weight = layer.weight.detach()
    state = (weight.data_ptr(), weight._version, weight.shape)
    if layer not in packed or packed[layer].state != state:
        packed[layer] = PackedWeight(weight, state)
    return packed[layer]


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)


def _linear(layer: Any, packed: PackedWeight, h: Tensor) -> Tensor:
    if h.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not h.numel():
        return nn.functional.linear(h, layer.weight, layer.bias)
    return _PackedProduct.apply(h, packed, layer.bias)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return product(h, packed.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return product(grad, ctx.packed.transposed, None), None, None


def product(h: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply h (…, in) with a packed weight (out, in): (…, out)."""
    return torch.ops.mkldnn._linear_pointwise(h, packed, bias, "none", [], "")
