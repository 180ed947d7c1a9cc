"""Trials of which tokens the adapter edits, also in padded batches and with a cache."""

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
CONTROL = "an edit one token off would be detected"
PLACES = "the last prompt tokens and the answer are edited, nothing else"
UNEDITED_CANNOT = "The unedited model fails too: {}"
INCONCLUSIVE = (
    "Inconclusive: one edited token more or less changes the logits less than rounding, so the findings about edited tokens "
    "mean nothing. Check the base model without this adapter: it then gets a random one with larger edits."
)
# Logits (tokens, vocabulary) of the same tokens, computed in two ways.
LogitPairs = list[tuple[Tensor, Tensor]]


def runs(tried: TriedModel) -> Finding:
    """Test whether the logits of a forward are finite."""
    finite = bool(tried.logits_of_row(tried.prompts[0], tried.answer).isfinite().all())
    return Finding(RUNS, finite, detail="" if finite else "Its logits are not finite.")


def control(tried: TriedModel) -> Finding:
    """Test that the comparisons can fail: an edit that begins one token earlier or later must be detected."""
    prompt = tried.prompts[0]
    first = max(len(prompt) - tried.positions - 1, 0)
    right = tried.logits_of_row(prompt, tried.answer)[first:]
    differences = []
    for offset in (-1, 1):
        wrong = tried.logits_of_row(prompt, tried.answer, len(prompt) + offset)[first:]
        differences.append(largest_difference([(wrong, right)]))
    if min(differences) > tried.tolerance:
        return Finding(CONTROL, True, min(differences))
    return Finding(CONTROL, False, min(differences), detail=INCONCLUSIVE)


def places(tried: TriedModel) -> Finding:
    """Test which tokens each edited block changes while an answer is generated, token by token.

    Rows run one at a time, since the caches of some models fail with several.
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
            if error is None:  # the adapter made it fail
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
    """Return the forwards of one generation, counted from 1, in which a block did not change the expected tokens.

    Args:
        masks: (1, tokens) the tokens that the block changed, for each of its calls. It may run several times per forward.
    """
    wrong = []
    runs_per_forward = len(masks) // NEW_TOKENS
    for run, mask in enumerate(masks):
        forward = run // runs_per_forward
        end = prompt_length + forward  # number of tokens so far; the mask is about the last of them
        expected = torch.arange(end - mask.shape[1], end) >= prompt_length - positions
        if not torch.equal(mask[0], expected):
            wrong.append(forward + 1)
    return wrong


def with_and_without_later_tokens(tried: TriedModel) -> LogitPairs:
    """Compute the logits of the prompt's tokens without the last one, for the prompt only and for the prompt with an answer."""
    prompt = tried.prompts[0]
    prompt_only = tried.logits_of_row(prompt, [])[:-1]
    with_answer = tried.logits_of_row(prompt, tried.answer)[: len(prompt) - 1]
    return [(prompt_only, with_answer)]


def generated_and_single(prompts: list[list[int]], tried: TriedModel) -> LogitPairs:
    """Compute each row's logits by generation in one batch, and by a full forward of only that row."""
    answers, logits = tried.generate(tried.padded(prompts, "left"))
    single = []
    for prompt, answer in zip(prompts, answers, strict=True):
        single.append(tried.logits_of_row(prompt, answer)[len(prompt) - 1 : -1])
    return list(zip(logits, single, strict=True))


@torch.no_grad()
def padded_and_single(tried: TriedModel) -> LogitPairs:
    """Compute each row's logits in a right-padded batch, and in a forward of only that row."""
    batch = tried.padded([[*prompt, *tried.answer] for prompt in tried.prompts], "right")
    batched = full_logits(
        tried.model, **batch, prompt_lengths=[len(prompt) for prompt in tried.prompts]
    )
    single = [tried.logits_of_row(prompt, tried.answer) for prompt in tried.prompts]
    return [(row[: len(one)].float(), one) for row, one in zip(batched, single, strict=True)]
