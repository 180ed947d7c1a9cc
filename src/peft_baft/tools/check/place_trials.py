"""Trials of where the adapter acts: at which tokens, in batches with padding, and with a cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from peft_baft.adapter.state import without_adapters
from peft_baft.running import full_logits
from peft_baft.tools.check.findings import Finding
from peft_baft.tools.check.tools import changed_tokens, error_of, largest_difference
from peft_baft.tools.check.tried_model import NEW_TOKENS, TriedModel

RUNS = "the edited model runs"
CONTROL = "an edit one token off would be seen"
PLACES = "the last prompt tokens and the answer are edited, nothing else"
UNEDITED_CANNOT = "The unedited model cannot do it: {}"
CANNOT_TELL = (
    "Cannot tell: one edited token more or less changes the logits less than rounding, so the findings about places prove "
    "nothing. Check the base model without this adapter: it then gets a random one, whose edits are seen."
)
# Logits (tokens, vocabulary) of the same tokens, had in two ways.
LogitPairs = list[tuple[Tensor, Tensor]]


def runs(tried: TriedModel) -> Finding:
    """Try whether one forward gives numbers."""
    finite = bool(tried.logits_alone(tried.prompts[0], tried.answer).isfinite().all())
    return Finding(RUNS, finite, detail="" if finite else "Its logits are not finite.")


def control(tried: TriedModel) -> Finding:
    """Try whether the comparisons could fail: an edit that begins one token earlier or later must be seen."""
    prompt = tried.prompts[0]
    first = max(len(prompt) - tried.positions - 1, 0)
    right = tried.logits_alone(prompt, tried.answer)[first:]
    differences = []
    for offset in (-1, 1):
        wrong = tried.logits_alone(prompt, tried.answer, len(prompt) + offset)[first:]
        differences.append(largest_difference([(wrong, right)]))
    if min(differences) > tried.tolerance:
        return Finding(CONTROL, True, min(differences))
    return Finding(CONTROL, False, min(differences), detail=CANNOT_TELL)


def places(tried: TriedModel) -> Finding:
    """Try which tokens each edited block changes while an answer is generated, token by token.

    One row at a time: some models' own caches fail with several.
    """
    wrong: list[str] = []
    for prompt in tried.prompts:
        batch = tried.padded([prompt], "left")
        try:
            with changed_tokens(tried.layers) as changed:
                tried.generate(batch)
        except Exception:
            with without_adapters(tried.model):
                error = error_of(partial(tried.generate, batch))
            if error is None:  # it is the adapter that made it fail
                raise
            return Finding(PLACES, None, detail=UNEDITED_CANNOT.format(error))
        for block, masks in changed.items():
            if not masks or len(masks) % NEW_TOKENS:
                return Finding(
                    PLACES, None, detail=f"{block} ran {len(masks)} times for {NEW_TOKENS} tokens."
                )
            wrong += [
                f"{block}, new token {n}"
                for n in _wrong_tokens(masks, len(prompt), tried.positions)
            ]
    return Finding(
        PLACES, not wrong, detail=f"Other tokens at {'; '.join(wrong[:3])}." if wrong else ""
    )


def _wrong_tokens(masks: list[Tensor], prompt_length: int, positions: int) -> list[int]:
    """Find the forwards of one generation, numbered from 1, in which a block did not edit the tokens that it should.

    masks: (1, tokens) of each run of the block, which tokens it changed. A block may run several times in each forward.
    """
    wrong = []
    runs_in_a_forward = len(masks) // NEW_TOKENS
    for run, mask in enumerate(masks):
        forward = run // runs_in_a_forward
        end = prompt_length + forward  # tokens so far; the mask covers the last of them
        expected = torch.arange(end - mask.shape[1], end) >= prompt_length - positions
        if not torch.equal(mask[0], expected):
            wrong.append(forward + 1)
    return wrong


def with_and_without_later_tokens(tried: TriedModel) -> LogitPairs:
    """Logits of the prompt's tokens but the last, with nothing behind the prompt, and with an answer there."""
    prompt = tried.prompts[0]
    prompt_alone = tried.logits_alone(prompt, [])[:-1]
    before_answer = tried.logits_alone(prompt, tried.answer)[: len(prompt) - 1]
    return [(prompt_alone, before_answer)]


def generated_and_alone(prompts: list[list[int]], tried: TriedModel) -> LogitPairs:
    """Compute, for each row, the logits of generation in one batch, and those of one full forward of that row alone."""
    answers, logits = tried.generate(tried.padded(prompts, "left"))
    alone = []
    for prompt, answer in zip(prompts, answers, strict=True):
        alone.append(tried.logits_alone(prompt, answer)[len(prompt) - 1 : -1])
    return list(zip(logits, alone, strict=True))


@torch.no_grad()
def padded_and_alone(tried: TriedModel) -> LogitPairs:
    """Compute, for each row, the logits in a right-padded batch, and those of that row alone."""
    batch = tried.padded([[*prompt, *tried.answer] for prompt in tried.prompts], "right")
    together = full_logits(
        tried.model, **batch, prompt_lengths=[len(prompt) for prompt in tried.prompts]
    )
    alone = [tried.logits_alone(prompt, tried.answer) for prompt in tried.prompts]
    return [(row[: len(one)].float(), one) for row, one in zip(together, alone, strict=True)]
