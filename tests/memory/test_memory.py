"""The memory of edits: edits side by side come out as alone, a prompt without a route is untouched, a forgotten edit is gone."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import facts
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import DescentConfig, Edit
from peft_baft.data.cases import Message
from peft_baft.data.templates import CHAT
from peft_baft.editing.acceleration import cached_texts
from peft_baft.editing.method import EditorSetup
from peft_baft.evaluation.scoring import greedy_answers, token_match
from peft_baft.memory import codes
from peft_baft.memory.codes import orthonormal
from peft_baft.memory.editor import Memory, MemoryEditor
from peft_baft.memory.router import NONE
from peft_baft.memory.statistics import key_statistics

fact_model = facts.fact_model
SETTINGS = Memory(
    rank=48,
    key_dimensions=16,
    least_subject=0.8,
    strictness=0.9,
    descent=DescentConfig(lr=0.2, max_steps=60, stop_loss=0.05, weight_decay=0.0),
)


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, **settings: Any) -> MemoryEditor:
    return replace(SETTINGS, **settings).start(toy.base, toy.tokenizer, EditorSetup())


def logits(toy: FactModel, prompts: list[str]) -> list[Tensor]:
    with torch.no_grad():
        return [
            toy.base(torch.tensor([toy.tokenizer(prompt)["input_ids"]])).logits
            for prompt in prompts
        ]


def codes_of(editor: MemoryEditor) -> Tensor:
    """The codes of all edits, (edits, blocks, r)."""
    state = editor.state_dict()
    return state["codes"].float() * state["scales"][..., None]


def asked(*numbers: int) -> list[tuple[Any, str]]:
    return [(edit.prompt, edit.target) for edit in edits(*numbers)]


def test_a_basis_has_orthonormal_rows_and_is_the_same_each_time() -> None:
    rows = orthonormal(3, 8, 64)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(8))
    assert torch.equal(rows, orthonormal(3, 8, 64))
    assert not torch.allclose(rows, orthonormal(4, 8, 64))
    with pytest.raises(ValueError, match="at most the width of the model, 4, not 5"):
        orthonormal(0, 5, 4)


def test_edits_learned_side_by_side_come_out_as_alone(toy: FactModel) -> None:
    together = editor_of(toy)
    result = together.edit(edits(0, 5, 9, 12))
    assert result.learned and token_match(toy.base, toy.tokenizer, asked(0, 5, 9, 12)) == [1.0] * 4
    found = codes_of(together)
    together.remove()
    alone = editor_of(toy)
    for number in (0, 5, 9, 12):
        alone.edit(edits(number))
    torch.testing.assert_close(codes_of(alone), found, atol=3e-2, rtol=2e-2)
    alone.remove()


def test_a_cache_of_the_tokens_before_gives_what_whole_texts_give(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = editor_of(toy)
    steps = cached.edit(edits(0, 3)).steps
    found = codes_of(cached)
    cached.remove()

    def none(*_: object) -> None:
        raise NotImplementedError("keeps no cache")

    monkeypatch.setattr(cached_texts, "call_with_cache", none)
    plain = editor_of(toy)
    assert plain.edit(edits(0, 3)).steps == steps
    torch.testing.assert_close(codes_of(plain), found, atol=3e-2, rtol=2e-2)
    plain.remove()


def test_a_prompt_that_is_routed_nowhere_is_computed_bit_for_bit_as_before(toy: FactModel) -> None:
    prompts = [fact.prompt for fact in MEALS[:6]]
    before, said = logits(toy, prompts), greedy_answers(toy.base, toy.tokenizer, prompts)
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    assert [editor.matches(prompt).edit for prompt in prompts] == [NONE] * 6
    assert all(map(torch.equal, logits(toy, prompts), before))
    assert greedy_answers(toy.base, toy.tokenizer, prompts) == said
    # The control: edits in the same batch as such a prompt are answered, decoded from a cache too.
    mixed = [prompts[0], *(prompt for prompt, _ in asked(0, 5))]
    answers = greedy_answers(toy.base, toy.tokenizer, mixed)
    assert answers[0] == said[0]
    pairs = zip(answers[1:], asked(0, 5), strict=True)
    assert all(answer.startswith(target) for answer, (_, target) in pairs)
    editor.remove()
    assert all(map(torch.equal, logits(toy, prompts), before))


def test_a_forgotten_edit_is_gone_and_the_others_answer_bit_for_bit(toy: FactModel) -> None:
    editor = editor_of(toy)
    prompts = [str(edit.prompt) for edit in edits(0, 5, 9)]
    unedited = logits(toy, prompts)
    editor.edit(edits(0, 5, 9))
    edited = logits(toy, prompts)
    editor.forget(1)
    after = logits(toy, prompts)
    assert torch.equal(after[0], edited[0]) and torch.equal(after[2], edited[2])
    assert torch.equal(after[1], unedited[1]) and not torch.equal(edited[1], unedited[1])
    with pytest.raises(ValueError, match="edits 0 to 1, and none with the number 2"):
        editor.forget(2)
    # What is left is what those edits alone would have left.
    state = editor.state_dict()
    editor.remove()
    others = editor_of(toy)
    others.edit(edits(0, 9))
    same = others.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in ("states", "ids", "texts"))
    others.remove()


def test_an_edit_of_a_known_question_replaces_it(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    (first, _) = edits(0, 5)
    editor.edit([Edit(f" {first.prompt} ", "Kasburg")])
    assert len(editor.router.keys) == 2
    assert token_match(toy.base, toy.tokenizer, [(first.prompt, "Kasburg")]) == [1.0]
    assert token_match(toy.base, toy.tokenizer, asked(5)) == [1.0]
    editor.remove()


def test_a_rephrasing_finds_its_edit_and_another_country_does_not(toy: FactModel) -> None:
    editor = editor_of(toy, strictness=0.2, least_subject=0.2)
    editor.edit(edits(*range(12)))
    found = [editor.matches(fact.rephrase) for fact in CAPITALS[:12]]
    assert sum(match.best == number for number, match in enumerate(found)) >= 11
    match = editor.matches(CAPITALS[0].prompt)
    assert match.edit == match.best == 0 and match.runner_up != 0
    others = [editor.matches(fact.prompt) for fact in CAPITALS[12:]]
    edited = [editor.matches(fact.prompt) for fact in CAPITALS[:12]]
    assert max(match.subject for match in others) < min(match.subject for match in edited)
    editor.remove()


def test_an_edit_that_breaks_off_leaves_the_memory_as_it_was(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0))
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    losses, calls = codes.answer_losses, []

    def broken(*given: Any) -> Tensor:
        calls.append(given)
        return losses(*given) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(codes, "answer_losses", broken)
    with pytest.raises(FloatingPointError):
        editor.edit(edits(5))
    after = editor.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    editor.remove()


def test_keys_have_length_one_and_equal_spread(toy: FactModel) -> None:
    statistics = key_statistics(toy.base, toy.tokenizer, "model.layers.0", 16)
    keys = statistics.keys(torch.randn(5, 64))
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(5))
    assert statistics.whitening.shape == (64, 16) and statistics.count > 30
    again = key_statistics(toy.base, toy.tokenizer, "model.layers.0", 16)
    assert torch.equal(statistics.whitening, again.whitening)


def test_an_edit_takes_a_byte_a_number_and_few_more(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5, 9))
    state = editor.state_dict()
    assert state["codes"].dtype == state["states"].dtype == torch.int8
    bytes_an_edit = sum(tensor.nbytes for tensor in state.values()) / 3
    blocks, tokens = state["codes"].shape[1], len(state["ids"]) / 3
    # Codes with scales, keys with their ids, a length, and two short texts.
    assert bytes_an_edit <= blocks * (48 + 4) + tokens * (16 + 4) + 4 + 60
    editor.remove()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, not 0"):
        Memory(rank=0)
    with pytest.raises(ValueError, match="strictness must be a similarity"):
        Memory(strictness=9.0)


def test_chats_are_refused(toy: FactModel) -> None:
    with pytest.raises(ValueError, match="memory compares prompts as raw text"):
        SETTINGS.start(toy.base, toy.tokenizer, EditorSetup(template=CHAT))
    editor = editor_of(toy)
    with pytest.raises(ValueError, match="give prompts as texts"):
        editor.edit_independently([Edit((Message("user", "hello"),), "Kasburg")])
    editor.remove()
