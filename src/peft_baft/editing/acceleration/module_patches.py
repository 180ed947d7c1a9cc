"""Ways to spare a model computing what is not needed: outputs that are known, logits that nobody reads, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_baft.adapter import baft_layers

SPARED_FROM, SPARED_BELOW = 32, 0.9  # tokens of a batch, and how many of them are real


def on(device: torch.device, places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Indices where they are needed."""
    return tuple(index.to(device) for index in places)


def enough_rows(places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first place again and again where there are but two or three: BLAS multiplies four rows in half the time of three."""
    missing = 4 - len(places[0])
    return tuple(torch.cat([i, i[:1].expand(missing)]) for i in places) if 0 < missing < 3 else places


def blocks_below(model: Any) -> list[nn.Module]:
    """The blocks up to the first one that any BaFT adapter edits, which is edited after it has run; none where blocks do not
    stand in one list."""
    places = [layer.name.rpartition(".") for layer in baft_layers(model)]
    if len({stack for stack, _, _ in places}) != 1 or not all(number.isdigit() for _, _, number in places):
        return []
    stack = model.get_base_model().get_submodule(places[0][0])
    return list(stack)[: min(int(number) for _, _, number in places) + 1]


@contextmanager
def only_at(head: nn.Module, places: tuple[Tensor, ...]) -> Iterator[None]:
    """Let the model's head compute logits at some places (rows, columns) alone: (n, vocabulary)."""
    with head.register_forward_pre_hook(lambda _, given: (given[0][on(given[0].device, places)],)):
        yield


@contextmanager
def remembering(modules: Sequence[nn.Module], given: dict[nn.Module, Any]) -> Iterator[None]:
    """Keep in `given` what the modules give in the forward inside, before any hook changes it."""
    with ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_hook(
                lambda own, _, out: given.update({own: changed(out, Tensor.detach)}), prepend=True
            )
            hooks.enter_context(hook)
        yield


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a block gives, with its hidden vectors changed."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def give(output: Any, *_: Any, **__: Any) -> Any:
    return output


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let these functions stand in for the forwards of modules inside."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, instead in own.items():
            if instead is None:
                del module.forward
            else:
                module.__dict__["forward"] = instead


def without_padding(
    model: Any, real: Tensor, products: Mapping[nn.Module, Callable[..., Any]]
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of the model's linear layers that compute the real tokens (rows, tokens) alone and give 0 for padding.

    Only where that pays: for few tokens a layer's time goes into reading its weights, on a GPU for many as well.

    Args:
        products: forwards that stand in for those of some layers already; the others are as the layers have them.
    """
    if real.device.type != "cpu" or real.numel() < SPARED_FROM or real.float().mean() > SPARED_BELOW:
        return dict(products)
    places, head = real.flatten().nonzero()[:, 0], model.get_output_embeddings()
    own = {id(module) for layer in baft_layers(model) for module in layer.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head and id(m) not in own]
    forwards: dict[nn.Module, Any] = dict(products)
    return forwards | {m: partial(_of_real_tokens, products.get(m, m.forward), real.shape, places) for m in linear}


def _of_real_tokens(forward: Callable[[Tensor], Tensor], shape: torch.Size, places: Tensor, h: Tensor) -> Tensor:
    if h.shape[:-1] != shape:
        return forward(h)
    out = forward(h.flatten(0, 1).index_select(0, places))
    return out.new_zeros(shape.numel(), out.shape[-1]).index_copy(0, places, out).unflatten(0, shape)
