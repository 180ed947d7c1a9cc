"""Report after editing: did each edit take, do rephrasings follow, what else changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from peft_baft.data.cases import Case, prompt_words
from peft_baft.data.templates import RAW, Template
from peft_baft.data.unrelated import CANARIES
from peft_baft.evaluation.scoring import agreement, greedy_answers, predicted_tokens, token_match


@dataclass(frozen=True)
class Answered:
    """One edit: the model's own greedy answer before and after, and whether the latter begins with the target."""

    prompt: str
    before: str
    after: str
    wanted: str

    @property
    def learned(self) -> bool:
        """The answer after the edit begins with the wanted one, case and spacing aside."""
        return self.after.casefold().startswith(" ".join(self.wanted.split()).casefold())


@dataclass(frozen=True)
class Report:
    """The edits one by one and three means of teacher-forced token matches, in [0, 1]; None where nothing was asked."""

    answers: list[Answered]
    reliability: float
    generality: float | None
    locality: float | None


def watch(
    model: Any, tokenizer: Any, cases: Sequence[Case], template: Template = RAW
) -> Callable[[], Report]:
    """Ask the model before it is edited; calling the result asks again and compares.

    Locality is asked with the cases' own locality probes and a few general questions that no edit is trained on.

    Args:
        template: the form in which everything is asked.
    """
    edits = [(case.edit.prompt, case.edit.target) for case in cases]
    prompts = [prompt for prompt, _ in edits]
    rephrased = [
        (probe.prompt, probe.answer) for case in cases for probe in case.of_kind("generality")
    ]
    nearby = [(probe.prompt, probe.answer) for case in cases for probe in case.of_kind("locality")]
    nearby += [(canary.prompt, canary.answer) for canary in CANARIES]
    said_before = greedy_answers(model, tokenizer, prompts, template=template)
    nearby_before = predicted_tokens(model, tokenizer, nearby, template=template)

    def report() -> Report:
        said_now = greedy_answers(model, tokenizer, prompts, template=template)
        answers = []
        for (prompt, target), before, after in zip(edits, said_before, said_now, strict=True):
            answers.append(Answered(prompt_words(prompt), before, after, wanted=target))
        return Report(
            answers,
            reliability=mean(token_match(model, tokenizer, edits, template=template)),
            generality=mean(token_match(model, tokenizer, rephrased, template=template))
            if rephrased
            else None,
            locality=mean(
                agreement(
                    nearby_before, predicted_tokens(model, tokenizer, nearby, template=template)
                )
            ),
        )

    return report
