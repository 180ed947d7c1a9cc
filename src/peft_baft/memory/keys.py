"""Keys of a question's tokens: their hidden states after an early block, whitened and reduced to a few dimensions.

The keys are computed from the question as raw text after one fixed token, without the rest of the prompt. They, and the choice of
the edit that answers, therefore depend only on the question's words, and not on a system prompt, earlier turns, the chat
template, padding or a cache.
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

# Keys come from block 4 (counted from 0) of a model with 30 blocks, and from the proportionate block of others: docs/memory.md.
BLOCK, DEPTH = 4, 30
KEY_LENGTH = 127.0  # the length of a key, so that its numbers fit into int8


class _BlockHasRun(Exception):
    """Ends a forward once the wanted block has run."""


def key_block(model: nn.Module) -> nn.Module:
    """Return the block whose output is used for keys."""
    stack: Any = model.get_submodule(find_stack(model))
    left_out = blocks_left_out(model)
    numbers = [number for number in range(len(stack)) if number not in left_out]
    wanted = round(BLOCK * len(stack) / DEPTH)
    number = min(numbers, key=lambda number: (abs(number - wanted), number))
    block: nn.Module = stack[number]
    return block


def key_states(
    context: EditContext,
    adapter_name: str,
    questions: Sequence[Sequence[int]],
    batch_size: int = 1,
) -> list[Tensor]:
    """Compute the hidden states (n, d) of questions' tokens after the key block. Each forward ends at that block.

    Args:
        batch_size: questions per forward. With 1, the states of a question are bit-for-bit independent of the other questions.
    """
    block = key_block(context.model)
    found: dict[int, Tensor] = {}
    # Questions of similar length need little padding.
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    thread = threading.get_ident()
    outputs: list[Tensor] = []

    def capture(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            outputs.append(output[0] if isinstance(output, tuple | list) else output)
            raise _BlockHasRun

    handle = block.register_forward_hook(capture)
    device = input_device(context.model)
    with ExitStack() as stack:
        stack.callback(handle.remove)
        stack.enter_context(evaluating(context.model))
        for start in range(0, len(questions), batch_size):
            numbers = order[start : start + batch_size]
            batch = [questions[number] for number in numbers]
            longest = max(map(len, batch))
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros(len(batch), longest, dtype=torch.bool)
            for row, question in enumerate(batch):
                ids[row, : len(question)] = torch.tensor(list(question))
                mask[row, : len(question)] = True
            with suppress(_BlockHasRun):
                context.run_base(ids.to(device), mask.to(device), adapter_name)
            states = outputs.pop()
            for row, (number, question) in enumerate(zip(numbers, batch, strict=True)):
                found[number] = states[row, : len(question)].float()
    return [found[number] for number in range(len(questions))]


def states_to_keys(states: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Compute keys (n, k) int8, of length 127, from hidden states (n, d)."""
    white = (states.float() - mean.to(states.device).float()) @ whitening.to(states.device).float()
    return (torch.nn.functional.normalize(white, dim=-1) * KEY_LENGTH).round().to(torch.int8)
