"""Adapters that are combined into one do exactly what they do together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from conftest import make_model, randomise
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft.intervention import orthonormal_rows

RANKS = {"one": 3, "two": 5, "three": 2}
SETTINGS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "gate_offset": 0.0,
    "layers_to_transform": [1, 3],
}
IDS = torch.tensor([[5, 9, 3, 8, 20, 11], [7, 30, 2, 2, 41, 6]])


def adapted(**more: Any) -> Any:
    """A tiny model with three adapters of different ranks, none of which does nothing."""
    first, *others = RANKS
    model = get_peft_model(
        make_model("llama"), BaftConfig(r=RANKS[first], **SETTINGS, **more), first
    )
    for name in others:
        model.add_adapter(name, BaftConfig(r=RANKS[name], **SETTINGS, **more))
    randomise(model, 0.5)
    for layer in baft_layers(model):
        for number, name in enumerate(layer.baft_gate_usage):
            layer.baft_gate_usage[name].uniform_(1, 3 + number)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, prompt_lengths=[4, 3]).logits


@pytest.mark.parametrize(
    "more",
    [{}, {"weighting": "none"}, {"gate_norm": "none", "gate_bias": True}],
    ids=["basis", "none", "bias"],
)
def test_a_combination_does_what_its_parts_do_together(more: dict[str, Any]) -> None:
    model = adapted(**more)
    model.base_model.set_adapter(list(RANKS))
    together = logits(model)
    model.add_weighted_adapter(list(RANKS), [1.0, 1.0, 1.0], "all")
    assert list(model.base_model.active_adapters) == list(RANKS)  # it is not made active
    torch.testing.assert_close(logits(model), together)
    model.set_adapter("all")
    torch.testing.assert_close(logits(model), together, atol=1e-5, rtol=1e-4)
    assert model.peft_config["all"].r == 10 and model.peft_config["all"].pack_ranks == [3, 5, 2]
    # The control: rows that are made orthonormal across the parts are not the parts' rows.
    for layer in baft_layers(model):
        basis: Any = layer.baft_basis["all"]
        rows = basis()
        assert not torch.allclose(rows @ rows.T, torch.eye(10), atol=1e-3)
        basis.weight.data = orthonormal_rows(rows)
        basis.pack_ranks = None
    assert (logits(model) - together).abs().max() > 1e-3


def test_weights_scale_what_each_part_does() -> None:
    model = adapted()
    model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "first")
    model.set_adapter("first")
    found = logits(model)
    model.set_adapter("one")
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-4)
    model.add_weighted_adapter(["one", "two"], [2.0, 0.5], "scaled")
    with torch.no_grad():
        for layer in baft_layers(model):
            for name, weight in (("one", 2.0), ("two", 0.5)):
                source: Any = layer.baft_source[name]
                source.weight *= weight
                source.bias *= weight
    model.base_model.set_adapter(["one", "two"])
    expected = logits(model)
    model.set_adapter("scaled")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_a_combination_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    model = adapted()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "pair")
    # Combinations of combinations keep the parts apart.
    model.add_weighted_adapter(["pair", "three"], [1.0, 1.0], "all")
    model.base_model.set_adapter(list(RANKS))
    expected = logits(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["all"])
    loaded: Any = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "all")).eval()
    assert loaded.peft_config["default"].pack_ranks == [3, 5, 2]
    assert loaded.peft_config["default"].baft_format == 2
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)
    # Rows of a mixed batch, among them two of combinations, which are computed together.
    model.add_weighted_adapter(["two", "three", "one"], [1.0, 1.0, 1.0], "again")
    model.add_weighted_adapter(list(RANKS), [1.0, 1.0, 1.0], "other")
    with torch.no_grad():
        mixed = model(input_ids=IDS, prompt_lengths=[4, 3], adapter_names=["all", "other"]).logits
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)
    # It can be trained: every part's rows get a gradient and stay orthonormal within the part.
    loaded.peft_config["default"].inference_mode = False
    loaded.base_model.set_requires_grad("default", True)
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    for layer in baft_layers(loaded):
        basis: Any = layer.baft_basis["default"]
        assert basis.weight.grad.abs().amax(1).min() > 0
        for rows in basis().split([3, 5, 2]):
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)


def test_each_gate_keeps_its_mean_use() -> None:
    model = adapted()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "pair")
    for layer in baft_layers(model):
        one, two, pair = (layer.baft_gate_usage[name] for name in ("one", "two", "pair"))
        assert pair[-1] == one[-1] + two[-1]
        torch.testing.assert_close(
            pair[:-1] / pair[-1], torch.cat([one[:-1] / one[-1], two[:-1] / two[-1]])
        )


def test_what_cannot_be_combined_is_refused_and_nothing_changes() -> None:
    model = adapted()
    model.add_adapter("wider", BaftConfig(r=2, **(SETTINGS | {"prompt_positions": 5})))
    model.add_adapter("elsewhere", BaftConfig(r=2, **(SETTINGS | {"layers_to_transform": [0]})))
    before = set(model.peft_config)
    for adapters, weights, name, error in (
        (["one", "wider"], [1.0, 1.0], "new", "agree in prompt_positions"),
        (["one", "elsewhere"], [1.0, 1.0], "new", "the same blocks"),
        (["one", "nobody"], [1.0, 1.0], "new", "Wanted adapters of the model"),
        (["one", "two"], [1.0, 1.0], "three", "Wanted adapters of the model"),
        (["one", "two"], [1.0, 1.0], "half", "choose another"),
        (["one", "two"], [1.0], "new", "a finite weight for each of 2"),
        (["one", "two"], [1.0, float("nan")], "new", "a finite weight"),
    ):
        with pytest.raises(ValueError, match=error):
            model.add_weighted_adapter(adapters, weights, name)
        assert set(model.peft_config) == before
    with pytest.raises(NotImplementedError, match="combination_type='cat' only"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "new", "linear")
    for kind in ({"weighting": "subspace"}, {"gate_norm": "scale"}):
        other = adapted(**kind)
        with pytest.raises(ValueError, match="cannot be combined"):
            other.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new")


def test_a_config_with_ranks_that_do_not_fit_is_refused() -> None:
    wrong: list[Any] = [([1, 2], ValueError), ([3, 0], ValueError), (["3"], TypeError)]
    for ranks, error in wrong:
        with pytest.raises(error, match="pack_ranks"):
            BaftConfig(r=4, pack_ranks=ranks)
    with pytest.raises(ValueError, match="baft_format 2"):
        BaftConfig(r=4, pack_ranks=[2, 2], baft_format=1)
    with pytest.raises(ValueError, match="weighting 'basis' or 'none'"):
        BaftConfig(r=4, pack_ranks=[2, 2], weighting="subspace")
