"""A report after editing: whether each edit was learned, whether rephrasings follow, and what else changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from torch import nn

from peft_baft.data.cases import Case, Prompt, prompt_words
from peft_baft.data.templates import RAW, Template
from peft_baft.data.unrelated import CANARIES
from peft_baft.evaluation.scoring import agreement, greedy_answers, predicted_tokens, token_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answered:
    """The model's greedy answers to the prompt of one edit, before and after editing, and the target."""

    prompt: str
    before: str
    after: str
    wanted: str

    @property
    def learned(self) -> bool:
        """Whether the answer after the edit begins with the target, ignoring case and spacing."""
        return self.after.casefold().startswith(" ".join(self.wanted.split()).casefold())


@dataclass(frozen=True)
class Report:
    """The answer to each edit, and three mean teacher-forced token matches in [0, 1]; None without such probes."""

    answers: list[Answered]
    reliability: float
    generality: float | None
    locality: float | None


def watch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    template: Template = RAW,
) -> Callable[[], Report]:
    """Query the model before it is edited, and return a function that queries it again and compares.

    Locality is measured on the cases' locality probes and on a few general questions that no edit is trained on.

    Args:
        template: the prompt format of all queries.
    """
    edits = [(case.edit.prompt, case.edit.target) for case in cases]
    prompts = [prompt for prompt, _ in edits]
    rephrased = _pairs_of_kind(cases, "generality")
    unrelated = _pairs_of_kind(cases, "locality")
    unrelated += [(canary.prompt, canary.answer) for canary in CANARIES]
    answers_before = greedy_answers(model, tokenizer, prompts, template=template)
    tokens_before = predicted_tokens(model, tokenizer, unrelated, template=template)

    def report() -> Report:
        answers_now = greedy_answers(model, tokenizer, prompts, template=template)
        tokens_now = predicted_tokens(model, tokenizer, unrelated, template=template)
        answers = []
        for (prompt, target), before, after in zip(edits, answers_before, answers_now, strict=True):
            answers.append(Answered(prompt_words(prompt), before, after, wanted=target))
        generality = None
        if rephrased:
            generality = mean(token_match(model, tokenizer, rephrased, template=template))
        return Report(
            answers,
            reliability=mean(token_match(model, tokenizer, edits, template=template)),
            generality=generality,
            locality=mean(agreement(tokens_before, tokens_now)),
        )

    return report


def _pairs_of_kind(cases: Sequence[Case], kind: str) -> list[tuple[Prompt, str]]:
    """List prompt and answer of all probes of one kind."""
    pairs: list[tuple[Prompt, str]] = []
    for case in cases:
        pairs += [(probe.prompt, probe.answer) for probe in case.of_kind(kind)]
    return pairs
