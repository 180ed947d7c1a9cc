"""Keys of a question's tokens: their states after an early block, whitened to a few numbers.

A question is read by itself, as raw text after one token that always precedes it, whatever surrounds it in a prompt. Its keys,
and so which edit answers it, then depend on its words only: not on a system prompt, earlier turns, the chat template, padding
or a cache.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.blocks import blocks_left_out, find_stack
from peft_baft.adapter.context import EditContext
from peft_baft.adapter.state import evaluating
from peft_baft.running import input_device

# The block whose states are keys, counted from 0, of a model of that many blocks: docs/memory.md.
BLOCK, DEPTH = 4, 30
INT8 = 127.0


class _BlockHasRun(Exception):
    """Ends a forward of which the states of one block are wanted."""


def key_block(model: nn.Module) -> nn.Module:
    """Return the block whose output makes keys."""
    stack = model.get_submodule(find_stack(model))
    left_out = blocks_left_out(model)
    numbers = [number for number in range(len(stack)) if number not in left_out]  # type: ignore[arg-type]
    wanted = round(BLOCK * len(stack) / DEPTH)  # type: ignore[arg-type]
    number = min(numbers, key=lambda number: (abs(number - wanted), number))
    return stack[number]  # type: ignore[index]


def key_states(
    context: EditContext,
    adapter_name: str,
    questions: Sequence[Sequence[int]],
    batch_size: int = 1,
) -> list[Tensor]:
    """Compute the states (n, d) of questions' tokens after the key block, in forwards that end there.

    Args:
        batch_size: questions of a forward. With one, a question's states do not depend on other questions in any bit.
    """
    block, found = key_block(context.model), {}
    # Texts of like length need little padding.
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    thread, seen = threading.get_ident(), []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            seen.append(output[0] if isinstance(output, tuple | list) else output)
            raise _BlockHasRun

    handle = block.register_forward_hook(keep)
    device = input_device(context.model)
    with ExitStack() as stack:
        stack.callback(handle.remove)
        stack.enter_context(evaluating(context.model))
        for start in range(0, len(questions), batch_size):
            numbers = order[start : start + batch_size]
            batch = [questions[number] for number in numbers]
            longest = max(map(len, batch))
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            real = torch.zeros(len(batch), longest, dtype=torch.bool)
            for row, question in enumerate(batch):
                ids[row, : len(question)] = torch.tensor(list(question))
                real[row, : len(question)] = True
            with suppress(_BlockHasRun):
                context.run_base(ids.to(device), real.to(device), adapter_name)
            states = seen.pop()
            for row, (number, question) in enumerate(zip(numbers, batch, strict=True)):
                found[number] = states[row, : len(question)].float()
    return [found[number] for number in range(len(questions))]


def keys_of(states: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Make keys (n, k) int8, of length 127, of states (n, d)."""
    white = (states.float() - mean.to(states.device).float()) @ whitening.to(states.device).float()
    return (torch.nn.functional.normalize(white, dim=-1) * INT8).round().to(torch.int8)
