"""Optional metrics of an edited model and a case, by name; each takes extra time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_baft.data.cases import Case
from peft_baft.data.templates import RAW, Template
from peft_baft_bench.metrics.fluency import fluency
from peft_baft_bench.metrics.piqa import right_choices
from peft_baft_bench.metrics.sentiment import edit_success
from peft_baft_bench.metrics.subspace import has_gates, mean_gates, removal_ladder, subspaces
from peft_baft_bench.tasks.formats import ConvSentCase, PiqaItem

# Called with an edited model, its tokenizer, a case and the prompt format; returns values by name.
Metric = Callable[[nn.Module, PreTrainedTokenizerBase, Case, Template], dict[str, Any]]


def _fluency(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, case: Case, template: Template = RAW
) -> dict[str, Any]:
    """Measure how varied the text is that the model generates after the edit's prompt."""
    return {"fluency": fluency(model, tokenizer, [case.edit.prompt], template=template)[0]}


def _redundancy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, case: Case, template: Template = RAW
) -> dict[str, Any]:
    """Measure how much of the edit remains without the least used dimensions; empty if no BaFT adapter is active."""
    return {"kept": removal_ladder(model, tokenizer, case, template)} if subspaces(model) else {}


def _gates(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, case: Case, template: Template = RAW
) -> dict[str, Any]:
    """Average the gates over the edit and over its probes; empty for a model without gates."""
    return {"gates": mean_gates(model, tokenizer, case, template)} if has_gates(model) else {}


def _sentiment(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, case: Case, template: Template = RAW
) -> dict[str, Any]:
    """Measure whether the model's opinion changed as intended."""
    if not isinstance(case, ConvSentCase):
        raise ValueError(
            "The metric `sentiment` needs answers with both opinions, which only the benchmark convsent has."
        )
    sides = (case.positive, case.negative)
    wanted, unwanted = sides if case.wanted == "positive" else sides[::-1]
    success = edit_success(model, tokenizer, case.question, wanted, unwanted, template=template)
    return {"sentiment": success}


METRICS: dict[str, Metric] = {
    "fluency": _fluency,
    "redundancy": _redundancy,
    "gates": _gates,
    "sentiment": _sentiment,
}


def piqa_cases(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[PiqaItem],
    rows: Sequence[int],
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
    template: Template = RAW,
) -> list[dict[str, Any]]:
    """Ask some rows of PIQA; returns an entry per row for a result line: whether it is right, by four rules.

    Args:
        progress: wraps the iteration over the rows, like tqdm.
        template: the prompt format.
    """
    return [
        {"row": row, "probes": [], **right_choices(model, tokenizer, items[row], template)}
        for row in progress(rows)
    ]


def piqa_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[PiqaItem],
    template: Template = RAW,
) -> dict[str, float]:
    """Compute the share of PIQA items that an edited model gets right by the paper's rule (Table 8)."""
    right = [right_choices(model, tokenizer, item, template)["accuracy"] for item in items]
    return {"piqa": sum(right) / len(right)}
