"""Learn the code of each edit, side by side: what is added to hidden vectors, in a frozen basis that all edits share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.blocks import blocks_before
from peft_baft.adapter.model_call import input_device
from peft_baft.data.batching import Tokens
from peft_baft.editing.acceleration.cached_texts import CachedTexts
from peft_baft.editing.acceleration.module_patches import (
    forwards_without_padding,
    replaced_forwards,
    with_hidden,
)
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import STOP_TERM, Descent, DescentConfig, Terms, descend
from peft_baft.losses import answer_losses


@contextmanager
def added(model: Any, bases: Mapping[str, Tensor], codes: Tensor, mask: Tensor) -> Iterator[None]:
    """Add codes (rows, blocks, r) to the tokens that the mask marks (rows, tokens), in the forwards inside.

    Args:
        bases: by the names of the edited blocks, R (r, d).
    """
    with ExitStack() as hooks:
        for number, (name, basis) in enumerate(bases.items()):
            hook = partial(_add, codes[:, number] @ basis, mask)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield


def _add(change: Tensor, mask: Tensor, _module: nn.Module, _args: tuple, output: Any) -> Any:
    def edited(hidden: Tensor) -> Tensor:
        update = mask.to(hidden.device)[..., None] * change.to(hidden.device)[:, None]
        return hidden + update.to(hidden.dtype)

    return with_hidden(output, edited)


def learn_codes(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Sequence[Tokens]],
    bases: Mapping[str, Tensor],
    prompt_positions: int,
    config: DescentConfig,
) -> tuple[Tensor, list[EditResult]]:
    """Learn a code for each fact side by side, each until its own answer is learned in all its texts.

    Args:
        facts: the texts of each. bases: by the names of the edited blocks, R (r, d).

    Returns:
        (facts, blocks, r), and the result of each.

    Raises:
        FloatingPointError: a loss became NaN or infinite.
    """
    device = input_device(model)
    rank = len(next(iter(bases.values())))
    codes = [nn.Parameter(torch.zeros(len(bases), rank, device=device)) for _ in facts]
    descents = [Descent([code], config) for code in codes]
    numbers = {id(descent): number for number, descent in enumerate(descents)}
    rows = [row for texts in facts for row in texts]
    owners = [number for number, texts in enumerate(facts) for _ in texts]
    answers = [torch.tensor(row.ids[row.prompt_length :], device=device) for row in rows]
    begins = [max(0, row.prompt_length - prompt_positions) for row in rows]
    texts = _texts(model, tokenizer, rows, next(iter(bases)), begins)
    at_hand = list(range(len(rows)))  # of which row of `rows` each row of `texts` is

    def losses(running: Sequence[Descent]) -> list[Terms]:
        nonlocal texts, at_hand
        wanted = [numbers[id(descent)] for descent in running]
        needed = [row for row in at_hand if owners[row] in set(wanted)]
        if 2 * len(needed) <= len(at_hand):  # what is learned needs no more forwards
            texts, at_hand = texts.select([at_hand.index(row) for row in needed]), needed
        columns = torch.arange(texts.inputs["input_ids"].shape[1], device=device)
        first = [begins[row] - cut for row, cut in zip(at_hand, texts.cuts, strict=True)]
        edited = columns >= torch.tensor(first, device=device)[:, None]
        of_rows = torch.stack([codes[owners[row]] for row in at_hand])
        real = texts.inputs["attention_mask"][:, -len(columns) :].bool()
        with (
            added(model, bases, of_rows, edited),
            replaced_forwards(forwards_without_padding(model, real, {})),
        ):
            logits = texts.logits()
        every = answer_losses(logits, torch.cat([answers[r] for r in at_hand]).to(logits.device))
        parts = dict(zip(at_hand, every.split([len(answers[r]) for r in at_hand]), strict=True))
        terms = []
        for number in wanted:
            means = [parts[row].mean() for row in at_hand if owners[row] == number]
            terms.append({STOP_TERM: torch.stack(means).mean()})
        return terms

    results = descend(descents, losses)
    return torch.stack([code.detach() for code in codes]), results


def _texts(
    model: Any, tokenizer: Any, rows: Sequence[Tokens], first_block: str, begins: Sequence[int]
) -> CachedTexts:
    """Put what no code edits into a cache, and read the logits that predict the answers' tokens."""
    lengths = [len(row.ids) - row.prompt_length for row in rows]
    columns = [
        torch.arange(len(row.ids) - 1 - length, len(row.ids) - 1)
        for row, length in zip(rows, lengths, strict=True)
    ]
    numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
    fixed = blocks_before(model, first_block)
    places = (numbers, torch.cat(columns))
    return CachedTexts.of(model, tokenizer, rows, begins, places, fixed)
