"""The memory of edits: edits side by side come out as alone, a prompt without a route is untouched, a forgotten edit is gone."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import facts
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import (
    NARROW,
    BaftConfig,
    BaftEditor,
    DescentConfig,
    Edit,
    Scope,
    prompt_lengths,
)
from peft_baft.adapter.base_identity import embedding_sample
from peft_baft.adapter.memory import EditRouter, orthonormal
from peft_baft.adapter.model_call import call_with_cache
from peft_baft.adapter.routing import Sequences
from peft_baft.adapter.weights import FILE
from peft_baft.data.cases import Message
from peft_baft.editing.acceleration import cached_texts
from peft_baft.editing.editor import encode_edits
from peft_baft.editing.memory import codes
from peft_baft.editing.memory.editor import MemoryEditor
from peft_baft.editing.memory.folder import merge_saved
from peft_baft.editing.memory.statistics import token_texts
from peft_baft.evaluation.scoring import greedy_answers, token_match
from peft_baft.inspection.inspect import inspect
from peft_baft.inspection.page import page, summary
from peft_baft.span import OUTSIDE

fact_model = facts.fact_model
DESCENT = DescentConfig(lr=0.2, max_steps=60, stop_loss=0.05, weight_decay=0.0)
SETTINGS: dict[str, Any] = {
    "memory": True,
    "r": 48,
    "key_dimensions": 16,
    "least_subject": 0.98,
    "strictness": 0.9,
    "layers_to_transform": [1, 2, 3],
    "task_type": "CAUSAL_LM",
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, scope: Scope = NARROW, **settings: Any) -> MemoryEditor:
    model = get_peft_model(toy.base, BaftConfig(**{**SETTINGS, **settings})).eval()
    assert isinstance(BaftEditor(model, toy.tokenizer), MemoryEditor)
    return MemoryEditor(model, toy.tokenizer, DESCENT, scope=scope)


def logits(model: Any, toy: FactModel, prompts: list[str]) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(torch.tensor([toy.tokenizer(prompt)["input_ids"]]), logits_to_keep=1).logits
            for prompt in prompts
        ]


def asked(*numbers: int) -> list[tuple[Any, str]]:
    return [(edit.prompt, edit.target) for edit in edits(*numbers)]


def prompts_of(*numbers: int) -> list[str]:
    return [str(edit.prompt) for edit in edits(*numbers)]


def codes_of(editor: MemoryEditor) -> Tensor:
    """The codes of all edits, (edits, blocks, r)."""
    state = editor.state_dict()
    names = [name for name in state if name.endswith("codes.codes")]
    scales = [state[name.removesuffix("codes") + "scales"] for name in names]
    each = [state[n].float() * s[:, None] for n, s in zip(names, scales, strict=True)]
    return torch.stack(each, 1)


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
    assert result.learned
    assert token_match(together.model, toy.tokenizer, asked(0, 5, 9, 12)) == [1.0] * 4
    found = codes_of(together)
    together.remove()
    alone = editor_of(toy)
    for number in (0, 5, 9, 12):
        alone.edit(edits(number))
    torch.testing.assert_close(codes_of(alone), found, atol=3e-2, rtol=2e-2)


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


def test_an_edit_is_learned_in_each_context_of_the_scope(toy: FactModel) -> None:
    wide, facts_taught = replace(NARROW, contexts=4), edits(0, 5, 9, 12)
    surrounded = [
        [row]
        for texts in encode_edits(toy.base, toy.tokenizer, facts_taught, scope=wide)
        for row in texts
    ]

    def largest_loss(scope: Scope) -> float:
        editor = editor_of(toy, scope=scope)
        assert editor.edit(facts_taught).learned
        learned = codes_of(editor).repeat_interleave(len(surrounded) // len(facts_taught), 0)
        bases = {name: part.basis(torch.device("cpu")) for name, part in editor._codes().items()}
        base = editor.model.get_base_model()
        editor.remove()
        texts = codes._TextsOfFacts(base, toy.tokenizer, surrounded, bases, 3)
        return max(texts.losses(list(learned), range(len(surrounded)))).item()

    # An edit ends when the mean over its texts is below the stop.
    assert largest_loss(wide) < 1.4 * DESCENT.stop_loss < largest_loss(NARROW)
    with pytest.raises(ValueError, match="cannot hold contrast texts"):
        editor_of(toy, scope=Scope())


def test_a_prompt_that_is_routed_nowhere_is_computed_bit_for_bit_as_before(toy: FactModel) -> None:
    prompts = [fact.prompt for fact in MEALS[:6]]
    before = logits(toy.base, toy, prompts)
    said = greedy_answers(toy.base, toy.tokenizer, prompts)
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    assert [editor.matches(prompt).edit for prompt in prompts] == [None] * 6
    assert all(map(torch.equal, logits(editor.model, toy, prompts), before))
    assert greedy_answers(editor.model, toy.tokenizer, prompts) == said
    # The control: edits in the same batch as such a prompt are answered, decoded from a cache too.
    answers = greedy_answers(editor.model, toy.tokenizer, [prompts[0], *prompts_of(0, 5)])
    assert answers[0] == said[0]
    pairs = zip(answers[1:], asked(0, 5), strict=True)
    assert all(answer.startswith(target) for answer, (_, target) in pairs)
    with editor.model.disable_adapter():
        assert all(
            map(
                torch.equal,
                logits(editor.model, toy, prompts_of(0)),
                logits(toy.base, toy, prompts_of(0)),
            )
        )
    editor.remove()
    assert all(map(torch.equal, logits(toy.base, toy, prompts), before))


def test_a_forgotten_edit_is_gone_and_the_others_answer_bit_for_bit(toy: FactModel) -> None:
    prompts = prompts_of(0, 5, 9)
    unedited = logits(toy.base, toy, prompts)
    editor = editor_of(toy)
    editor.edit(edits(0, 5, 9))
    edited = logits(editor.model, toy, prompts)
    editor.forget(2)
    after = logits(editor.model, toy, prompts)
    assert torch.equal(after[0], edited[0]) and torch.equal(after[2], edited[2])
    assert torch.equal(after[1], unedited[1]) and not torch.equal(edited[1], unedited[1])
    assert editor.numbers == [1, 3]
    with pytest.raises(ValueError, match="no edit 2 in the memory: it has 2 edits"):
        editor.forget(2)
    assert editor.edit(edits(12)).learned and editor.numbers == [1, 3, 4]


def test_what_is_left_after_forgetting_is_what_those_edits_alone_leave(
    toy: FactModel, tmp_path: Path
) -> None:
    editor = editor_of(toy)
    for fact in edits(0, 5, 9, 12):
        editor.edit([fact])
    for number in (1, 3):
        editor.forget(number)
    editor.model.save_pretrained(str(tmp_path / "left"))
    editor.remove()
    others = editor_of(toy)
    for number, fact in zip((2, 4), edits(5, 12), strict=True):
        others.edit_independently([fact], [number])
    others.model.save_pretrained(str(tmp_path / "alone"))
    left, alone = ((tmp_path / name / FILE).read_bytes() for name in ("left", "alone"))
    assert left == alone


def test_an_edit_of_a_known_question_replaces_it(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    (first, second) = edits(0, 5)
    again = Edit(f" {first.prompt} ", "Kasburg")
    assert editor.known([again, edits(9)[0]]) == {0: 1}
    editor.edit([again])
    assert editor.numbers == [2, 3]
    pair = [(first.prompt, "Kasburg"), (second.prompt, second.target)]
    assert token_match(editor.model, toy.tokenizer, pair) == [1.0] * 2
    editor.replace(3, Edit(first.prompt, first.target))
    assert editor.numbers == [2, 3]
    assert token_match(editor.model, toy.tokenizer, asked(0, 5)) == [1.0] * 2
    with pytest.raises(ValueError, match="no edit 8"):
        editor.replace(8, first)


def test_a_rephrasing_finds_its_edit_and_another_country_does_not(toy: FactModel) -> None:
    editor = editor_of(toy, strictness=0.2, least_subject=0.2)
    editor.edit(edits(*range(12)))
    found = [editor.matches(fact.rephrase) for fact in CAPITALS[:12]]
    assert sum(match.best == number for number, match in enumerate(found, 1)) >= 11
    match = editor.matches(CAPITALS[0].prompt)
    assert match.edit == match.best == 1 and match.runner_up != 1
    again = [Edit(CAPITALS[0].rephrase, "bodran"), *edits(3)]
    assert editor.reworded(again) == {0: 1} and editor.known(again) == {1: 4}
    others = [editor.matches(fact.prompt) for fact in CAPITALS[12:]]
    edited = [editor.matches(fact.prompt) for fact in CAPITALS[:12]]
    assert max(match.subject for match in others) < min(match.subject for match in edited)


def test_what_an_edit_scores_does_not_depend_on_the_others(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0))
    alone = [editor.matches(text) for text in (CAPITALS[0].prompt, CAPITALS[0].rephrase)]
    editor.edit(edits(*range(1, 12)))
    for text, before in zip((CAPITALS[0].prompt, CAPITALS[0].rephrase), alone, strict=True):
        after = editor.matches(text)
        if after.best == 1:
            assert (after.subject, after.relation) == (before.subject, before.relation)


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
    for attempt in (lambda: editor.edit(edits(5)), lambda: editor.replace(1, edits(0)[0])):
        with pytest.raises(FloatingPointError):
            attempt()
        after = editor.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_state_and_a_snapshot_bring_any_number_of_edits_back(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    restore = editor.snapshot()
    state = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    editor.edit(edits(9))
    restore()
    assert editor.numbers == [1, 2]
    editor.forget(1)
    editor.load_state_dict(state)
    assert editor.numbers == [1, 2]
    assert token_match(editor.model, toy.tokenizer, asked(0, 5)) == [1.0] * 2


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}])
def test_a_saved_memory_answers_bit_for_bit(
    toy: FactModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5, 9))
    prompts = [*prompts_of(0, 5, 9), *(fact.prompt for fact in MEALS[:2])]
    expected = logits(editor.model, toy, prompts)
    editor.model.save_pretrained(str(tmp_path))
    base = editor.model.unload()
    reloaded = PeftModel.from_pretrained(base, str(tmp_path), **settings)
    assert all(map(torch.equal, logits(reloaded, toy, prompts), expected))
    on = MemoryEditor(reloaded, toy.tokenizer, DESCENT)
    on.edit(edits(12))
    assert on.numbers == [1, 2, 3, 4]
    assert token_match(reloaded, toy.tokenizer, asked(0, 5, 9, 12)) == [1.0] * 4
    copied = deepcopy(reloaded)
    assert all(map(torch.equal, logits(copied, toy, prompts), logits(reloaded, toy, prompts)))


def test_transformers_own_loading_takes_a_memory(toy: FactModel, tmp_path: Path) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5, 9))
    expected = logits(editor.model, toy, prompts_of(0, 5, 9))
    editor.model.save_pretrained(str(tmp_path / "memory"))
    editor.model.unload().save_pretrained(str(tmp_path / "base"))
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path / "memory"))
    for found, wanted in zip(logits(model.eval(), toy, prompts_of(0, 5, 9)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_cached_decoding_is_teacher_forcing(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 3, 9))  # the fourth city has two tokens
    model = editor.model
    prompt = torch.tensor([toy.tokenizer(prompts_of(3)[0])["input_ids"]])
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(prompt, use_cache=False, **settings)
    for other in (
        {},
        {"num_beams": 3, "num_return_sequences": 1},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static"},
    ):
        if other.get("num_beams"):
            assert (
                model.generate(prompt, **settings, **other)[0, prompt.shape[1]]
                == whole[0, prompt.shape[1]]
            )
        else:
            assert torch.equal(model.generate(prompt, **settings, **other), whole)
    with prompt_lengths(model, [prompt.shape[1]]), torch.no_grad():
        forced = model(whole).logits.argmax(-1)
    assert torch.equal(forced[0, prompt.shape[1] - 1 : -1], whole[0, prompt.shape[1] :])
    with torch.no_grad():  # a loop of one's own
        scores, cache = call_with_cache(model, toy.base, {"input_ids": prompt})
        said = []
        for _ in range(4):
            said.append(scores[:, -1:].argmax(-1))
            scores, cache = call_with_cache(model, toy.base, {"input_ids": said[-1]}, cache)
    assert torch.equal(torch.cat(said, 1), whole[:, prompt.shape[1] :])
    with editor.model.disable_adapter():
        assert not torch.equal(model.generate(prompt, **settings), whole)


def test_a_cache_of_an_unknown_prompt_is_refused(toy: FactModel) -> None:
    editor = editor_of(toy)
    prompt = torch.tensor([toy.tokenizer(prompts_of(3)[0])["input_ids"]])
    with torch.no_grad():
        # The memory is empty: nothing is noted on this cache.
        _, cache = call_with_cache(editor.model, toy.base, {"input_ids": prompt})
        editor.edit(edits(0, 3))
        with pytest.raises(ValueError, match="whose prompt it has not seen"):
            call_with_cache(editor.model, toy.base, {"input_ids": prompt[:, :1]}, cache)
        with pytest.raises(ValueError, match="call the model with input_ids"):
            editor.model(inputs_embeds=torch.zeros(1, 3, 64))


def test_packed_rows_and_padding_change_nothing(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    texts = [toy.tokenizer(text)["input_ids"] for text in (*prompts_of(0, 5), MEALS[0].prompt)]
    alone = []
    with torch.no_grad():
        for ids in texts:
            alone.append(editor.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1])
        row = torch.tensor([[i for ids in texts for i in ids]])
        places = torch.tensor([[n for ids in texts for n in range(len(ids))]])
        lengths = torch.tensor([len(ids) for ids in texts])
        packed = editor.model(
            row, position_ids=places, prompt_lengths=lengths, use_cache=False
        ).logits[0]
        left = toy.tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt")
        padded = editor.model(**left, logits_to_keep=1).logits[:, -1]
    for number, end in enumerate(lengths.cumsum(0) - 1):
        torch.testing.assert_close(packed[end], alone[number])
        torch.testing.assert_close(padded[number], alone[number])


def test_continuous_batching_answers_each_request_by_its_own_edit(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 3, 5))
    texts = [*prompts_of(0, 3, 5), MEALS[0].prompt]
    prompts = [toy.tokenizer(text)["input_ids"] for text in texts]
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = [
        editor.model.generate(torch.tensor([ids]), **settings)[0, len(ids) :] for ids in prompts
    ]
    greedy = tr.GenerationConfig(**settings, eos_token_id=-1)
    cache = tr.ContinuousBatchingConfig(page_size=4, num_blocks=64)
    found = editor.model.generate_batch(
        prompts, generation_config=greedy, continuous_batching_config=cache
    )
    said = [list(one.generated_tokens) for one in found.values()]
    assert said == [tokens.tolist() for tokens in alone]
    assert said[3] != said[0] != said[1]


class Vocabulary:
    """As much of a tokenizer as tells what its tokens stand for."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: range) -> list[str]:
        return [self.tokens[i] for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = "".join(tokens).replace(
            "\u0120", " "
        )  # byte pairs keep the space, SentencePiece drops it
        return text.replace("\u2581", "")


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        # One token of byte pairs that begins with ## makes no WordPiece of them.
        (("\u0120the", "hof", "##", "\u0120Ober"), [" the", "hof", "##", " Ober"]),
        (("\u2581the", "hof", "\u2581Ober"), [" the", "hof", " Ober"]),
        (("the", "##hof", "ober"), [" the", "hof", " ober"]),
    ],
)
def test_a_token_that_begins_a_word_has_a_space_before_it(
    tokens: tuple[str, ...], texts: list[str]
) -> None:
    assert token_texts(Vocabulary(*tokens)) == texts


def test_sequences_are_told_by_where_positions_begin_anew() -> None:
    relative = torch.tensor([[-2, -1, 0, -3, -2, -1], [OUTSIDE, -2, -1, 0, 1, OUTSIDE]])
    places = Sequences.of(relative, OUTSIDE).places
    assert places == [(0, 0, 2, 3), (0, 3, 6, 6), (1, 1, 3, 5)]


def test_memories_stand_side_by_side_with_each_other_and_with_plain_baft(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0))
    model = editor.model
    model.add_adapter("second", BaftConfig(**SETTINGS))
    model.add_adapter("plain", BaftConfig(r=4, init_weights=False, layers_to_transform=[2, 3]))
    model.set_adapter("second")
    other = MemoryEditor(model, toy.tokenizer, DESCENT)
    other.edit(edits(5))
    first = logits(model, toy, prompts_of(0, 5))
    model.set_adapter("default")
    second = logits(model, toy, prompts_of(0, 5))
    # Each row by the adapter that is named for it.
    rows = torch.tensor([toy.tokenizer(text)["input_ids"] for text in prompts_of(5, 0, 0)])
    with torch.no_grad():
        mixed = model(rows, adapter_names=["second", "default", "__base__"]).logits[:, -1]
    torch.testing.assert_close(mixed[0], first[1][0, -1])
    torch.testing.assert_close(mixed[1], second[0][0, -1])
    assert not torch.allclose(mixed[2], mixed[1])
    # Together, both memories answer, and what plain BaFT adds is added.
    model.base_model.set_adapter(["default", "second"])
    assert token_match(model, toy.tokenizer, asked(0, 5)) == [1.0] * 2
    model.base_model.set_adapter(["default", "plain"])
    together = logits(model, toy, [MEALS[0].prompt])
    model.set_adapter("plain")
    assert torch.equal(together[0], logits(model, toy, [MEALS[0].prompt])[0])
    model.delete_adapter("second")
    model.set_adapter("default")
    assert token_match(model, toy.tokenizer, asked(0)) == [1.0]


def test_in_a_chat_the_last_message_of_the_user_is_the_question(toy: FactModel) -> None:
    tokenizer = deepcopy(toy.tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens([" user", "user", "assistant"])
    toy.base.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(toy.base, BaftConfig(**SETTINGS)).eval()
    editor = MemoryEditor(model, tokenizer, DESCENT, template="chat")
    first, second = edits(0, 5)
    editor.edit([first, second])
    earlier = [Message("user", str(second.prompt)), Message("assistant", second.target)]
    assert editor.matches((*earlier, Message("user", str(first.prompt)))).edit == 1
    assert editor.matches((Message("user", MEALS[0].prompt),)).edit is None
    # Words around the question, of the template, are no part of it, but for the one before it, which has no key.
    question = editor.router.stored()[0]
    assert str(tokenizer.decode(question.ids[1:])).split() == str(first.prompt).split()
    assert len(question.keys) == len(question.ids) - 1


def test_wordings_of_relations_are_measured_in_the_form_in_which_questions_are_put(
    toy: FactModel, tmp_path: Path
) -> None:
    tokenizer = deepcopy(toy.tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens([" user", "user", "assistant"])
    toy.base.resize_token_embeddings(len(tokenizer))
    wording = str(edits(0)[0].prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "peft_baft.editing.memory.statistics.relation_wordings", lambda _: [("it", wording)]
        )
        found = {}
        for form in ("raw", "chat"):
            model = get_peft_model(toy.base, BaftConfig(**SETTINGS)).eval()
            editor = MemoryEditor(model, tokenizer, DESCENT, template=form)
            editor.edit(edits(0))
            (question,) = editor.router.stored()
            keys = editor.router.kept()["relation_keys"]
            assert len(keys) and all((question.keys == key).all(1).any() for key in keys)
            found[form] = keys
            model.save_pretrained(str(tmp_path / form))
            model.unload()
    assert not torch.equal(found["raw"], found["chat"])
    model = get_peft_model(toy.base, BaftConfig(**SETTINGS)).eval()
    with pytest.raises(ValueError, match=r"another form of prompts \(raw, not chat\)"):
        MemoryEditor(model, tokenizer, DESCENT, template="chat", statistics=tmp_path / "raw")
    with pytest.raises(ValueError, match="put in the form 'raw' in one, in 'chat' in the other"):
        merge_saved(tmp_path / "raw", tmp_path / "chat", tmp_path / "both")


def test_damaged_memories_are_refused_whole(toy: FactModel, tmp_path: Path) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    editor.model.save_pretrained(str(tmp_path))
    base = editor.model.unload()
    whole = load_file(tmp_path / FILE)

    def name(end: str) -> str:
        return next(key for key in whole if key.endswith(end))

    damages = {
        "scales": whole[name("codes.scales")][:1],
        "keys": whole[name("router.keys")][:-1],
        "numbers": whole[name("router.numbers")].clone().fill_(1),
        "lengths": whole[name("router.lengths")] + 1,
        "ids": whole[name("router.ids")] + 10**6,
        "mean": whole[name("router.mean")] * float("nan"),
        "codes": whole[name("codes.codes")].float(),
        "relation_keys": whole[name("router.relation_keys")][:-1],
        "relation_names": whole[name("router.relation_names")][:-9],
        "wordings": whole[name("router.wordings")] + torch.tensor([0, 10**6, 0], dtype=torch.int32),
    }
    for end, damaged in damages.items():
        save_file({**whole, name(f".{end}"): damaged}, tmp_path / FILE)
        with pytest.raises(ValueError, match="damaged"):
            PeftModel.from_pretrained(base, str(tmp_path))
        assert not hasattr(base, "peft_config")
    earlier = {key: tensor for key, tensor in whole.items() if not key.endswith("relation_keys")}
    save_file(earlier, tmp_path / FILE)
    with pytest.raises(ValueError, match="Teach its facts again"):
        PeftModel.from_pretrained(base, str(tmp_path))
    save_file(whole, tmp_path / FILE)
    PeftModel.from_pretrained(base, str(tmp_path))


def test_an_inspection_shows_which_edit_answers_and_where_it_acts(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    editor.forget(1)
    seen = inspect(editor.model, toy.tokenizer, prompts_of(5)[0])
    (memory,) = seen.adapters
    assert memory.edit == 2 and seen.before != seen.after
    assert seen.after.startswith(edits(5)[0].target)
    assert [block.name for block in seen.blocks] == [f"model.layers.{n}" for n in (1, 2, 3)]
    for block in seen.blocks:
        acting = [cell.gates == {"default": (1.0,)} for cell in block.cells]
        assert acting == [token.edited for token in seen.tokens]
        assert sum(acting) == 3 + sum(token.answer for token in seen.tokens)
        assert all((cell.size > 0) == acts for cell, acts in zip(block.cells, acting, strict=True))
    assert "Here edit 2 answers." in page(seen)
    # A prompt that finds none: the gate is closed, and nothing changes.
    nothing = inspect(editor.model, toy.tokenizer, str(MEALS[0].prompt))
    assert nothing.adapters[0].edit is None and nothing.before == nothing.after
    gates = [cell.gates for block in nothing.blocks for cell in block.cells if cell.gates]
    assert gates and all(of_cell == {"default": (0.0,)} for of_cell in gates)
    assert all(cell.size == 0 for block in nothing.blocks for cell in block.cells)
    assert "Here none of its edits answers." in page(nothing)
    assert summary(nothing)[0] == "No hidden vector is changed." and len(summary(seen)) == 3


def test_a_memory_on_another_model_is_refused(toy: FactModel, tmp_path: Path) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    editor.model.save_pretrained(str(tmp_path))
    base = editor.model.unload()
    # In other precision, or fine-tuned a little, it is the same model.
    like = deepcopy(base).to(torch.bfloat16)
    logits(PeftModel.from_pretrained(like, str(tmp_path)), toy, prompts_of(0))
    near = deepcopy(base)
    near.get_input_embeddings().weight.data *= 1.02
    logits(PeftModel.from_pretrained(near, str(tmp_path)), toy, prompts_of(0))
    torch.manual_seed(1)
    other = PeftModel.from_pretrained(type(base)(base.config), str(tmp_path))
    with pytest.raises(ValueError, match="made on another base model"):
        logits(other, toy, prompts_of(0))
    with pytest.raises(ValueError, match="made on another base model"):
        MemoryEditor(other, toy.tokenizer)
    with other.disable_adapter():
        logits(other, toy, prompts_of(0))
    # What cannot be compared passes.
    assert embedding_sample(torch.nn.Linear(2, 2)) is None
    assert embedding_sample(deepcopy(base).to("meta")) is None


def test_what_was_measured_of_the_model_is_taken_from_another_memory(
    toy: FactModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = editor_of(toy)
    first.edit(edits(0, 5))
    first.model.save_pretrained(str(tmp_path))
    base = first.model.unload()
    other, narrow = deepcopy(base), deepcopy(base)
    torch.manual_seed(1)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    monkeypatch.setattr(
        "peft_baft.editing.memory.editor.key_statistics", lambda *_: pytest.fail("was measured")
    )
    model = get_peft_model(base, BaftConfig(**SETTINGS)).eval()
    second = MemoryEditor(model, toy.tokenizer, DESCENT, statistics=tmp_path)
    second.edit(edits(0, 5))
    for name, tensor in first.router.kept().items():
        assert torch.equal(tensor, second.router.kept()[name]), name
    # Of another model, or made in another way, they are refused, and nothing is taken.
    for on, settings, says in (
        (other, {}, "made on another base model"),
        (narrow, {"key_dimensions": 8}, r"another key size \(16, not 8\)"),
    ):
        refused = get_peft_model(on, BaftConfig(**{**SETTINGS, **settings})).eval()
        with pytest.raises(ValueError, match=says):
            MemoryEditor(refused, toy.tokenizer, DESCENT, statistics=tmp_path)
        (router,) = (m for m in refused.modules() if isinstance(m, EditRouter))
        assert not router.has_statistics
    with pytest.raises(pytest.fail.Exception, match="was measured"):  # the control
        MemoryEditor(refused, toy.tokenizer, DESCENT)


def test_a_token_that_was_added_later_is_a_word_that_no_edit_has(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0, 5))
    router, tokenizer = editor.router, toy.tokenizer
    added = len(tokenizer)
    (question,) = router.stored()[:1]
    assert router.match(question).edit == 0
    with_added = replace(question, ids=torch.cat([question.ids[:-1], torch.tensor([added])]))
    assert router.match(with_added).subject < 1.0
    with pytest.raises(
        ValueError, match=f"has token {added}, and this memory of edits was made when"
    ):
        router.with_questions([3], [with_added])


def test_an_edit_takes_a_byte_a_number_and_few_more(toy: FactModel) -> None:
    editor = editor_of(toy)
    empty = sum(tensor.nbytes for tensor in editor.state_dict().values())
    editor.edit(edits(0, 5, 9))
    state = editor.state_dict()
    bytes_an_edit = (sum(tensor.nbytes for tensor in state.values()) - empty) / 3
    tokens = len(toy.tokenizer(prompts_of(0)[0])["input_ids"])
    # Codes with scales; keys and ids of tokens; a number and a length.
    assert bytes_an_edit == 3 * (48 + 4) + 16 * (tokens - 1) + 4 * tokens + 8


def test_bad_settings_are_refused(toy: FactModel) -> None:
    with pytest.raises(ValueError, match="strictness must be a likeness of -1 to 1, not 9"):
        BaftConfig(memory=True, strictness=9.0)
    with pytest.raises(ValueError, match="A memory of edits has no balance_weight"):
        BaftConfig(memory=True, balance_weight=0.1)
    with pytest.raises(ValueError, match="has baft_format 3, not 1"):
        BaftConfig(memory=True, baft_format=1)
    assert BaftConfig(memory=True).r == 64 and BaftConfig().r == 12
    with pytest.raises(ValueError, match="edits whole decoder blocks"):
        get_peft_model(toy.base, BaftConfig(memory=True, target_modules=["mlp"]))
    model = get_peft_model(toy.base, BaftConfig(r=4))
    with pytest.raises(ValueError, match="is no memory of edits"):
        MemoryEditor(model, toy.tokenizer)
