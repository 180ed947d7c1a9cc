"""A check for harm by edits: answers to general questions that should not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from peft import PeftModel

from peft_baft.adapter.state import without_adapters
from peft_baft.data.cases import Probe, Unrelated
from peft_baft.data.templates import RAW, Template
from peft_baft.data.unrelated import CANARIES
from peft_baft.evaluation.scoring import agreement, predicted_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def canary_check(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    threshold: float,
    canaries: Sequence[Unrelated | Probe] = CANARIES,
    template: Template = RAW,
) -> Callable[[], str | None]:
    """Query the unedited model on the canaries, and return a function that compares the current model with it.

    Args:
        model: a PeftModel.
        threshold: the minimum mean agreement with the unedited model's teacher-forced predictions, in [0, 1].
        template: the prompt format.

    Returns:
        A `check` for `edit_continually`, which returns a problem or None.

    Raises:
        ValueError: `canaries` is empty, or the threshold is not in [0, 1].
    """
    if not canaries or not 0 <= threshold <= 1:
        raise ValueError(
            f"A check needs canaries and a threshold in [0, 1], not {len(canaries)} canaries and {threshold!r}."
        )
    pairs = [(canary.prompt, canary.answer) for canary in canaries]
    with without_adapters(model):
        before = predicted_tokens(model, tokenizer, pairs, template=template)

    def check() -> str | None:
        now = mean(agreement(before, predicted_tokens(model, tokenizer, pairs, template=template)))
        if now >= threshold:
            return None
        return f"canaries agree with the unedited model in {now:.3f} of their tokens, below the threshold of {threshold:g}"

    return check
