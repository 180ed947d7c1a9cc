"""The memory of edits: edits are independent, a prompt without a route is untouched, a forgotten edit is gone."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import config, continued, editor_of, generated, ids_of, logits, prompts_of, reply

import facts
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import BaftConfig, BaftEditor, Edit, MemoryConfig, MemoryEditor, editor_for
from peft_baft.adapter.weights import FILE
from peft_baft.evaluation.scoring import greedy_answers, token_match
from peft_baft.memory.folder import merge_saved
from peft_baft.memory.statistics import token_texts
from peft_baft.memory.tensors import StoredEdit

fact_model = facts.fact_model


def asked(*numbers: int) -> list[tuple[Any, str]]:
    return [(edit.prompt, edit.target) for edit in edits(*numbers)]


def stored(editor: MemoryEditor) -> dict[int, StoredEdit]:
    return {edit.number: edit for edit in editor.part.index().edits}


def alike(one: StoredEdit, other: StoredEdit) -> bool:
    """Whether two edits are the same but for their numbers."""
    same = (one.question, one.spaced, one.bare, one.stops)
    return same == (other.question, other.spaced, other.bare, other.stops) and torch.equal(
        one.keys, other.keys
    )


def copies(editor: MemoryEditor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in editor.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ---------------------------------------------------------------------------------------- edits do not touch each other


def test_an_edit_is_the_same_bit_for_bit_alone_with_others_and_in_any_order(
    fact_model: FactModel,
) -> None:
    taught = edits(0, 3, 9)
    alone, replies = [], []
    for fact in taught:
        editor = editor_of(fact_model)
        assert editor.edit([fact]).learned
        alone.append(stored(editor)[1])
        replies.append(generated(editor.model, ids_of(fact_model, str(fact.prompt)), 4))
    assert len({tuple(said) for said in replies}) == 3  # the control: each has its own
    editor = editor_of(fact_model)
    empty = editor.snapshot()
    for order in permutations(range(3)):
        empty()
        editor.edit([taught[order[0]]])
        editor.edit([taught[number] for number in order[1:]])
        for number, place in enumerate(order, 1):
            assert alike(stored(editor)[number], alone[place])
            prompt = ids_of(fact_model, str(taught[place].prompt))
            assert generated(editor.model, prompt, 4) == replies[place]
    many = editor_of(fact_model)
    many.edit(edits(*range(24)))
    for number, one in zip((1, 4, 10), alone, strict=True):
        assert alike(stored(many)[number], one)
    assert token_match(many.model, fact_model.tokenizer, asked(*range(24))) == [1.0] * 24


def test_a_prompt_that_finds_no_edit_is_computed_bit_for_bit_as_without_a_memory(
    fact_model: FactModel,
) -> None:
    prompts = [fact.prompt for fact in MEALS[:6]]
    before = logits(fact_model.base, fact_model, prompts)
    said = greedy_answers(fact_model.base, fact_model.tokenizer, prompts)
    editor = editor_of(fact_model)
    editor.edit(edits(0, 5))
    assert [editor.matches(prompt).edit for prompt in prompts] == [None] * 6
    assert all(map(torch.equal, logits(editor.model, fact_model, prompts), before))
    assert greedy_answers(editor.model, fact_model.tokenizer, prompts) == said
    # The control: edits in the same batch as such a prompt are answered.
    mixed = greedy_answers(editor.model, fact_model.tokenizer, [prompts[0], *prompts_of(0, 5)])
    assert mixed[0] == said[0]
    for answer, (_, target) in zip(mixed[1:], asked(0, 5), strict=True):
        assert answer.startswith(target)
    unedited = logits(fact_model.base, fact_model, prompts_of(0))
    with editor.model.disable_adapter():
        assert all(map(torch.equal, logits(editor.model, fact_model, prompts_of(0)), unedited))
    base = editor.model.get_base_model()
    editor.remove()
    assert all(map(torch.equal, logits(base, fact_model, [*prompts_of(0)]), unedited))


def test_rows_and_tokens_where_no_answer_goes_on_are_unchanged_bit_for_bit(
    fact_model: FactModel,
) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0))
    rows = torch.tensor([ids_of(fact_model, text) for text in prompts_of(0, 5, 9)])
    with torch.no_grad():
        found, unedited = editor.model(rows).logits, fact_model.base(rows).logits
    changed = (found != unedited).any(-1)
    expected = torch.zeros_like(changed)
    expected[0, -1] = True
    assert torch.equal(changed, expected)


# ------------------------------------------------------------------------------------------- forget, replace, numbers


def test_a_forgotten_edit_is_gone_and_the_others_answer_bit_for_bit(fact_model: FactModel) -> None:
    prompts = prompts_of(0, 5, 9)
    unedited = logits(fact_model.base, fact_model, prompts)
    editor = editor_of(fact_model)
    editor.edit(edits(0, 5, 9))
    edited = logits(editor.model, fact_model, prompts)
    editor.forget(2)
    after = logits(editor.model, fact_model, prompts)
    assert torch.equal(after[0], edited[0]) and torch.equal(after[2], edited[2])
    assert torch.equal(after[1], unedited[1]) and not torch.equal(edited[1], unedited[1])
    assert editor.numbers == [1, 3]
    with pytest.raises(ValueError, match="no edit 2 in the memory: it has 2 edits"):
        editor.forget(2)
    editor.forget(3)
    editor.forget(1)
    with pytest.raises(ValueError, match="it is empty"):
        editor.forget(1)
    assert editor.edit(edits(12)).learned and editor.numbers == [4]


def test_what_is_left_after_forgetting_is_what_those_edits_alone_leave(
    fact_model: FactModel, tmp_path: Path
) -> None:
    editor = editor_of(fact_model)
    for fact in edits(0, 5, 9, 12):
        editor.edit([fact])
    for number in (1, 3):
        editor.forget(number)
    editor.model.save_pretrained(str(tmp_path / "left"))
    others = editor_of(fact_model)
    for number, fact in zip((2, 4), edits(5, 12), strict=True):
        others.edit_independently([fact], [number])
    others.model.save_pretrained(str(tmp_path / "alone"))
    left, alone = ((tmp_path / name / FILE).read_bytes() for name in ("left", "alone"))
    assert left == alone
    others.edit(edits(0))  # the control
    others.model.save_pretrained(str(tmp_path / "more"))
    assert (tmp_path / "more" / FILE).read_bytes() != left


def test_an_edit_of_a_known_question_replaces_it(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0, 5))
    (first, second) = edits(0, 5)
    again = Edit(f" {first.prompt} ", "Kasburg")
    assert editor.known([again, edits(9)[0]]) == {0: 1}
    editor.edit([again])
    assert editor.numbers == [2, 3]
    pair = [(first.prompt, "Kasburg"), (second.prompt, second.target)]
    assert token_match(editor.model, fact_model.tokenizer, pair) == [1.0] * 2
    editor.replace(3, Edit(first.prompt, first.target))
    assert editor.numbers == [2, 3]
    assert token_match(editor.model, fact_model.tokenizer, asked(0, 5)) == [1.0] * 2
    with pytest.raises(ValueError, match="no edit 8"):
        editor.replace(8, first)
    # Of several with the same question in one call, the last one stays.
    editor.edit([Edit(first.prompt, "Kasburg"), first])
    assert editor.numbers == [2, 5]
    assert token_match(editor.model, fact_model.tokenizer, asked(0)) == [1.0]


def test_a_rephrasing_finds_its_edit_and_another_country_does_not(fact_model: FactModel) -> None:
    editor = editor_of(fact_model, strictness=0.2, least_subject=0.2)
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


def test_what_an_edit_scores_does_not_depend_on_the_others(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0))
    texts = (CAPITALS[0].prompt, CAPITALS[0].rephrase)
    alone = [editor.matches(text) for text in texts]
    editor.edit(edits(*range(1, 12)))
    assert editor.matches(texts[0]).best == 1
    for text, before in zip(texts, alone, strict=True):
        after = editor.matches(text)
        if after.best == 1:
            assert (after.subject, after.relation) == (before.subject, before.relation)


# ------------------------------------------------------------------------------------------------ states and failures


def test_an_edit_that_breaks_off_leaves_the_memory_as_it_was(
    fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0))
    before = copies(editor)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    for name in ("remember_form",):
        monkeypatch.setattr(editor, name, broken)
    for attempt in (lambda: editor.edit(edits(5)), lambda: editor.replace(1, edits(9)[0])):
        with pytest.raises(ZeroDivisionError):
            attempt()
        assert same(copies(editor), before)
        assert token_match(editor.model, fact_model.tokenizer, asked(0)) == [1.0]
    monkeypatch.undo()
    editor.edit(edits(5))  # the control
    assert not same(copies(editor), before)


def test_a_state_and_a_snapshot_bring_any_number_of_edits_back(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0, 5))
    restore, state = editor.snapshot(), copies(editor)
    editor.edit(edits(9))
    assert not same(copies(editor), state)
    restore()
    assert editor.numbers == [1, 2] and same(copies(editor), state)
    editor.forget(1)
    editor.load_state_dict(state)
    assert editor.numbers == [1, 2]
    assert token_match(editor.model, fact_model.tokenizer, asked(0, 5)) == [1.0] * 2


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}])
def test_a_saved_memory_answers_as_before(
    fact_model: FactModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    editor = editor_of(fact_model, after="continue")
    editor.edit([*edits(0, 5), Edit(edits(9)[0].prompt, edits(9)[0].target, after="stop")])
    prompts = [*prompts_of(0, 5, 9), *(fact.prompt for fact in MEALS[:2])]
    expected = logits(editor.model, fact_model, prompts)
    said = [generated(editor.model, ids_of(fact_model, text), 4) for text in prompts]
    editor.model.save_pretrained(str(tmp_path))
    # A fresh model: transformers leaves hooks that cannot be pickled on one that was asked for its hidden states.
    base: Any = type(fact_model.base)(fact_model.base.config).eval()
    base.load_state_dict(fact_model.base.state_dict())
    base.generation_config.eos_token_id = fact_model.base.generation_config.eos_token_id
    reloaded = PeftModel.from_pretrained(base, str(tmp_path), **settings)
    # Vectors that say tokens are computed anew, in other batches.
    found = logits(reloaded, fact_model, prompts)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, found[3:], expected[3:]))
    assert [generated(reloaded, ids_of(fact_model, text), 4) for text in prompts] == said
    on = editor_for(reloaded, fact_model.tokenizer)
    assert isinstance(on, MemoryEditor)
    on.edit(edits(12))
    assert on.numbers == [1, 2, 3, 4]
    assert token_match(reloaded, fact_model.tokenizer, asked(0, 5, 9, 12)) == [1.0] * 4
    for copied in (deepcopy(reloaded), pickle.loads(pickle.dumps(reloaded))):
        found = logits(copied, fact_model, prompts)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_transformers_own_loading_takes_a_memory(fact_model: FactModel, tmp_path: Path) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0, 5, 9))
    prompts = [*prompts_of(0, 5, 9), MEALS[0].prompt]
    said = [generated(editor.model, ids_of(fact_model, text), 4) for text in prompts]
    editor.model.save_pretrained(str(tmp_path / "memory"))
    fact_model.base.save_pretrained(tmp_path / "base")
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.generation_config.eos_token_id = None
    before = [generated(model, ids_of(fact_model, text), 4) for text in prompts]
    model.load_adapter(str(tmp_path / "memory"))
    assert [generated(model, ids_of(fact_model, text), 4) for text in prompts] == said
    assert before[:3] != said[:3] and before[3] == said[3]  # the control


def test_damaged_memories_are_refused_whole(fact_model: FactModel, tmp_path: Path) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0, 5))
    editor.model.save_pretrained(str(tmp_path))
    base: Any = deepcopy(fact_model.base)
    whole = load_file(tmp_path / FILE)

    def of(end: str) -> Tensor:
        return whole[name(end)].clone()

    def name(end: str) -> str:
        return next(key for key in whole if key.endswith(f"part.{end}"))

    def changed(end: str, row: int, column: int, value: int) -> Tensor:
        tensor = of(end)
        tensor[row, column] = value
        return tensor

    damages: list[tuple[str, Tensor]] = [
        ("edits", of("edits")[:-1]),
        ("edits", changed("edits", 2, 0, 1)),  # a number twice
        ("edits", changed("edits", 0, 0, 1)),  # a number that was never given
        ("edits", changed("edits", 1, 1, 7)),  # neither stops nor does not
        ("edits", changed("edits", 1, 2, 99)),  # more tokens than there are
        ("edits", changed("edits", 1, 4, 0)),  # an answer without tokens
        ("edits", of("edits").long()),
        ("tokens", of("tokens") + 10**6),
        ("tokens", -of("tokens") - 1),
        ("tokens", of("tokens")[:-1]),
        ("keys", of("keys")[:-1]),
        ("keys", of("keys").float()),
        ("keys", of("keys")[:, :-1]),
        ("reading", of("reading")[:-9]),
        ("reading", of("reading").flip(0)),
        ("mean", of("mean") * float("nan")),
        ("whitening", of("whitening")[:-1]),
        ("relation_keys", of("relation_keys")[:-1]),
        ("wordings", of("wordings") + torch.tensor([0, 10**6, 0], dtype=torch.int32)),
    ]
    for end, damaged in damages:
        save_file({**whole, name(end): damaged.contiguous()}, tmp_path / FILE)
        with pytest.raises(ValueError, match="damaged"):
            PeftModel.from_pretrained(base, str(tmp_path))
        assert not hasattr(base, "peft_config")
    for missing in whole:
        others = {key: tensor for key, tensor in whole.items() if key != missing}
        save_file(others, tmp_path / FILE)
        with pytest.raises(ValueError, match="is missing"):
            PeftModel.from_pretrained(base, str(tmp_path))
    save_file(whole, tmp_path / FILE)  # the control
    found = PeftModel.from_pretrained(base, str(tmp_path))
    assert token_match(found, fact_model.tokenizer, asked(0, 5)) == [1.0] * 2


def test_a_memory_on_another_model_is_refused(fact_model: FactModel, tmp_path: Path) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0, 5))
    editor.model.save_pretrained(str(tmp_path))
    base: Any = fact_model.base
    # In other precision, or fine-tuned a little, it is the same model.
    near: Any = deepcopy(base)
    near.get_input_embeddings().weight.data *= 1.02
    for like in (deepcopy(base).to(torch.bfloat16), near):
        found = PeftModel.from_pretrained(like, str(tmp_path))
        assert token_match(found, fact_model.tokenizer, asked(0, 5)) == [1.0] * 2
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="made on another base model"):
        model = PeftModel.from_pretrained(type(base)(base.config), str(tmp_path))
        logits(model, fact_model, prompts_of(0))


def test_what_was_measured_of_the_model_is_taken_from_another_memory(
    fact_model: FactModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = editor_of(fact_model)
    first.edit(edits(0, 5))
    first.model.save_pretrained(str(tmp_path))
    monkeypatch.setenv("PEFT_BAFT_CACHE", "")
    monkeypatch.setattr("peft_baft.memory.editor.measure", lambda *_: pytest.fail("was measured"))
    model = get_peft_model(deepcopy(fact_model.base), config()).eval()
    second = MemoryEditor(model, fact_model.tokenizer, statistics=tmp_path)
    second.edit(edits(0, 5))
    for name, tensor in first.part.tensors().items():
        assert torch.equal(tensor, second.part.tensors()[name]), name
    # Measured in another way, it is refused, and nothing is taken.
    narrow = get_peft_model(deepcopy(fact_model.base), config(key_dimensions=8)).eval()
    with pytest.raises(ValueError, match="another key size"):
        MemoryEditor(narrow, fact_model.tokenizer, statistics=tmp_path)
    other: Any = deepcopy(fact_model.base)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    elsewhere = get_peft_model(other, config()).eval()
    with pytest.raises(ValueError, match="another base model"):
        MemoryEditor(elsewhere, fact_model.tokenizer, statistics=tmp_path)
    with pytest.raises(pytest.fail.Exception, match="was measured"):  # the control
        MemoryEditor(narrow, fact_model.tokenizer)


def test_memories_are_merged_to_one_that_answers_for_both(
    fact_model: FactModel, tmp_path: Path
) -> None:
    for name, numbers in (("first", (0, 5)), ("second", (5, 9))):
        editor = editor_of(fact_model)
        editor.edit(edits(*numbers))
        editor.model.save_pretrained(str(tmp_path / name))
    replaced = merge_saved(tmp_path / "first", tmp_path / "second", tmp_path / "both")
    assert replaced == {2: 3}
    both = PeftModel.from_pretrained(deepcopy(fact_model.base), str(tmp_path / "both"))
    assert token_match(both, fact_model.tokenizer, asked(0, 5, 9)) == [1.0] * 3
    other = editor_of(fact_model, strictness=0.5)
    other.model.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="their settings differ"):
        merge_saved(tmp_path / "first", tmp_path / "other", tmp_path / "none")


# ------------------------------------------------------------------------------------------ with other adapters


def test_memories_stand_side_by_side_with_each_other_and_with_plain_baft(
    fact_model: FactModel,
) -> None:
    editor = editor_of(fact_model, after="continue")
    editor.edit(edits(0))
    model = editor.model
    model.add_adapter("second", config(after="continue"))
    plain = BaftConfig(r=4, init_weights=False, layers_to_transform=[1, 2])
    torch.manual_seed(3)
    model.add_adapter("plain", plain)
    model.set_adapter("second")
    other = MemoryEditor(model, fact_model.tokenizer)
    other.edit(edits(5))
    texts = prompts_of(0, 5)
    wanted = [
        reply(fact_model.base, ids_of(fact_model, text), ids_of(fact_model, f" {target}"), 3)
        for text, (_, target) in zip(texts, asked(0, 5), strict=True)
    ]
    unedited = [continued(fact_model.base, ids_of(fact_model, text), 3) for text in texts]
    # Each row by the adapter that is named for it, in one forward and in `generate`.
    names = ["second", "default", "default", "__base__", "plain"]
    rows = torch.tensor([ids_of(fact_model, texts[n]) for n in (1, 0, 1, 0, 0)])
    said = model.generate(
        rows,
        adapter_names=names,
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(rows),
    )[:, rows.shape[1] :].tolist()
    assert said[:4] == [wanted[1], wanted[0], unedited[1], unedited[0]]
    with torch.no_grad():
        mixed = model(rows, adapter_names=names).logits[:, -1]
        base = fact_model.base(rows).logits[:, -1]
        model.set_adapter("plain")
        alone = model(rows[4:]).logits[0, -1]
    assert mixed[:3].argmax(-1).tolist() == [said[n][0] for n in range(3)]
    torch.testing.assert_close(mixed[2:4], base[2:4])
    torch.testing.assert_close(mixed[4], alone)
    assert not torch.allclose(mixed[4], base[4])  # the control
    # Together both memories answer.
    model.base_model.set_adapter(["default", "second"])
    assert [generated(model, ids_of(fact_model, text), 3) for text in texts] == wanted
    # With plain BaFT in earlier blocks too, which changes what no edit answers.
    model.base_model.set_adapter(["default", "plain"])
    assert generated(model, ids_of(fact_model, texts[0]), 1) == wanted[0][:1]
    together = logits(model, fact_model, [MEALS[0].prompt])
    model.set_adapter("plain")
    assert torch.equal(together[0], logits(model, fact_model, [MEALS[0].prompt])[0])
    model.delete_adapter("second")
    model.set_adapter("default")
    assert token_match(model, fact_model.tokenizer, asked(0)) == [1.0]


def test_what_a_memory_says_is_not_added_to_what_other_adapters_add_in_its_block(
    fact_model: FactModel,
) -> None:
    editor = editor_of(fact_model, after="continue")
    editor.edit(edits(3))
    model, text = editor.model, prompts_of(3)[0]
    ids, (fact,) = ids_of(fact_model, text), edits(3)
    model.add_adapter("second", config(after="continue"))
    model.set_adapter("second")
    MemoryEditor(model, fact_model.tokenizer).edit([Edit(fact.prompt, "Kasgrad")])
    torch.manual_seed(3)
    model.add_adapter(
        "plain", BaftConfig(r=4, init_weights=False, layers_to_transform=[3], gate_offset=5.0)
    )
    for name, parameter in model.named_parameters():
        if "baft_source.plain" in name:
            parameter.data.mul_(100)
    answers = {
        name: reply(fact_model.base, ids, ids_of(fact_model, f" {target}"), 3)
        for name, target in (("default", fact.target), ("second", "Kasgrad"))
    }
    # Of two memories that know a question, the one that was named last answers.
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        assert generated(model, ids, 3) == answers[order[-1]]
    for order in (["default", "plain"], ["plain", "default"]):
        model.base_model.set_adapter(order)
        assert generated(model, ids, 2) == answers["default"][:2]
    model.set_adapter("plain")  # the control: it changes what is said
    assert generated(model, ids, 2) != continued(fact_model.base, ids, 2)


# ----------------------------------------------------------------------------------------------------- odds and ends


class Vocabulary:
    """As much of a tokenizer as tells what its tokens stand for."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[i] for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        # Byte pairs keep the space, SentencePiece drops it.
        return "".join(tokens).replace("\u0120", " ").replace("\u2581", "")


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
    vocabulary: Any = Vocabulary(*tokens)
    assert token_texts(vocabulary) == texts


def test_a_token_that_was_added_later_is_refused_in_a_question(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0))
    tokenizer = deepcopy(fact_model.tokenizer)
    tokenizer.add_tokens([" Zembla"])
    editor.model.get_base_model().resize_token_embeddings(len(tokenizer))
    later = MemoryEditor(editor.model, tokenizer)
    before = copies(later)
    added = Edit("the capital of Zembla is", edits(0)[0].target)
    with pytest.raises(
        ValueError, match="contains token 224, but this memory of edits was made when"
    ):
        later.edit([added])
    assert same(copies(later), before)
    prompt = tokenizer(str(added.prompt))["input_ids"]
    base = editor.model.get_base_model()
    with editor.model.disable_adapter():
        unedited = continued(base, prompt, 3)
    assert generated(later.model, prompt, 3) == unedited  # a prompt may hold it
    assert later.edit(edits(5)).learned  # the control


def test_an_edit_takes_a_byte_a_number_of_a_key_and_few_more(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    empty = sum(tensor.nbytes for tensor in editor.state_dict().values())
    editor.edit(edits(0, 5, 9))
    size = sum(tensor.nbytes for tensor in editor.state_dict().values())
    question, answers = len(ids_of(fact_model, prompts_of(0)[0])), 2
    # Keys; ids of the question with one before, and of the answer with a space and without; a row that tells where they are.
    assert (size - empty) / 3 == 16 * question + 4 * (question + 1 + answers) + 4 * 5


def test_bad_settings_are_refused(fact_model: FactModel) -> None:
    with pytest.raises(ValueError, match="strictness must be at least -1 and below 1, not 9"):
        MemoryConfig(strictness=9.0)
    with pytest.raises(ValueError, match="after must be one of 'stop', 'continue', not 'go on'"):
        MemoryConfig(after="go on")
    with pytest.raises(TypeError, match="key_dimensions must be an integer"):
        MemoryConfig(key_dimensions=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="memory has no setting 'lr'"):
        BaftConfig(memory={"lr": 0.1})
    with pytest.raises(ValueError, match="A memory of edits has no balance_weight"):
        BaftConfig(memory=True, balance_weight=0.1)
    with pytest.raises(ValueError, match="has no layers_to_transform"):
        BaftConfig(memory=True, layers_to_transform=[1])
    with pytest.raises(ValueError, match="a memory in format 1"):
        BaftConfig(memory=True, baft_format=1)
    with pytest.raises(ValueError, match=r"newer peft_baft \(format 5\)"):
        BaftConfig(memory={"a setting of tomorrow": 1}, baft_format=5)
    with pytest.raises(ValueError, match="has no target_modules"):
        BaftConfig(memory=True, target_modules=["mlp"])
    model = get_peft_model(deepcopy(fact_model.base), BaftConfig(r=4))
    with pytest.raises(ValueError, match="is not a memory of edits"):
        MemoryEditor(model, fact_model.tokenizer)
    with pytest.raises(ValueError, match="is not a plain BaFT adapter"):
        BaftEditor(editor_of(fact_model).model, fact_model.tokenizer)


def test_settings_are_saved_under_the_name_of_the_kind(
    fact_model: FactModel, tmp_path: Path
) -> None:
    editor = editor_of(fact_model, after="continue")
    editor.model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert saved["memory"]["after"] == "continue" and saved["memory"]["key_dimensions"] == 16
    assert BaftConfig.from_pretrained(str(tmp_path)).memory == editor.part._config.memory
    assert BaftConfig(r=4).memory is None  # the control
