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

# Of AdamW: with torch's (0.9, 0.999) steps as large as these overshoot, and it takes twice as many (docs/log.md).
BETAS = (0.4, 0.9)


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
    descents = [Descent([code], config, betas=BETAS) for code in codes]
    numbers = {id(descent): number for number, descent in enumerate(descents)}
    texts = _TextsOfFacts(model, tokenizer, facts, bases, prompt_positions)

    def losses(running: Sequence[Descent]) -> list[Terms]:
        wanted = [numbers[id(descent)] for descent in running]
        return [{STOP_TERM: loss} for loss in texts.losses(codes, wanted)]

    results = descend(descents, losses)
    return torch.stack([code.detach() for code in codes]), results


class _TextsOfFacts:
    """The texts of some facts, of which those that are learned leave the forwards.

    Args:
        facts: the texts of each. bases: by the names of the edited blocks, R (r, d).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        facts: Sequence[Sequence[Tokens]],
        bases: Mapping[str, Tensor],
        prompt_positions: int,
    ) -> None:
        self._model, self._bases, self._device = model, bases, input_device(model)
        rows = [row for texts in facts for row in texts]
        self._owners = [number for number, texts in enumerate(facts) for _ in texts]
        self._answers = [
            torch.tensor(row.ids[row.prompt_length :], device=self._device) for row in rows
        ]
        self._begins = [max(0, row.prompt_length - prompt_positions) for row in rows]
        self._texts = _cached(model, tokenizer, rows, next(iter(bases)), self._begins)
        self._at_hand = list(range(len(rows)))  # of which text each row of `_texts` is

    def losses(self, codes: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
        """Compute the loss of some facts, each with its own code: the mean over its texts of the mean over the answer's tokens.

        Args:
            codes: of all facts, (blocks, r) each. wanted: numbers of facts; others are never asked for again.
        """
        self._leave_out_others(set(wanted))
        texts, at_hand = self._texts, self._at_hand
        columns = torch.arange(texts.inputs["input_ids"].shape[1], device=self._device)
        first = [self._begins[text] - cut for text, cut in zip(at_hand, texts.cuts, strict=True)]
        edited = columns >= torch.tensor(first, device=self._device)[:, None]
        of_rows = torch.stack([codes[self._owners[text]] for text in at_hand])
        real = texts.inputs["attention_mask"][:, -len(columns) :].bool()
        with (
            added(self._model, self._bases, of_rows, edited),
            replaced_forwards(forwards_without_padding(self._model, real, {})),
        ):
            logits = texts.logits()
        answers = [self._answers[text] for text in at_hand]
        every = answer_losses(logits, torch.cat(answers).to(logits.device))
        parts = zip(at_hand, every.split([len(answer) for answer in answers]), strict=True)
        of_facts: dict[int, list[Tensor]] = {}
        for text, of_text in parts:
            of_facts.setdefault(self._owners[text], []).append(of_text.mean())
        return [torch.stack(of_facts[number]).mean() for number in wanted]

    def _leave_out_others(self, wanted: set[int]) -> None:
        """Take the texts of facts that are learned out of the batch; copying the others costs less than running these again."""
        needed = [text for text in self._at_hand if self._owners[text] in wanted]
        if len(needed) < len(self._at_hand):
            places = [self._at_hand.index(text) for text in needed]
            self._texts, self._at_hand = self._texts.select(places), needed


def _cached(
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
