"""Defaults, spelled out: they are the paper's (Table 5), and a saved result means something only while they stay."""

from __future__ import annotations

from dataclasses import asdict

import pytest

import facts
from facts import FactModel, adapted
from peft_baft import (
    NARROW,
    PRESETS,
    AdapterEditor,
    BaftEditor,
    DescentConfig,
    Objective,
    Preset,
    Scope,
)

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


def test_the_plain_preset_trains_as_the_paper() -> None:
    preset = PRESETS["plain"]
    assert preset == Preset(
        config={},
        objective=Objective(),
        descent=DescentConfig(),
        batch_descent=DescentConfig(max_steps=70),
        scope=NARROW,
    )


def test_the_default_preset() -> None:
    preset = PRESETS["default"]
    assert preset.config == {}
    assert preset.objective == Objective()
    assert preset.descent == DescentConfig(lr=8e-3, max_steps=60, learn_end=True)
    assert preset.batch_descent == DescentConfig(lr=8e-3, max_steps=70, learn_end=True)
    assert preset.scope == Scope(
        contexts=6,
        wordings=2,
        subjects=20,
        questions=4,
        answer_tokens=8,
        weight=1e3,
        weight_in_text=300.0,
        bound=0.05,
    )


def test_the_papers_models_are_all_there() -> None:
    assert set(PRESETS) == {"default", "plain", *TABLE_5}


@pytest.mark.parametrize("name", TABLE_5)
def test_the_papers_presets(name: str) -> None:
    preset = PRESETS[name]
    assert (preset.objective.alpha, preset.objective.beta, preset.objective.gamma) == TABLE_5[name]
    # And nothing else differs from the defaults.
    assert preset.objective == Objective(*TABLE_5[name])
    assert preset.scope == NARROW
    assert preset.config == {"r": 12, "prompt_positions": 3, "layers_to_transform": [8, 17, 23, 27]}
    assert asdict(preset.descent) == asdict(DescentConfig(lr=5e-4, max_steps=40, stop_loss=0.01))
    assert asdict(preset.batch_descent) == asdict(
        DescentConfig(lr=1e-4, max_steps=70, stop_loss=0.01)
    )


def test_a_baft_editor_takes_the_default_preset_and_any_other_method_the_plain_one(
    fact_model: FactModel,
) -> None:
    model = adapted(fact_model.base)
    plain = AdapterEditor(model, fact_model.tokenizer)
    assert plain.descent == DescentConfig(max_steps=40)
    assert plain.batch_descent == DescentConfig(max_steps=70)
    assert plain.scope == NARROW
    editor, preset = BaftEditor(model, fact_model.tokenizer), PRESETS["default"]
    assert (editor.objective, editor.scope) == (preset.objective, preset.scope)
    assert (editor.descent, editor.batch_descent) == (preset.descent, preset.batch_descent)
