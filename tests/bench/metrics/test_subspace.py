"""What an edit uses of its subspaces: dimensions taken away one by one, and mean gates."""

# mypy: disable-error-code="assignment, attr-defined, union-attr"
from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import facts
from conftest import randomise
from facts import CAPITALS, DESCENT, MEALS, OBJECTIVE, FactModel, adapted, edits, meals
from peft_baft import NARROW, BaftConfig, BaftEditor, Case, Edit, Probe
from peft_baft.adapter import baft_layers
from peft_baft.data.batching import encode
from peft_baft.data.templates import RAW
from peft_baft.evaluation.scoring import token_match
from peft_baft_bench.metrics.metrics import METRICS
from peft_baft_bench.metrics.subspace import mean_gates, removal_ladder

fact_model = facts.fact_model
(EDIT,) = edits(0)
CASE = Case(
    EDIT,
    (
        Probe("generality", CAPITALS[0].rephrase, EDIT.target),
        *(Probe("locality", fact.prompt, fact.answer) for fact in MEALS[12:24]),
        *(Probe("locality", fact.rephrase, fact.answer) for fact in MEALS[12:24]),
    ),
)


def edited_model(fact_model: FactModel, weighting: str = "basis") -> PeftModel:
    model = adapted(fact_model.base, weighting=weighting)
    BaftEditor(model, fact_model.tokenizer, meals(0, 12), OBJECTIVE, DESCENT, scope=NARROW).edit(
        [EDIT]
    )
    return model.eval()


@pytest.fixture(scope="module", params=["basis", "none"])
def edited(request: Any, fact_model: FactModel) -> PeftModel:
    """The fact model with one fact edited, by BaFT and by ReFT."""
    return edited_model(fact_model, request.param)


def random_model(base: Any, **settings: Any) -> PeftModel:
    """Updates so large that a dimension more or less matters."""
    model = adapted(
        base,
        **{"gate_offset": 0.0, "layers_to_transform": [1, 2], "prompt_positions": 2, **settings},
    )
    randomise(model, scale=1.0)
    return model.eval()


@torch.no_grad()
def plainly(
    model: PeftModel, tokenizer: Any, case: Case
) -> tuple[list[list[float]], list[list[float]]]:
    """Use and mean gate of each dimension of each block, token by token from the formula."""
    row = encode(tokenizer, case.edit.prompt, case.edit.target)
    use, gates = [], []
    for layer in baft_layers(model):
        R, source = layer.baft_basis["default"]().double(), layer.baft_source["default"]
        A, b = R + source.weight.double(), source.bias.double()  # what is kept is A - R
        inputs: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(
            lambda _, args, kept=inputs: kept.append(args[0][0].double())
        )
        model(
            input_ids=torch.tensor([row.ids]),
            prompt_lengths=torch.tensor([row.prompt_length]),
            use_cache=False,
        )
        handle.remove()
        tokens = inputs[0][row.prompt_length - layer.configs["default"].prompt_positions :]
        w = [
            torch.sigmoid(
                layer.baft_gate["default"].weight.double() @ (h / h.square().mean().sqrt())
            )
            if "default" in layer.baft_gate
            else torch.ones(1)
            for h in tokens
        ]
        size = [(A @ h + b - R @ h).abs() * gate for h, gate in zip(tokens, w, strict=True)]
        use.append((sum(size) / len(size)).tolist())
        gates.append((sum(w) / len(w)).tolist())
    return use, gates


def without(model: PeftModel, use: list[list[float]], removed: int) -> PeftModel:
    """A copy whose least used dimensions are written over: D = A - R and b are 0 there."""
    copy = deepcopy(model)
    with torch.no_grad():
        for layer, of_block in zip(baft_layers(copy), use, strict=True):
            for k in sorted(range(len(of_block)), key=lambda k: of_block[k])[:removed]:
                layer.baft_source["default"].weight[k] = 0
                layer.baft_source["default"].bias[k] = 0
    return copy


# dimensions taken away


@pytest.mark.parametrize("weighting", ["basis", "subspace", "none"])
def test_the_ladder_equals_models_whose_least_used_dimensions_are_written_over(
    fact_model, weighting: str
) -> None:
    base, tokenizer = fact_model
    found = []
    for n in range(4):
        model = random_model(base, weighting=weighting, r=6)
        randomise(model, scale=0.3, seed=n)
        for layer in baft_layers(model) if weighting == "basis" else ():
            layer.baft_gate["default"].weight.data *= 30  # nearly open or nearly closed
        prompt = CAPITALS[n].prompt
        said = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False
        )[0, -8:]
        case = Case(Edit(prompt, tokenizer.decode(said)))  # what it says with all of the dimensions
        use, _ = plainly(model, tokenizer, case)
        pair = [(prompt, case.edit.target)]
        found.append([token_match(without(model, use, m), tokenizer, pair)[0] for m in range(7)])
        assert removal_ladder(model, tokenizer, case) == found[-1]
    assert any(0 < value < 1 for ladder in found for value in ladder)
    assert any(len(set(ladder)) > 2 for ladder in found)  # control: not all or nothing


def test_the_ladder_leads_from_the_edited_to_the_unedited_model(
    edited: PeftModel, fact_model: FactModel
) -> None:
    ladder = removal_ladder(edited, fact_model.tokenizer, CASE)
    assert len(ladder) == 5 and ladder[0] == 1 and ladder[-1] == 0
    pair = [(EDIT.prompt, EDIT.target)]
    assert ladder[0] == token_match(edited, fact_model.tokenizer, pair)[0]
    assert ladder[-1] == token_match(fact_model.base, fact_model.tokenizer, pair)[0]
    old = Case(Edit(EDIT.prompt, CAPITALS[0].answer))
    assert removal_ladder(edited, fact_model.tokenizer, old)[-1] == 1


def test_a_dimension_that_does_nothing_is_the_first_to_go(fact_model: FactModel) -> None:
    model = edited_model(fact_model, "none")
    alone = deepcopy(model)
    with torch.no_grad():  # of every block, dimension 2 only is used
        for layer in baft_layers(alone):
            source = layer.baft_source["default"]
            source.weight[[0, 1, 3]], source.bias[[0, 1, 3]] = 0, 0
            source.weight *= 4
    kept = token_match(alone, fact_model.tokenizer, [(EDIT.prompt, EDIT.target)])[0]
    first = removal_ladder(alone, fact_model.tokenizer, CASE)
    assert first[:4] == [kept] * 4


def test_the_adapter_is_bit_for_bit_as_before_also_after_an_error(
    edited: PeftModel, fact_model, monkeypatch
) -> None:
    before = {name: tensor.clone() for name, tensor in edited.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in edited.modules()]
    pair = [(EDIT.prompt, EDIT.target)]
    removal_ladder(edited, fact_model.tokenizer, CASE)

    def broken(*_: Any, **__: Any) -> None:
        assert [
            len(module._forward_hooks) for module in edited.modules()
        ] != hooks  # control: there were some
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_baft_bench.metrics.subspace.token_match", broken)
        with pytest.raises(KeyboardInterrupt):
            removal_ladder(edited, fact_model.tokenizer, CASE)
    after = edited.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert [len(module._forward_hooks) for module in edited.modules()] == hooks
    assert token_match(edited, fact_model.tokenizer, pair) == [1]


# gates


@pytest.mark.parametrize(("weighting", "width"), [("basis", 4), ("subspace", 1)])
def test_mean_gates_equal_the_formula_token_by_token(
    fact_model: FactModel, weighting: str, width: int
) -> None:
    model = random_model(fact_model.base, weighting=weighting)
    found = mean_gates(model, fact_model.tokenizer, CASE)
    assert found["blocks"] == ["model.layers.1", "model.layers.2"]
    asked = {
        "edit": [CASE.edit],
        "generality": CASE.of_kind("generality"),
        "locality": CASE.of_kind("locality"),
    }
    for kind, questions in asked.items():
        sums, tokens = torch.zeros(2, width), 0
        for question in questions:
            text = Case(Edit(question.prompt, getattr(question, "answer", EDIT.target)))
            n = 2 + len(text.edit.target.split())
            sums += n * torch.tensor(plainly(model, fact_model.tokenizer, text)[1])
            tokens += n
        torch.testing.assert_close(torch.tensor(found[kind]), sums / tokens, atol=1e-4, rtol=1e-4)
    assert found["edit"] != found["locality"]


def test_gates_open_on_the_edit_and_stay_closed_elsewhere(fact_model: FactModel) -> None:
    found = mean_gates(edited_model(fact_model), fact_model.tokenizer, CASE)
    means = {kind: torch.tensor(found[kind]).mean() for kind in ("edit", "locality")}
    assert means["edit"] > 3 * means["locality"]
    assert "generality" not in mean_gates(
        edited_model(fact_model), fact_model.tokenizer, Case(EDIT)
    )


# who may be asked


def test_what_has_no_subspace_is_refused_with_advice_and_passed_over_by_the_bench(
    fact_model: FactModel,
) -> None:
    base, tokenizer = fact_model
    lora = get_peft_model(
        deepcopy(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    for other in (base, lora):
        for ask in (removal_ladder, mean_gates):
            with pytest.raises(TypeError, match="has none; load one"):
                ask(other, tokenizer, CASE)
        assert (
            METRICS["redundancy"](other, tokenizer, CASE, RAW)
            == METRICS["gates"](other, tokenizer, CASE, RAW)
            == {}
        )
    reft = random_model(base, weighting="none")
    with pytest.raises(ValueError, match="no gates"):
        mean_gates(reft, tokenizer, CASE)
    assert METRICS["gates"](reft, tokenizer, CASE, RAW) == {}
    assert len(METRICS["redundancy"](reft, tokenizer, CASE, RAW)["kept"]) == 5
    assert METRICS["gates"](random_model(base), tokenizer, CASE, RAW)["gates"]["blocks"]


def test_one_adapter_at_a_time(fact_model: FactModel) -> None:
    base, tokenizer = fact_model
    model = random_model(base)
    model.add_adapter("other", BaftConfig(task_type="CAUSAL_LM", r=2, layers_to_transform=[2]))
    assert len(removal_ladder(model, tokenizer, CASE)) == 5  # the other one is not active
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\]; use set_adapter"):
        removal_ladder(model, tokenizer, CASE)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"not \[\]"):
        mean_gates(model, tokenizer, CASE)
