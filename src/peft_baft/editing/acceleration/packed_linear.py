"""Products with frozen weights on a CPU, in the memory layout in which oneDNN multiplies few tokens fastest.

A step of an edit multiplies about ten tokens with every weight, forward and backward. With so few tokens, the CPU spends its
time loading the weights, which is about twice as fast in a blocked layout made for this product.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 500_000_000  # largest number of weights that are packed; a packed weight takes 12 bytes instead of 4
TOKENS = 8  # the number of tokens the layout is optimised for; it works with any number


class PackedWeight:
    """The packed weight (out, in) of a layer and, from the first backward pass on, its packed transpose.

    Attributes:
        weight: the packed weight. probe: detects later changes of the layer's weight (`probed`).
    """

    def __init__(self, layer: nn.Linear, probe: Tensor) -> None:
        self._layer, self.probe = weakref.ref(layer), probe
        self.weight = _pack(layer.weight.detach())

    @cached_property
    def transposed(self) -> Tensor:
        """The packed transpose, (in, out)."""
        layer = self._layer()
        assert layer is not None, "a packed weight is used while its layer is"
        return _pack(layer.weight.detach().t().contiguous())


def packed_forwards(
    modules: Iterable[nn.Module], packed: dict[nn.Module, PackedWeight]
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return forwards with packed weights for the linear layers whose weights are frozen, in float32 and on the CPU.

    They compute the same as the layers' own forwards up to rounding, and gradients with respect to the input only.

    Args:
        packed: the weights packed so far. New ones are added; those of layers that cannot be packed any more are removed.

    Returns:
        A forward per layer; empty if torch was built without oneDNN or there are more than `LARGEST` weights.
    """
    layers: list[Any] = [module for module in modules if _can_pack(module)]
    count = sum(layer.weight.numel() for layer in layers)
    if not torch.backends.mkldnn.is_available() or count > LARGEST:
        layers = []
    for layer in set(packed).difference(layers):
        del packed[layer]
    return {layer: partial(_linear, layer, packed_weight(layer, packed)) for layer in layers}


def _can_pack(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    frozen = not any(p.requires_grad or p.is_inference() for p in module.parameters())
    plain = type(module.weight) is nn.Parameter and module.weight.dtype == torch.float32
    return frozen and plain and module.weight.device.type == "cpu"


def packed_weight(layer: Any, packed: dict[nn.Module, PackedWeight]) -> PackedWeight:
    """Return a layer's packed weight from `packed`; pack it if it is missing there or the layer's weight has changed."""
    probe = probed(layer.weight.detach())
    known = packed.get(layer)
    if known is None or not torch.equal(known.probe, probe):
        known = packed[layer] = PackedWeight(layer, probe)
    return known


def probed(weight: Tensor) -> Tensor:
    """Multiply a weight (out, in) with a fixed pseudorandom vector, to detect changes: (out,).

    A pointer and a version counter do not detect writes through `.data`. This reads every value once, at memory speed. A change
    that does not affect this product is lost in the rounding of other products as well.
    """
    return torch.mv(weight, _direction(weight.shape[1]))


@cache
def _direction(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)
    return packed


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
    result: Tensor = torch.ops.mkldnn._linear_pointwise(h, packed, bias, "none", [], "")
    return result
