"""Independent edits that share their forwards give what each gives alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel

import facts
from facts import DESCENT, OBJECTIVE, FactModel, adapted, edits, meals
from peft_baft import NARROW, BaftEditor, DescentConfig, Edit, rolled_back
from peft_baft.adapter import baft_layers
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.evaluation.scoring import token_match

fact_model = facts.fact_model
FACTS = edits(0, 3, 7, 11, 5)


@pytest.fixture(params=["basis", "none", "subspace"])
def editor(request: pytest.FixtureRequest, fact_model: FactModel) -> Iterator[BaftEditor]:
    model = adapted(fact_model.base, weighting=request.param)
    editor = BaftEditor(model, fact_model.tokenizer, meals(0, 12), OBJECTIVE, DESCENT, scope=NARROW)
    editor.edit(edits(9))  # with a history
    yield editor


def state(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Parameters and statistics of one adapter."""
    found: dict[str, torch.Tensor] = {}
    for layer in baft_layers(model):
        for kind in ("baft_basis", "baft_source", "baft_gate", "baft_gate_usage"):
            container = getattr(layer, kind)
            if name not in container:
                continue
            tensors = (
                container[name].state_dict()
                if kind != "baft_gate_usage"
                else {"sums": container[name]}
            )
            found |= {
                f"{layer.name}.{kind}.{key}": tensor.detach().clone()
                for key, tensor in tensors.items()
            }
    return found


@pytest.mark.parametrize("parallel", [1, 2, 5])
def test_each_adapter_is_what_its_edit_gives_alone(
    editor: BaftEditor, fact_model: FactModel, parallel: int
) -> None:
    model, used = editor.model, editor.unrelated_used
    own = state(model, "default")
    alone = []
    for number, fact in enumerate(FACTS):
        with rolled_back(model):
            editor.unrelated_used = used + number * editor.unrelated_per_edit
            alone.append((editor.edit([fact]), state(model, "default")))
    assert editor.unrelated_used == used
    found = list(editor.edit_each(FACTS, parallel))
    assert [name for name, _ in found] == [f"default-{i}" for i in range(5)]
    assert len({outcome.steps for _, outcome in found}) > 1  # lanes that end at different steps
    for (name, outcome), (outcome_alone, state_alone), fact in zip(
        found, alone, FACTS, strict=True
    ):
        assert outcome.learned and outcome.steps == outcome_alone.steps
        assert outcome.losses == pytest.approx(outcome_alone.losses, rel=1e-2, abs=1e-5)
        for key, tensor in state(model, name).items():
            torch.testing.assert_close(tensor, state_alone[key], atol=5e-3, rtol=1e-3)
        model.set_adapter(name)
        assert token_match(model, fact_model.tokenizer, [(fact.prompt, fact.target)]) == [1.0]
    model.set_adapter("default")
    assert all(torch.equal(tensor, own[key]) for key, tensor in state(model, "default").items())
    assert token_match(model, fact_model.tokenizer, [(FACTS[0].prompt, FACTS[0].target)]) != [1.0]


def test_lanes_share_forwards(fact_model: FactModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(fact_model.base)
    editor = BaftEditor(model, fact_model.tokenizer, meals(0, 12), OBJECTIVE, DESCENT, scope=NARROW)
    rows: list[int] = []
    real = CachedPrefix.losses

    def counted(self: CachedPrefix) -> torch.Tensor:
        rows.append(len(self.targets.rows))
        return real(self)

    monkeypatch.setattr(CachedPrefix, "losses", counted)
    steps = [outcome.steps for _, outcome in editor.edit_each(FACTS, parallel=5)]
    assert rows[:3] == [2, 2, 10]  # a check, then all of them
    assert len(rows) == 2 + max(steps) + 1  # as many as the longest takes alone
    # And no row of an edit that is done.
    assert sum(rows[2:]) == 2 * sum(taken + 1 for taken in steps)


def test_a_lane_that_breaks_leaves_no_adapter_behind(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    diverging = DescentConfig(lr=1e30, max_steps=5, stop_loss=0.0)
    editor = BaftEditor(model, fact_model.tokenizer, (), OBJECTIVE, diverging, scope=NARROW)
    before = state(model, "default")
    with pytest.raises(FloatingPointError):
        list(editor.edit_each(FACTS))
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model, "default").items())


def test_bad_edits_are_named_before_any_is_made(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    editor = BaftEditor(model, fact_model.tokenizer, (), OBJECTIVE, DESCENT, scope=NARROW)
    with pytest.raises(ValueError, match="reads at most"):
        editor.edit_each([*FACTS, Edit("the " * 40, "Kasgrad")])
    with pytest.raises(ValueError, match="at least 1"):
        editor.edit_each(FACTS, parallel=0)
    next(iter(editor.edit_each(FACTS[:1])))
    with pytest.raises(ValueError, match="'default-0' already"):
        editor.edit_each(FACTS)
