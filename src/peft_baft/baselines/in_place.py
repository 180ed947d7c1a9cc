"""What methods share that change a model in place: its weights frozen while they search, and the results of edits in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peft_baft.adapter.state import evaluating
from peft_baft.editing.editor import EditResult


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Let gradients be computed inside, with the model in evaluation mode and none of its parameters trainable.

    Modes and flags are put back as they were.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def in_turn(results: Sequence[EditResult]) -> EditResult:
    """Put the results of edits that were made one after another into one: the losses are those of the last."""
    return EditResult(
        sum(result.steps for result in results),
        results[-1].losses,
        sum(result.seconds for result in results),
        all(result.learned for result in results),
    )
