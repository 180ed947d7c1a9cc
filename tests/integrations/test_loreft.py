"""Interventions that pyreft saved do here what they did there, and ours can be written in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import facts
from conftest import WIDTH, make_model, randomise
from peft_baft import BaftConfig, BaftEditor, check
from peft_baft.adapter.model import baft_layers
from peft_baft.integrations.loreft import load_loreft, save_loreft

RANK, BLOCKS = 3, (1, 3)
IDS = torch.tensor([[5, 9, 3, 8, 20, 11, 4], [7, 30, 2, 2, 41, 6, 9]])
LENGTHS = [4, 5]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What pyreft keeps of one intervention."""
    generator = torch.Generator().manual_seed(seed)
    rotate = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator)).Q
    return {
        "weight": torch.randn(RANK, WIDTH, generator=generator).to(dtype),
        "bias": torch.randn(RANK, generator=generator).to(dtype),
        "rotate_layer": rotate,
    }


def folder_of(
    path: Path,
    kind: str = "LoreftIntervention",
    named: bool = False,
    by_path: bool = False,
    **of_tensors: Any,
) -> Path:
    """A folder in pyreft's layout, its interventions listed as tables or with names, at a block's number or path."""
    path.mkdir()
    listed: list[Any] = []
    for block in BLOCKS:
        component = f"model.layers[{block}].output" if by_path else "block_output"
        key = (
            f"comp_model_layers[{block}]_output" if by_path else f"layer_{block}_comp_block_output"
        )
        torch.save(tensors(block, **of_tensors), path / f"intkey_{key}_unit_pos_nunit_1#0.bin")
        settings = {
            "layer": block,
            "component": component,
            "unit": "pos",
            "max_number_of_units": 1,
            "low_rank_dimension": RANK,
        }
        listed.append(settings if named else [*settings.values(), None, None])
    kinds = [f"<class 'pyreft.interventions.{kind}'>"] * len(BLOCKS)
    (path / "config.json").write_text(
        json.dumps({"representations": listed, "intervention_types": kinds})
    )
    return path


def expected_logits(kind: str, positions: int, edits_answers: bool = False) -> Tensor:
    """The plain computation: hooks that change the last prompt tokens by the formula of the method."""
    model, handles = make_model(), []
    for block in BLOCKS:
        part = tensors(block)
        R = part["rotate_layer"].T

        def change(_m: Any, _a: Any, out: Any, part: Any = part, R: Tensor = R) -> Tensor:
            h = out.clone()
            for row, length in enumerate(LENGTHS):
                for i in range(length - positions, h.shape[1] if edits_answers else length):
                    shift = part["weight"] @ h[row, i] + part["bias"]
                    if kind == "LoreftIntervention":
                        shift = shift - R @ h[row, i]
                    h[row, i] = h[row, i] + R.T @ shift
            return h

        handles.append(model.model.layers[block].register_forward_hook(change))
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, prompt_lengths=LENGTHS).logits


@pytest.mark.parametrize("kind", ["LoreftIntervention", "DireftIntervention"])
@pytest.mark.parametrize("layout", [{}, {"named": True}, {"by_path": True}], ids=str)
def test_an_imported_folder_does_what_its_formula_says(
    tmp_path: Path, kind: str, layout: dict[str, bool]
) -> None:
    model = load_loreft(
        make_model(), folder_of(tmp_path / "reft", kind, **layout), prompt_positions=2
    )
    expected = expected_logits(kind, 2)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    # The controls: another number of tokens, and answers as well, are something else.
    assert not torch.allclose(expected_logits(kind, 1), expected, atol=1e-2)
    assert not torch.allclose(expected_logits(kind, 2, edits_answers=True), expected, atol=1e-2)


def test_answers_are_edited_where_that_is_wanted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "reft")
    model = load_loreft(make_model(), folder, prompt_positions=2, answer_positions=None)
    expected = expected_logits("LoreftIntervention", 2, edits_answers=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_generation_goes_on_from_an_edited_prompt_as_a_forward_does(tmp_path: Path) -> None:
    model = load_loreft(make_model(), folder_of(tmp_path / "reft"), prompt_positions=2)
    prompt = IDS[:1, :5]
    out = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        again = model(input_ids=out, prompt_lengths=[5]).logits[:, 4:-1].argmax(-1)
        # The control: with edited answers it would go on otherwise.
        config: Any = model.peft_config["default"]
        config.answer_positions = None
        otherwise = model(input_ids=out, prompt_lengths=[5]).logits[:, 4:-1].argmax(-1)
    assert torch.equal(out[:, 5:], again) and not torch.equal(again, otherwise)


def test_an_imported_adapter_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    model = load_loreft(make_model(), folder_of(tmp_path / "reft"), prompt_positions=2)
    model.save_pretrained(str(tmp_path / "ours"))
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "ours"))
    config: Any = loaded.peft_config["default"]
    assert config.answer_positions == 0
    assert torch.equal(logits(loaded), logits(model))
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["baft_format"] == 2  # versions that do not know `answer_positions` refuse it


def test_a_basis_in_bfloat16_is_taken_as_the_nearest_orthonormal_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "reft")
    exact = logits(load_loreft(make_model(), folder, prompt_positions=2))
    for file in folder.glob("*.bin"):
        torch.save({k: v.bfloat16() for k, v in torch.load(file).items()}, file)
    rounded = load_loreft(make_model(), folder, prompt_positions=2)
    assert (logits(rounded) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("layers", [list(BLOCKS), [0]], ids=str)
def test_what_is_written_for_pyreft_comes_back_as_it_was(tmp_path: Path, layers: list[int]) -> None:
    config = BaftConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        prompt_positions=2,
        weighting="none",
        layers_to_transform=layers,
    )
    model = get_peft_model(make_model(), config)
    randomise(model)
    save_loreft(model, tmp_path / "reft")
    back = load_loreft(make_model(), tmp_path / "reft", prompt_positions=2, answer_positions=None)
    torch.testing.assert_close(logits(back), logits(model), atol=1e-4, rtol=1e-4)
    assert len(list((tmp_path / "reft").glob("intkey_*.bin"))) == len(layers)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "neither gates"),
        ({"weighting": "none", "target_modules": r".*layers\.1\.mlp"}, "not a numbered block"),
    ],
    ids=["gates", "another module"],
)
def test_what_pyreft_does_not_have_is_not_written(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    model = get_peft_model(make_model(), BaftConfig(task_type="CAUSAL_LM", r=RANK, **config))
    with pytest.raises(ValueError, match=said):
        save_loreft(model, tmp_path / "reft")
    assert not (tmp_path / "reft").exists()


def changed_config(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def changed_tensors(folder: Path, **changes: Any) -> None:
    file = next(folder.glob("*.bin"))
    torch.save(torch.load(file) | changes, file)


class Code:
    """What runs as soon as a pickle that holds it is loaded."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


BROKEN = {
    "no folder": (lambda f: (f / "config.json").unlink(), "is not a folder that pyreft saved"),
    "no list": (lambda f: changed_config(f, representations=None), "must list"),
    "another kind": (
        lambda f: changed_config(
            f, intervention_types=["<class 'pyreft.interventions.NoreftIntervention'>"] * 2
        ),
        "NoreftIntervention.*supported",
    ),
    "two at one block": (
        lambda f: changed_config(f, representations=[[1, "block_output", "pos", 1]] * 2),
        "at most one at each block",
    ),
    "inside a block": (
        lambda f: changed_config(f, representations=[[b, "mlp_output", "pos", 1] for b in BLOCKS]),
        "mlp_output.*only the output of a block",
    ),
    "a block that is not there": (
        lambda f: changed_config(
            f, representations=[[b + 9, "block_output", "pos", 1] for b in BLOCKS]
        ),
        "cannot be read",
    ),
    "a missing file": (lambda f: next(f.glob("*.bin")).unlink(), "cannot be read"),
    "code": (lambda f: changed_tensors(f, weight=Code()), "cannot be read"),
    "another rank": (lambda f: changed_tensors(f, bias=torch.zeros(2)), "shapes"),
    "not a number": (
        lambda f: changed_tensors(f, bias=torch.full((RANK,), torch.nan)),
        "not finite",
    ),
    "no rotation": (
        lambda f: changed_tensors(f, rotate_layer=torch.ones(WIDTH, RANK)),
        "orthonormal",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_taken_is_refused_and_the_model_stays_as_it_was(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, model = folder_of(tmp_path / "reft"), make_model()
    breaks, said = BROKEN[name]
    breaks(folder)
    with pytest.raises(ValueError, match=said):
        load_loreft(model, folder, prompt_positions=2)
    assert not list(baft_layers(model)) and not hasattr(model, "peft_config")
    assert "ran" not in capfd.readouterr().out


def test_what_relies_on_edited_answers_refuses_an_adapter_that_leaves_them(tmp_path: Path) -> None:
    model = load_loreft(make_model(), folder_of(tmp_path / "reft"), prompt_positions=2)
    with pytest.raises(ValueError, match="answer_positions=None"):
        BaftEditor(model, facts.make_tokenizer(), template="raw")
    with pytest.raises(ValueError, match=r"answer_positions=0\. Check the base model"):
        check(model)


def test_a_model_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "reft")
    for file in folder.glob("*.bin"):
        part = torch.load(file)
        torch.save(
            {
                "weight": part["weight"][:, 1:],
                "bias": part["bias"],
                "rotate_layer": torch.eye(WIDTH - 1, RANK),
            },
            file,
        )
    with pytest.raises(ValueError, match=f"width {WIDTH - 1}.*has width {WIDTH}"):
        load_loreft(make_model(), folder, prompt_positions=2)
