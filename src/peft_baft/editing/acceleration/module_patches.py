"""Replace, for one forward, what a model need not compute: known outputs, logits that nobody reads, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_baft.adapter import baft_layers
from peft_baft.editing.answers import on_device

# Padding is left out of batches of at least so many tokens, of which at most this share is real.
SPARED_FROM, SPARED_BELOW = 32, 0.9


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let these functions take the place of the modules' forwards inside."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward_before in before.items():
            if forward_before is None:
                del module.forward
            else:
                module.__dict__["forward"] = forward_before


@contextmanager
def logits_only_at(head: nn.Module, places: tuple[Tensor, ...]) -> Iterator[None]:
    """Let the model's head compute logits at some places (rows, columns) alone: (n, vocabulary)."""

    def select(_: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        return (hidden[on_device(hidden.device, places)],)

    with head.register_forward_pre_hook(select):
        yield


def no_logits(model: Any) -> AbstractContextManager[None]:
    """Let a model compute no logits, in forwards of which the hidden vectors alone are looked at."""
    nowhere = torch.zeros(0, dtype=torch.long)
    return logits_only_at(model.get_output_embeddings(), (nowhere, nowhere))


def at_least_four(places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Repeat the first place where there are two or three: BLAS multiplies four rows in half the time of three."""
    missing = 4 - len(places[0])
    if missing not in (1, 2):
        return places
    return tuple(torch.cat([index, index[:1].expand(missing)]) for index in places)


def blocks_up_to_first_edited(model: Any) -> list[nn.Module]:
    """List the blocks up to the first one that a BaFT adapter edits; none where blocks do not stand in one list.

    That one is among them: it is edited after it has run.
    """
    places = [layer.name.rpartition(".") for layer in baft_layers(model)]
    if len({stack for stack, _, _ in places}) != 1 or not all(
        number.isdigit() for _, _, number in places
    ):
        return []
    stack = model.get_base_model().get_submodule(places[0][0])
    first_edited = min(int(number) for _, _, number in places)
    return list(stack)[: first_edited + 1]


@contextmanager
def remembering_outputs(
    modules: Sequence[nn.Module], outputs: dict[nn.Module, Any]
) -> Iterator[None]:
    """Put what the modules give in the forward inside into `outputs`, before any hook changes it."""

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module] = with_hidden(output, Tensor.detach)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(remember, prepend=True))
        yield


@contextmanager
def collected_outputs(block: nn.Module) -> Iterator[list[Tensor]]:
    """List the hidden vectors (rows, tokens, d) that a block gives in each forward inside."""
    outputs: list[Tensor] = []

    def collect(_block: nn.Module, _args: tuple, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).detach())

    with block.register_forward_hook(collect):
        yield outputs


def with_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the hidden vectors in what a block gives: a tensor, or a tuple that begins with it."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def constant_forward(output: Any) -> Callable[..., Any]:
    """Make a forward that gives a known output, whatever it is called with."""
    return lambda *_, **__: output


@dataclass(frozen=True)
class FixedBlocks:
    """Blocks of which the outputs stay the same while the same inputs are put to a model again and again.

    blocks: the first ones of the model. outputs: what they gave, from the first forward on.
    """

    blocks: Sequence[nn.Module]
    outputs: dict[nn.Module, Any] = field(default_factory=dict)

    @contextmanager
    def run_once(self) -> Iterator[None]:
        """Run the blocks in the first forward inside such a context, and give their outputs in every later one."""
        known = {block: constant_forward(output) for block, output in self.outputs.items()}
        with (
            remembering_outputs(() if known else self.blocks, self.outputs),
            replaced_forwards(known),
        ):
            yield


def forwards_without_padding(
    model: Any, real: Tensor, forwards: Mapping[nn.Module, Callable[..., Any]]
) -> dict[nn.Module, Callable[..., Any]]:
    """Make forwards of the model's linear layers that compute the real tokens alone and give 0 for padding.

    Only where that pays: for few tokens a layer's time goes into reading its weights, on a GPU for many as well.

    Args:
        real: (rows, tokens) bool.
        forwards: what replaces the forwards of some layers already; the other layers have their own.
    """
    if (
        real.device.type != "cpu"
        or real.numel() < SPARED_FROM
        or real.float().mean() > SPARED_BELOW
    ):
        return dict(forwards)
    places, head = real.flatten().nonzero()[:, 0], model.get_output_embeddings()
    of_adapters = {id(module) for layer in baft_layers(model) for module in layer.modules()}
    replaced: dict[nn.Module, Any] = dict(forwards)
    for module in model.modules():
        if (
            isinstance(module, nn.Linear | Conv1D)
            and module is not head
            and id(module) not in of_adapters
        ):
            forward = forwards.get(module, module.forward)
            replaced[module] = partial(_at_real_tokens, forward, real.shape, places)
    return replaced


def _at_real_tokens(
    forward: Callable[[Tensor], Tensor], shape: torch.Size, places: Tensor, h: Tensor
) -> Tensor:
    if h.shape[:-1] != shape:
        return forward(h)
    out = forward(h.flatten(0, 1).index_select(0, places))
    return (
        out.new_zeros(shape.numel(), out.shape[-1]).index_copy(0, places, out).unflatten(0, shape)
    )
