"""How many edits share their forwards: what `parallel` allows, at its bound."""

from __future__ import annotations

from copy import deepcopy

import pytest

import facts
from facts import ADAPTER, CAPITALS, DESCENT, OBJECTIVE, FactModel, edits, meals
from peft_baft import BaftEditor, Case, Probe
from peft_baft_bench.methods.adapters import AdapterMethod
from peft_baft_bench.methods.methods import Method
from peft_baft_bench.run.progress import Progress
from peft_baft_bench.run.runner import Runner
from peft_baft_bench.run.schedule import Schedule

fact_model = facts.fact_model
METHOD = Method(
    "baft",
    AdapterMethod(config=ADAPTER, descent=DESCENT, batch_descent=DESCENT, objective=OBJECTIVE),
)


@pytest.mark.parametrize(("parallel", "groups"), [(1, []), (2, [2, 1]), (3, [3])])
def test_the_bench_edits_as_many_rows_at_once_as_it_is_told(
    fact_model: FactModel, monkeypatch: pytest.MonkeyPatch, parallel: int, groups: list[int]
) -> None:
    """With 1 each row has a forward of its own, and no adapter is copied."""
    together: list[int] = []
    real = BaftEditor.edit_side_by_side

    def counted(editor: BaftEditor, named):
        together.append(len(named))
        return real(editor, named)

    monkeypatch.setattr(BaftEditor, "edit_side_by_side", counted)
    cases = [
        Case(edit, (Probe("generality", CAPITALS[n].rephrase, edit.target),))
        for n, edit in enumerate(edits(0, 1, 2))
    ]
    bench = Runner(
        deepcopy(fact_model.base),
        fact_model.tokenizer,
        cases,
        0,
        3,
        meals(0, 12),
        parallel=parallel,
    )
    entries = bench.edit_and_ask(METHOD, Schedule(), 0, Progress(None))
    assert together == groups and [entry["row"] for entry in entries] == [0, 1, 2]
