"""Products with frozen weights on a CPU, in the layout that oneDNN multiplies few tokens with fastest.

A step of an edit multiplies some ten tokens with every weight, forward and backward. For so few, a CPU's time goes into
fetching the weights, and it fetches them about twice as fast from blocks laid out for that product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

LARGEST = 500_000_000  # weights of a model that are packed; each then takes 12 bytes instead of 4
TOKENS = 8  # what blocks are laid out for; they serve any other number


class Packed:
    """A weight (out, in) laid out for products with it, and, once a backward needs that, its transpose.

    Attributes:
        state: which values these are.
    """

    def __init__(self, weight: Tensor, state: tuple) -> None:
        self._weight, self.state = weight, state
        self.weight = _pack(weight)

    @cached_property
    def transposed(self) -> Tensor:
        return _pack(self._weight.t().contiguous())


_kept: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


def packed_forwards(modules: Iterable[nn.Module]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Forwards of those linear layers among the modules whose weights are frozen, in float32 and on the CPU.

    They give what the layers' own forwards give, to float noise, and gradients of the layers' inputs alone. The packed
    weights are kept as long as the layer. None where torch has no such product, or there are more than `LARGEST` weights.
    """
    layers: list[Any] = [module for module in modules if _can_pack(module)]
    if not torch.backends.mkldnn.is_available() or sum(layer.weight.numel() for layer in layers) > LARGEST:
        return {}
    return {layer: partial(_linear, layer, packed(layer)) for layer in layers}


def _can_pack(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    frozen = not any(p.requires_grad or p.is_inference() for p in module.parameters())
    plain = type(module.weight) is nn.Parameter and module.weight.dtype == torch.float32
    return frozen and plain and module.weight.device.type == "cpu"


def packed(layer: Any) -> Packed:
    """The layer's weight as it is now; kept as long as the layer."""
    weight = layer.weight.detach()
    state = (weight.data_ptr(), weight._version, weight.shape)
    if layer not in _kept or _kept[layer].state != state:
        _kept[layer] = Packed(weight, state)
    return _kept[layer]


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)


def _linear(layer: Any, own: Packed, h: Tensor) -> Tensor:
    if h.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not h.numel():
        return nn.functional.linear(h, layer.weight, layer.bias)
    return _PackedProduct.apply(h, own, layer.bias)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, own: Packed, bias: Tensor | None) -> Tensor:
        ctx.own = own
        return product(h, own.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return product(grad, ctx.own.transposed, None), None, None


def product(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(h, weight, bias, "none", [], "")
