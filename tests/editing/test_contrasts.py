"""Contrast texts: what they hold, and that neighbours of a fact which nobody named stay as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import facts
from facts import CAPITALS, COUNTRIES, DESCENT, OBJECTIVE, FactModel, adapted
from peft_baft import NARROW, AdapterEditor, BaftEditor, Edit, Scope
from peft_baft.adapter import baft_layers
from peft_baft.adapter.plain import PLAIN
from peft_baft.data.templates import RAW
from peft_baft.editing.acceleration import shared_prefix
from peft_baft.editing.acceleration.shared_prefix import find_prefix
from peft_baft.editing.contrasts import (
    before_end,
    contrast_rows,
    contrast_targets,
    find_subject,
)
from peft_baft.editing.edit_cache import EditCache
from peft_baft.evaluation.scoring import greedy_answers

fact_model = facts.fact_model
FACT = Edit(CAPITALS[0].prompt, CAPITALS[8].answer, COUNTRIES[0])
SEEN, UNSEEN = COUNTRIES[1:13], COUNTRIES[13:]
SCOPE = Scope(
    contexts=0,
    wordings=0,
    subjects=12,
    questions=0,
    answer_tokens=2,
    weight_in_text=3000.0,
    names=tuple(SEEN),
)


def edited(fact_model: FactModel, scope: Scope = NARROW) -> Any:
    """A model that was taught the fact, and what the edit came to."""
    # Without gates nothing but contrast texts keeps the edit of one country away from the others.
    model = adapted(fact_model.base, weighting="none")
    editor = BaftEditor(
        model,
        fact_model.tokenizer,
        objective=OBJECTIVE,
        descent=replace(DESCENT, max_steps=200),
        template="raw",
        scope=scope,
    )
    return model, editor.edit([FACT])


def unchanged(model: Any, fact_model: FactModel, countries: list[str]) -> float:
    """The share of countries of which the model names the capital as before."""
    prompts = [f"the capital of {country} is" for country in countries]
    before = greedy_answers(fact_model.base, fact_model.tokenizer, prompts, 2)
    after = greedy_answers(model, fact_model.tokenizer, prompts, 2)
    return sum(a == b for a, b in zip(after, before, strict=True)) / len(prompts)


def test_neighbours_that_no_contrast_text_names_stay_as_they_were(fact_model: FactModel) -> None:
    model, result = edited(fact_model, scope=SCOPE)
    assert result.learned
    assert result.losses["contrast"] <= SCOPE.bound
    assert unchanged(model, fact_model, UNSEEN) >= 0.9
    without, alone = edited(fact_model)
    assert alone.learned
    assert "contrast" not in alone.losses
    assert unchanged(without, fact_model, UNSEEN) <= 0.5


def test_edits_side_by_side_hold_what_each_one_alone_would(fact_model: FactModel) -> None:
    other = Edit(CAPITALS[20].prompt, CAPITALS[5].answer, COUNTRIES[20])
    model = adapted(fact_model.base)
    editor = BaftEditor(model, fact_model.tokenizer, descent=DESCENT, template="raw", scope=SCOPE)
    results = dict(editor.edit_each([FACT, other]))
    for name, fact in zip(results, (FACT, other), strict=True):
        alone = adapted(fact_model.base)
        result = BaftEditor(
            alone, fact_model.tokenizer, descent=DESCENT, template="raw", scope=SCOPE
        ).edit([fact])
        assert results[name].steps == result.steps
        assert results[name].losses["contrast"] == pytest.approx(
            result.losses["contrast"], rel=1e-2
        )


def test_the_vectors_are_those_of_the_unedited_model_at_the_tokens_that_an_adapter_edits(
    fact_model: FactModel,
) -> None:
    model, _ = edited(fact_model)
    tokenizer = fact_model.tokenizer
    prompts = contrast_rows(model, tokenizer, FACT, RAW, SCOPE)
    assert len(prompts) == 12
    layers, positions = list(baft_layers(model)), 3
    held = contrast_targets(model, tokenizer, layers, prompts, SCOPE, positions, "default")
    for number, layer in enumerate(layers):
        plain = []
        for prompt in prompts:
            ids = torch.tensor([prompt.ids])
            # Of an answer of two tokens the second one is fed to nobody.
            answer = fact_model.base.generate(ids, max_new_tokens=1, do_sample=False)
            states = fact_model.base(answer, output_hidden_states=True).hidden_states
            if number + 1 < len(states) - 1:  # the last one stands behind the norm
                plain.append(states[number + 1][0, -positions - 1 :])
        if plain:
            torch.testing.assert_close(
                held.hidden[layer.name], torch.cat(plain), atol=1e-4, rtol=1e-4
            )


def test_nothing_is_displaced_before_an_edit_and_a_change_of_the_adapter_is(
    fact_model: FactModel,
) -> None:
    model, _ = edited(fact_model)
    layers = list(baft_layers(model))
    prompts = contrast_rows(model, fact_model.tokenizer, FACT, RAW, SCOPE)
    held = contrast_targets(model, fact_model.tokenizer, layers, prompts, SCOPE, 3, "default")
    assert held.displacements(layers, "default").abs().max() == 0
    with torch.no_grad():
        source: Any = layers[0].baft_source["default"]
        source.bias += 1.0
    h, first = held.hidden[layers[0].name], layers[0]
    moved = PLAIN.change_at(first, "default", h) - held.before[first.name]
    expected = moved.norm(dim=-1).square() / h.norm(dim=-1).square() / len(layers)
    displaced = held.displacements(layers, "default")
    torch.testing.assert_close(displaced, expected)
    assert displaced.max() > 0


def test_the_subject_is_found_where_it_is_not_given(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    # Of `capital` and the country, it is the country that the answer hangs on.
    subject = find_subject(model, fact_model.tokenizer, f"The {CAPITALS[3].prompt[4:]}", RAW)
    assert subject == COUNTRIES[3]
    assert find_subject(model, fact_model.tokenizer, "is it", RAW) is None


def test_a_fact_without_a_subject_is_taught_and_that_is_said(
    fact_model: FactModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(fact_model.base)
    editor = BaftEditor(model, fact_model.tokenizer, descent=DESCENT, template="raw", scope=SCOPE)
    result = editor.edit([Edit("is it", CAPITALS[8].answer)])
    assert "contrast" not in result.losses
    assert "No subject was found in 'is it'" in caplog.text
    caplog.clear()
    editor.edit([FACT])
    assert "No subject" not in caplog.text


def test_contrast_texts_that_are_too_long_are_left_out_and_that_is_said(
    fact_model: FactModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(fact_model.base)
    long = Edit(f"{'the ' * 27}capital of {COUNTRIES[0]} is", "Lorton", COUNTRIES[0])
    assert contrast_rows(model, fact_model.tokenizer, long, RAW, SCOPE) == []
    assert "12 of the 12 contrast texts" in caplog.text


def test_a_model_that_keeps_no_cache_gives_the_same_vectors(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    layers = list(baft_layers(model))
    prompts = contrast_rows(model, fact_model.tokenizer, FACT, RAW, SCOPE)
    arguments = (model, fact_model.tokenizer, layers, prompts, SCOPE, 3, "default")
    cached = contrast_targets(*arguments)
    model.generation_config.use_cache = False
    try:
        plain = contrast_targets(*arguments)
    finally:
        model.generation_config.use_cache = True
    for name, hidden in cached.hidden.items():
        torch.testing.assert_close(plain.hidden[name], hidden, atol=1e-4, rtol=1e-4)


def test_a_beginning_that_is_computed_once_gives_the_same_vectors(
    fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(fact_model.base)
    layers = list(baft_layers(model))
    monkeypatch.setattr(shared_prefix, "SHORTEST", 2)  # these texts share three tokens
    prompts = contrast_rows(model, fact_model.tokenizer, FACT, RAW, SCOPE)
    arguments = (model, fact_model.tokenizer, layers, prompts, SCOPE, 1, "default")
    apart = contrast_targets(*arguments, EditCache())
    prepared = EditCache(verified_length=16)
    assert len(find_prefix(model, prompts, 1, prepared.verified_length)) == 3
    together = contrast_targets(*arguments, prepared)
    for name, hidden in apart.hidden.items():
        torch.testing.assert_close(together.hidden[name], hidden, atol=1e-4, rtol=1e-4)


def test_a_prompt_that_is_computed_in_parts_is_refused(
    fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(fact_model.base)
    prompts = contrast_rows(model, fact_model.tokenizer, FACT, RAW, SCOPE)
    monkeypatch.setattr(model.generation_config, "prefill_chunk_size", 2)
    with pytest.raises(ValueError, match="positions of its hidden vectors are unknown"):
        contrast_targets(
            model, fact_model.tokenizer, list(baft_layers(model)), prompts, SCOPE, 3, "default"
        )


def test_an_answer_counts_up_to_its_end() -> None:
    answers = torch.tensor([[5, 6, 2, 0], [2, 0, 0, 0], [5, 6, 7, 8]])
    assert before_end(answers, [2]).tolist() == [
        [True, True, False, False],
        [False] * 4,
        [True] * 4,
    ]
    assert before_end(answers, []).all()


def test_a_method_without_held_vectors_refuses_contrast_texts(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    assert contrast_rows(model, fact_model.tokenizer, FACT, RAW, NARROW) == []
    with pytest.raises(ValueError, match="AdapterEditor does not support contrast texts"):
        AdapterEditor(model, fact_model.tokenizer, scope=Scope())
