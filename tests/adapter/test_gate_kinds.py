"""A new kind of gate is one entry in the tables of `adapter/parameters.py`: everything else asks these."""

# mypy: disable-error-code="arg-type, attr-defined, var-annotated"
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from adapters import config, logits
from conftest import make_model, randomise
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft.adapter.parameters import GATE_NORMS, WEIGHTINGS, Gate, GateNorm, Weighting
from peft_baft.adapter.plain import PLAIN

SETTINGS: dict[str, Any] = {"gate_norm": "squashed", "weighting": "pairs", "gate_bias": True}
USE = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.fixture
def new_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate norm with two learned vectors, and a weighting whose gates are multiplied by a shared one."""
    squashed = GateNorm(
        lambda h, slope, middle: torch.tanh(h * slope - middle), {"slope": 0.5, "middle": 0.1}
    )
    monkeypatch.setitem(GATE_NORMS, "squashed", squashed)
    monkeypatch.setitem(
        WEIGHTINGS, "pairs", Weighting(gate_count=lambda r: r, has_shared_gate=True)
    )


def trained(model: PeftModel, ids: torch.Tensor) -> PeftModel:
    """Train one step, so that no learned vector is what it was at the start."""
    randomise(model)
    model.train()
    model(ids, labels=ids).loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters
    )
    torch.optim.SGD(parameters, lr=1.0).step()
    return model.eval()


def test_a_new_kind_is_trained_saved_and_loaded(new_kinds, tokens, tmp_path: Path) -> None:
    model = trained(get_peft_model(make_model(), config(**SETTINGS)), tokens)
    gate = baft_layers(model)[0].baft_gate["default"]
    assert not torch.equal(gate.slope, torch.full((32,), 0.5)) and gate.weight.shape == (5, 32)
    for layer in baft_layers(model):
        layer.baft_gate_usage["default"].copy_(USE)
    model.save_pretrained(str(tmp_path))
    names = {
        name.rpartition(".baft.baft_")[2]
        for name in load_file(tmp_path / "adapter_model.safetensors")
    }
    of_gates = {"gate.weight", "gate.bias", "gate.slope", "gate.middle", "gate_usage"}
    assert names == of_gates | {"basis.weight", "source.weight", "source.bias"}
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert all(torch.equal(layer.baft_gate_usage["default"], USE) for layer in baft_layers(loaded))
    gate.slope.data.zero_()  # the control: the learned vector matters
    assert not torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_adapters_of_a_new_kind_are_computed_side_by_side(new_kinds, tokens, monkeypatch) -> None:
    model = trained(get_peft_model(make_model(), config(**SETTINGS)), tokens)
    model.add_adapter("second", config(**SETTINGS))
    model.set_adapter("second")
    trained(model, tokens.flip(1))
    alone = []
    for name, row in zip(("default", "second"), tokens, strict=True):
        model.set_adapter(name)
        alone.append(logits(model, row[None]))
    stacked: list[torch.Tensor] = []
    monkeypatch.setattr(PLAIN, "_update_stacked", _noted(PLAIN._update_stacked, stacked))
    with torch.no_grad():
        together = model(tokens, adapter_names=["default", "second"]).logits
        assert len(stacked) == len(baft_layers(model))
        model.peft_config[
            "second"
        ].gate_norm = "rms"  # the control: of different kinds, each is computed alone
        model(tokens, adapter_names=["default", "second"])
        assert len(stacked) == len(baft_layers(model))
    torch.testing.assert_close(together, torch.cat(alone))


def _noted(function: Any, calls: list[Any]) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return called


def test_a_file_that_lacks_a_learned_vector_of_a_new_kind_is_refused(
    new_kinds, tmp_path: Path, monkeypatch
) -> None:
    get_peft_model(make_model(), config(**SETTINGS)).save_pretrained(str(tmp_path))
    PeftModel.from_pretrained(make_model(), tmp_path)
    three = GateNorm(lambda h, slope, middle, third: h, {"slope": 0.5, "middle": 0.1, "third": 0.0})
    monkeypatch.setitem(GATE_NORMS, "squashed", three)
    with pytest.raises(ValueError, match=r"gate.third is missing"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_a_name_of_a_learned_vector_is_none_of_an_adapter(new_kinds) -> None:
    with pytest.raises(ValueError, match="'slope' also names a part of the model"):
        get_peft_model(make_model(), config(**SETTINGS), adapter_name="slope")


def test_without_its_entry_the_kind_is_unknown() -> None:
    with pytest.raises(
        ValueError,
        match="gate_norm must be one of 'none', 'rms', 'scale', 'center', not 'squashed'",
    ):
        BaftConfig(gate_norm="squashed")
    with pytest.raises(
        ValueError,
        match="weighting must be one of 'basis', 'subspace', 'product', 'none', not 'pairs'",
    ):
        BaftConfig(weighting="pairs")


SEEN = {
    "none": lambda h, v: h,
    "rms": lambda h, v: h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    "scale": lambda h, v: h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * v,
    "center": lambda h, v: h - v,
}


@pytest.mark.parametrize("norm", SEEN)
def test_a_gate_sees_what_its_kind_says_and_starts_with_h_itself(norm: str) -> None:
    torch.manual_seed(0)
    gate = Gate(config(gate_norm=norm, gate_offset=0.5), 8)
    h, start = torch.randn(3, 8), {"scale": 1.0, "center": 0.0}
    learned = [getattr(gate, name) for name in start if hasattr(gate, name)]
    assert [name for name in start if hasattr(gate, name)] == [norm] * (norm in start)
    for vector in learned:
        assert (vector == start[norm]).all()
        torch.nn.init.uniform_(vector, 0.5, 2.0)
    seen = SEEN[norm](h, learned[0] if learned else None)
    torch.testing.assert_close(gate(h), (seen @ gate.weight.T + 0.5).sigmoid())


def test_fresh_gates_differ_a_little_from_each_other() -> None:
    torch.manual_seed(0)
    h = torch.nn.functional.normalize(torch.randn(64, 512)) * 512**0.5  # of unit root mean square
    logits_of_gates = h @ Gate(config(r=64), 512).weight.T
    assert logits_of_gates.std().item() == pytest.approx(0.1, rel=0.1)
