"""Defaults, spelled out: they are the paper's (Table 5), and a saved result means something only while they stay."""

from __future__ import annotations

from dataclasses import asdict

import pytest

import facts
from facts import FactModel, adapted
from peft_baft import PRESETS, AdapterEditor, BaftEditor, DescentConfig, Objective

fact_model = facts.fact_model

# α, β, γ of Table 5
TABLE_5 = {
    "llama-2-7b": (0.01, 0.05, 0.02),
    "llama-3-8b": (0.01, 0.1, 0.05),
    "gemma-7b": (0.01, 0.1, 0.05),
}


def test_the_defaults_of_the_objective() -> None:
    assert asdict(Objective()) == {
        "alpha": 0.01,
        "beta": 0.05,
        "gamma": 0.02,
        "balance": 1.0,
        "locality": 1.0,
        "balance_ceiling": 1.0,
        "locality_ceiling": 10.0,
    }


def test_the_default_margins_are_the_papers_for_llama_2() -> None:
    objective = Objective()
    assert (objective.alpha, objective.beta, objective.gamma) == TABLE_5["llama-2-7b"]


def test_the_defaults_of_the_descent() -> None:
    expected = {
        "lr": 2e-3,
        "max_steps": 40,
        "stop_loss": 0.01,
        "weight_decay": 0.01,
        "clip_norm": None,
        "learn_end": False,
    }
    assert asdict(DescentConfig()) == expected


def test_the_default_preset() -> None:
    preset = PRESETS["default"]
    assert (
        preset.config == {}
        and preset.objective == Objective()
        and preset.descent == DescentConfig()
    )
    assert preset.batch_descent == DescentConfig(max_steps=70)


def test_the_papers_models_are_all_there() -> None:
    assert set(PRESETS) == {"default", *TABLE_5}


@pytest.mark.parametrize("name", TABLE_5)
def test_the_papers_presets(name: str) -> None:
    preset = PRESETS[name]
    assert (preset.objective.alpha, preset.objective.beta, preset.objective.gamma) == TABLE_5[name]
    # And nothing else differs from the defaults.
    assert preset.objective == Objective(*TABLE_5[name])
    assert preset.config == {"r": 12, "prompt_positions": 3, "layers_to_transform": [8, 17, 23, 27]}
    assert asdict(preset.descent) == asdict(DescentConfig(lr=5e-4, max_steps=40, stop_loss=0.01))
    assert asdict(preset.batch_descent) == asdict(
        DescentConfig(lr=1e-4, max_steps=70, stop_loss=0.01)
    )


def test_an_editor_takes_these_for_one_fact_and_for_a_batch(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    for editor in (
        AdapterEditor(model, fact_model.tokenizer),
        BaftEditor(model, fact_model.tokenizer),
    ):
        assert editor.descent == DescentConfig(max_steps=40)
        assert editor.batch_descent == DescentConfig(max_steps=70)
