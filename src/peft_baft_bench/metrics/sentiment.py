"""ConvSent: measure whether an edit changed the model's opinion and kept its answers on topic."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_baft.adapter.state import without_adapters
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.likelihood import log_probabilities


def edit_success(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    wanted: Sequence[str],
    unwanted: Sequence[str],
    *,
    template: Template = RAW,
) -> float:
    """Compute ES of MEND (Mitchell et al. 2022), in [0, 1]: the change of opinion times staying on topic.

    σ(wanted - unwanted) · min(1, exp(wanted - wanted before the edit)), where each term is the mean
    log-probability of all tokens of all answers with that opinion. EasyEdit reads each token's probability
    from the logits after the token instead of those before it, and asks a random question for each answer, so
    its values differ.

    Args:
        model: the edited model; for an unedited one, the second factor is 1.
        question: asks for the opinion.
        wanted, unwanted: answers with the taught opinion and with the opposite one.
        template: the prompt format of the question.

    Raises:
        ValueError: one of the two lists of answers is empty.
    """
    if not wanted or not unwanted:
        raise ValueError(
            f"Both opinions need at least one answer, but there are {len(wanted)} wanted and {len(unwanted)} unwanted ones."
        )
    answers = [(question, answer) for answer in (*wanted, *unwanted)]
    after = log_probabilities(model, tokenizer, answers, template=template)
    with without_adapters(model) if isinstance(model, PeftModel) else nullcontext():
        before = log_probabilities(model, tokenizer, answers[: len(wanted)], template=template)
    taught, opposite = _mean(after[: len(wanted)]), _mean(after[len(wanted) :])
    change_of_opinion = (taught - opposite).sigmoid().item()
    staying_on_topic = (taught - _mean(before)).exp().clamp(max=1).item()
    return change_of_opinion * staying_on_topic


def _mean(answers: Sequence[Tensor]) -> Tensor:
    """Average over all tokens of all answers, ()."""
    return torch.cat(list(answers)).mean()
