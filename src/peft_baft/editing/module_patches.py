"""Temporary patches of a model for a forward pass: known outputs, logits at some places only, recorded outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_baft.editing.answers import on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the modules' forward methods by these functions inside the context."""
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
    """Make the model's head compute logits only at some places (rows, columns): (n, vocabulary)."""

    def select(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden = args[0]
        return (hidden[on_device(hidden.device, places)],)

    with head.register_forward_pre_hook(select):
        yield


def no_logits(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Make a model compute no logits, for forward passes that only need hidden vectors."""
    nowhere = torch.zeros(0, dtype=torch.long)
    return logits_only_at(model.get_output_embeddings(), (nowhere, nowhere))


def at_least_four(places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pad two or three places to four by repeating the first: BLAS multiplies four rows in half the time of three."""
    missing = 4 - len(places[0])
    if missing not in (1, 2):
        return places
    return tuple(torch.cat([index, index[:1].expand(missing)]) for index in places)


@contextmanager
def recorded_outputs(modules: Sequence[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Store the modules' outputs in `outputs` during the forward pass inside, before any hook changes them."""

    def record(module: nn.Module, _args: Any, output: Any) -> None:
        outputs[module] = map_hidden(output, Tensor.detach)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(record, prepend=True))
        yield


@contextmanager
def collected_outputs(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a block's hidden vectors (rows, tokens, d), one tensor per forward pass inside."""
    outputs: list[Tensor] = []

    def collect(_block: nn.Module, _args: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).detach())

    with block.register_forward_hook(collect):
        yield outputs


def map_hidden(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the hidden vectors in a block's output: a tensor, or a tuple that begins with one."""
    if isinstance(output, Tensor):
        return function(output)
    return (function(output[0]), *output[1:])


@dataclass(frozen=True)
class FixedBlocks:
    """Blocks whose outputs stay the same while a model processes the same inputs repeatedly.

    Attributes:
        blocks: the first blocks of the model.
        outputs: their outputs; empty until the first forward pass.
    """

    blocks: Sequence[nn.Module]
    outputs: dict[nn.Module, Any] = field(default_factory=dict)

    @contextmanager
    def run_once(self) -> Iterator[None]:
        """Run the blocks in the first forward pass inside such a context, and reuse their outputs in all later ones."""
        known = {block: _constant_forward(output) for block, output in self.outputs.items()}
        with (
            recorded_outputs(() if known else self.blocks, self.outputs),
            replaced_forwards(known),
        ):
            yield

    def select_rows(self, rows: Tensor) -> FixedBlocks:
        """Return the same blocks with the known outputs of some rows, given by their indices (n,)."""
        outputs = {
            block: map_hidden(output, lambda hidden: hidden[rows.to(hidden.device)])
            for block, output in self.outputs.items()
        }
        return FixedBlocks(self.blocks, outputs)


def _constant_forward(output: Any) -> Callable[..., Any]:
    """Return a forward function that ignores its arguments and returns a known output."""
    return lambda *_, **__: output
