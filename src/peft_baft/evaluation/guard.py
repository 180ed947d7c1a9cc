"""Check whether an edit did harm: answers that should have stayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from peft_baft.adapter.state import without_adapters
from peft_baft.data.cases import Probe, Unrelated
from peft_baft.data.templates import RAW, Template
from peft_baft.data.unrelated import CANARIES
from peft_baft.evaluation.scoring import agreement, predicted_tokens


def canary_check(
    model: Any,
    tokenizer: Any,
    threshold: float,
    canaries: Sequence[Unrelated | Probe] = CANARIES,
    template: Template = RAW,
) -> Callable[[], str | None]:
    """Ask the unedited model the canaries; calling the result asks the model as it is then.

    Args:
        model: a PeftModel. threshold: the least mean agreement with the unedited model, teacher-forced, in [0, 1].
        template: the form in which they are asked.

    Returns:
        A `check` for `edit_continually`: what is wrong, or None.

    Raises:
        ValueError: there are no canaries, or the threshold is not in [0, 1].
    """
    if not canaries or not 0 <= threshold <= 1:
        raise ValueError(f"A check needs canaries, and an agreement in [0, 1], not {threshold!r}.")
    pairs = [(canary.prompt, canary.answer) for canary in canaries]
    with without_adapters(model):
        before = predicted_tokens(model, tokenizer, pairs, template=template)

    def check() -> str | None:
        now = mean(agreement(before, predicted_tokens(model, tokenizer, pairs, template=template)))
        if now >= threshold:
            return None
        return f"canaries agree with the unedited model in {now:.3f} of their tokens, below {threshold:g}"

    return check
