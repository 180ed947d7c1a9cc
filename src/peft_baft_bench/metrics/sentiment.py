"""ConvSent: measure whether an edit of an opinion turned what a model would say, and kept it to the topic."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from peft_baft.adapter.state import without_adapters
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.likelihood import log_probabilities


def edit_success(
    model: Any,
    tokenizer: Any,
    question: str,
    wanted: Sequence[str],
    unwanted: Sequence[str],
    *,
    template: Template = RAW,
) -> float:
    """ES of MEND (Mitchell et al. 2022), in [0, 1]: the turn of opinion times the hold on the topic.

    σ(wanted - unwanted) · min(1, exp(wanted - wanted before the edit)), where each stands for the mean log-probability of
    all tokens of all answers on that side. EasyEdit reads each token's probability off the logits behind that token
    and not before it, and asks each answer a random question, so its figures differ.

    Args:
        model: edited; of an unedited one the second factor is 1.
        question: asks for the opinion. wanted, unwanted: answers of the side that the edit takes, and of the other.
        template: the form in which the question is put to the model.

    Raises:
        ValueError: there is no answer on one of the sides.
    """
    if not wanted or not unwanted:
        raise ValueError(
            f"Both sides need at least one answer, not {len(wanted)} wanted and {len(unwanted)} unwanted."
        )
    answers = [(question, answer) for answer in (*wanted, *unwanted)]
    after = log_probabilities(model, tokenizer, answers, template=template)
    with without_adapters(model) if isinstance(model, PeftModel) else nullcontext():
        before = log_probabilities(model, tokenizer, answers[: len(wanted)], template=template)
    for_it, against = _mean(after[: len(wanted)]), _mean(after[len(wanted) :])
    turn_of_opinion = (for_it - against).sigmoid().item()
    hold_on_topic = (for_it - _mean(before)).exp().clamp(max=1).item()
    return turn_of_opinion * hold_on_topic


def _mean(answers: Sequence[Tensor]) -> Tensor:
    """Average over all tokens of all answers, ()."""
    return torch.cat(list(answers)).mean()
