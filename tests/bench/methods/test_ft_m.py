"""Fine-tuning one MLP down projection: the first of the baselines."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import facts
from facts import DESCENT, FactModel, edits
from peft_baft import DescentConfig
from peft_baft_bench.methods.ft_m import FineTuning, FineTuningEditor

fact_model = facts.fact_model


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fine_tuning_changes_one_down_projection_alone(toy: FactModel) -> None:
    editor = FineTuning(descent=DESCENT).start(toy.base, toy.tokenizer)
    before = weights(toy.base)
    editor.edit(edits(0, 3))
    changed = [
        key for key, tensor in toy.base.state_dict().items() if not torch.equal(tensor, before[key])
    ]
    assert changed == ["model.layers.3.mlp.down_proj.weight"]  # EasyEdit's 21 of 32 is 3 of 4


def test_fine_tuning_minimises_the_mean_loss_of_the_answer_tokens(toy: FactModel) -> None:
    just_look = FineTuning(descent=DescentConfig(stop_loss=1e9))
    batch = facts.collate([facts.encode(toy.tokenizer, e.prompt, e.target) for e in edits(0, 3)], 0)
    with torch.no_grad():
        expected = toy.base(**batch).loss.item()
    result = just_look.start(toy.base, toy.tokenizer).edit(edits(0, 3))
    assert (
        result.losses["teacher_forcing"] == pytest.approx(expected, rel=1e-5) and result.steps == 0
    )


def test_ft_l_predicts_every_answer_token_from_the_last_prompt_token(toy: FactModel) -> None:
    settings = FineTuning(objective="last_prompt_token", descent=DescentConfig(stop_loss=1e9))
    rows = [facts.encode(toy.tokenizer, e.prompt, e.target) for e in edits(0, 3)]
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = toy.base(torch.tensor([row.ids[: row.prompt_length]])).logits[0, -1]
        expected += [
            -logits.log_softmax(-1)[token].item() for token in row.ids[row.prompt_length :]
        ]
    assert len(expected) == 3  # an answer of one token, and one of two
    result = settings.start(toy.base, toy.tokenizer).edit(edits(0, 3))
    assert result.losses["teacher_forcing"] == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_ft_l_cannot_learn_an_answer_of_two_tokens_and_ft_m_can(toy: FactModel) -> None:
    for objective, learned in (("last_prompt_token", False), ("answer", True)):
        editor = FineTuning(objective=objective, descent=DESCENT).start(toy.base, toy.tokenizer)
        assert editor.edit(edits(3)).learned is learned
        editor.remove()
    with pytest.raises(ValueError, match="objective must be one of answer, last_prompt_token"):
        FineTuning(objective="all")


def test_fine_tuning_that_diverges_leaves_the_weight_as_it_was(toy: FactModel) -> None:
    editor = FineTuning(descent=DescentConfig(lr=1e30, stop_loss=0.0)).start(
        toy.base, toy.tokenizer
    )
    before = weights(toy.base)
    with pytest.raises(FloatingPointError):
        editor.edit(edits(0))
    assert all(torch.equal(tensor, before[key]) for key, tensor in toy.base.state_dict().items())
    assert all(p.grad is None for p in toy.base.parameters())


def test_fine_tuning_refuses_a_block_that_is_not_there(toy: FactModel) -> None:
    for layer in (True, 1.5, "last"):
        with pytest.raises(TypeError, match=f"layer must be an integer, not {layer!r}"):
            FineTuning(layer=layer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a block of the model, 0 to 3, not 7"):
        FineTuningEditor(toy.base, toy.tokenizer, FineTuning(layer=7))
    toy.base.model.layers[2].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"must have one down projection.* but has none"):
        FineTuningEditor(toy.base, toy.tokenizer, FineTuning(layer=2))


def test_fine_tuning_refuses_several_experts_and_quantised_weights(toy: FactModel) -> None:
    mlp = toy.base.model.layers[1].mlp
    mlp.expert = deepcopy(mlp)
    with pytest.raises(ValueError, match=r"several \(mlp.down_proj, mlp.expert.down_proj\)"):
        FineTuningEditor(toy.base, toy.tokenizer, FineTuning(layer=1))
    of_block = toy.base.model.layers[0].mlp.down_proj
    of_block.weight = torch.nn.Parameter(of_block.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"is torch.int8: load the model without quantisation"):
        FineTuningEditor(toy.base, toy.tokenizer, FineTuning(layer=0))
