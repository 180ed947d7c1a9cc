"""A taught answer is said in whatever way a model is asked: each way says what the answer's tokens and the unedited model say."""

# mypy: disable-error-code="arg-type, operator"
from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as tr
from toy import (
    asked_in_chat,
    config,
    continued,
    editor_of,
    generated,
    ids_of,
    in_chat,
    prompts_of,
    reply,
)

import facts
from conftest import cache_of, with_cache
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import Edit, MemoryEditor, prompt_lengths
from peft_baft.running import call_with_cache
from tiny_models import tiny_model

fact_model = facts.fact_model
COUNT = 5  # tokens of a reply
NUMBERS = (0, 3, 9)  # of the facts that are taught; the answer of the second one has two tokens


@pytest.fixture(scope="module")
def editor() -> MemoryEditor:
    made = editor_of(facts.trained(), after="continue")
    made.edit(edits(*NUMBERS))
    return made


def wanted(toy: FactModel, number: int, count: int = COUNT) -> list[int]:
    (fact,) = edits(number)
    return reply(toy.base, ids_of(toy, str(fact.prompt)), ids_of(toy, f" {fact.target}"), count)


def test_the_reference_is_another_reply_than_the_unedited_one(fact_model: FactModel) -> None:
    for number in NUMBERS:
        unedited = continued(fact_model.base, ids_of(fact_model, prompts_of(number)[0]), COUNT)
        assert wanted(fact_model, number)[:2] != unedited[:2]


# ---------------------------------------------------------------------------------------------------- ways to generate

WAYS: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "prefill in chunks of one": {"prefill_chunk_size": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "sampling of the likeliest": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "stated length": {"prompt_lengths": None},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", NUMBERS)
def test_an_answer_is_said(
    fact_model: FactModel, editor: MemoryEditor, number: int, way: str
) -> None:
    ids = ids_of(fact_model, prompts_of(number)[0])
    settings = dict(WAYS[way])
    if "prompt_lengths" in settings:
        settings["prompt_lengths"] = [len(ids)]
    assert generated(editor.model, ids, COUNT, **settings) == wanted(fact_model, number)
    with editor.model.disable_adapter():  # the control
        said = generated(editor.model, ids, COUNT, **settings)
    assert said == continued(fact_model.base, ids, COUNT) != wanted(fact_model, number)


def test_an_answer_is_said_in_inference_mode_and_taught_after_it(fact_model: FactModel) -> None:
    with torch.inference_mode():
        editor = editor_of(fact_model, after="continue")
        editor.edit(edits(0))
        ids = [ids_of(fact_model, text) for text in prompts_of(0, 3)]
        assert generated(editor.model, ids[0], COUNT) == wanted(fact_model, 0)
    editor.edit(edits(3))
    for number, one in zip((0, 3), ids, strict=True):
        assert generated(editor.model, one, COUNT) == wanted(fact_model, number)
    with torch.inference_mode():
        assert generated(editor.model, ids[1], COUNT) == wanted(fact_model, 3)


def test_an_assistant_model_guesses_and_the_memory_decides(
    fact_model: FactModel, editor: MemoryEditor
) -> None:
    for number in NUMBERS:
        ids = ids_of(fact_model, prompts_of(number)[0])
        said = generated(editor.model, ids, COUNT, assistant_model=deepcopy(fact_model.base))
        assert said == wanted(fact_model, number)


def test_beams_say_the_answer_and_go_on_with_each_its_own(
    fact_model: FactModel, editor: MemoryEditor
) -> None:
    ids = ids_of(fact_model, prompts_of(3)[0])
    answer = ids_of(fact_model, f" {edits(3)[0].target}")
    given: dict[str, Any] = {"num_beams": 3}
    # The unedited model's beams after prompt and answer are those after the answer.
    after = generated(fact_model.base, [*ids, *answer], COUNT - 2, **given)
    assert generated(editor.model, ids, COUNT, **given) == [*answer, *after]
    assert generated(editor.model, ids, COUNT, use_cache=False, **given) == [*answer, *after]


class Forced(tr.LogitsProcessor):
    """Makes the model begin its reply with given tokens."""

    def __init__(self, length: int, tokens: list[int]) -> None:
        self.length, self.tokens = length, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.length
        if place >= len(self.tokens):
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[place]] = 0
        return forced


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_reply_that_begins_in_other_words_is_unedited_from_there(
    fact_model: FactModel, editor: MemoryEditor, use_cache: bool
) -> None:
    ids, (fact,) = ids_of(fact_model, prompts_of(3)[0]), edits(3)
    first, second = ids_of(fact_model, f" {fact.target}")
    other = ids_of(fact_model, " apus")[0]
    for begun in ([other], [first, other], [other, first], [first]):
        forced = tr.LogitsProcessorList([Forced(len(ids), begun)])
        said = generated(editor.model, ids, COUNT, logits_processor=forced, use_cache=use_cache)
        answer = [first, second] if begun == [first] else begun
        assert said == reply(fact_model.base, ids, answer, COUNT)


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_reply(fact_model: FactModel, editor: MemoryEditor, side: str) -> None:
    texts = [*prompts_of(0, 3), MEALS[0].prompt, f"apus {prompts_of(0)[0]}"]
    rows = [ids_of(fact_model, text) for text in texts]
    batch = fact_model.tokenizer.pad(
        {"input_ids": [*rows, rows[0] + rows[0]]}, padding_side=side, return_tensors="pt"
    )
    with torch.no_grad():
        logits = editor.model(**batch).logits
    lengths = batch["attention_mask"].sum(1)
    for number, row in enumerate(rows):
        last = -1 if side == "left" else int(lengths[number]) - 1
        said = int(logits[number, last].argmax())
        single = generated(editor.model, row, 1)
        assert [said] == single
    assert (
        int(logits[0, -1 if side == "left" else int(lengths[0]) - 1].argmax())
        == wanted(fact_model, 0)[0]
    )
    if side == "left":
        out = editor.model.generate(**batch, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)[
            :, batch["input_ids"].shape[1] :
        ].tolist()
        assert out[:2] == [wanted(fact_model, 0), wanted(fact_model, 3)]
        assert out[2] == continued(fact_model.base, rows[2], COUNT)


def test_packed_rows_are_answered_each_by_its_own_edit(
    fact_model: FactModel, editor: MemoryEditor
) -> None:
    texts = [ids_of(fact_model, text) for text in (*prompts_of(0, 3), MEALS[0].prompt)]
    answers = [
        ids_of(fact_model, f" {answer}")
        for answer in (*(edit.target for edit in edits(0, 3)), MEALS[0].answer)
    ]
    whole = [[*text, *answer] for text, answer in zip(texts, answers, strict=True)]
    row = torch.tensor([[i for ids in whole for i in ids]])
    places = torch.tensor([[n for ids in whole for n in range(len(ids))]])
    lengths = torch.tensor([len(ids) for ids in texts])
    with torch.no_grad():
        packed = editor.model(
            row, position_ids=places, prompt_lengths=lengths, use_cache=False
        ).logits[0]
    start = 0
    for text, ids, answer in zip(texts, whole, answers, strict=True):
        said = packed[start + len(text) - 1 : start + len(ids) - 1].argmax(-1).tolist()
        assert said == answer
        start += len(ids)


def test_continuous_batching_answers_each_request_by_its_own_edit(
    fact_model: FactModel, editor: MemoryEditor
) -> None:
    texts = [*prompts_of(*NUMBERS), MEALS[0].prompt]
    prompts = [ids_of(fact_model, text) for text in texts]
    greedy = tr.GenerationConfig(
        max_new_tokens=COUNT, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    cache = tr.ContinuousBatchingConfig(page_size=4, num_blocks=64)
    found = editor.model.generate_batch(
        prompts, generation_config=greedy, continuous_batching_config=cache
    )
    said = [list(one.generated_tokens) for one in found.values()]
    assert said[:3] == [wanted(fact_model, number) for number in NUMBERS]
    assert said[3] == continued(fact_model.base, prompts[3], COUNT)


# --------------------------------------------------------------------------------------------------- plain forwards


def test_teacher_forcing_scores_the_answer(fact_model: FactModel, editor: MemoryEditor) -> None:
    for number in NUMBERS:
        ids = ids_of(fact_model, prompts_of(number)[0])
        said = wanted(fact_model, number)
        row = torch.tensor([[*ids, *said]])
        labels = row.clone()
        labels[:, : len(ids)] = -100
        with torch.no_grad():
            by_labels = editor.model(row, labels=labels)
            stated = editor.model(row, prompt_lengths=[len(ids)]).logits
            with prompt_lengths(editor.model, [len(ids)]):
                inside = editor.model(row).logits
        assert by_labels.logits[0, len(ids) - 1 : -1].argmax(-1).tolist() == said
        assert torch.equal(by_labels.logits, stated) and torch.equal(stated, inside)
        # Another answer is scored as by the unedited model from where it goes another way.
        other = row.clone()
        other[0, len(ids)] = ids_of(fact_model, " apus")[0]
        with torch.no_grad():
            edited = editor.model(other, prompt_lengths=[len(ids)]).logits
            unedited = fact_model.base(other).logits
        assert torch.equal(edited[:, len(ids) :], unedited[:, len(ids) :])
        assert not torch.equal(edited[:, len(ids) - 1], unedited[:, len(ids) - 1])


def test_a_loop_over_the_models_cache_says_the_answer(
    fact_model: FactModel, editor: MemoryEditor
) -> None:
    base = editor.model.get_base_model()
    for number in NUMBERS:
        ids = torch.tensor([ids_of(fact_model, prompts_of(number)[0])])
        said = []
        with torch.no_grad():
            scores, cache = call_with_cache(editor.model, base, {"input_ids": ids})
            for _ in range(COUNT):
                said.append(scores[:, -1:].argmax(-1))
                scores, cache = call_with_cache(editor.model, base, {"input_ids": said[-1]}, cache)
        assert torch.cat(said, 1)[0].tolist() == wanted(fact_model, number)


def test_rows_of_a_cache_that_a_loop_reorders_are_refused(
    fact_model: FactModel, editor: MemoryEditor
) -> None:
    base = editor.model.get_base_model()
    ids = torch.tensor([ids_of(fact_model, text) for text in prompts_of(*NUMBERS[:2])])

    def step(order: list[int] | None) -> list[int]:
        with torch.no_grad():
            scores, cache = call_with_cache(editor.model, base, {"input_ids": ids})
            said = scores[:, -1:].argmax(-1)
            if order is not None:
                cache.reorder_cache(torch.tensor(order))
                said = said[order]
            scores, _ = call_with_cache(editor.model, base, {"input_ids": said}, cache)
        return scores[:, -1].argmax(-1).tolist()

    second = [wanted(fact_model, number)[1] for number in NUMBERS[:2]]
    assert step(None) == step([0, 1]) == second  # the control
    with pytest.raises(ValueError, match="not known for these rows"):
        step([1, 0])


def test_a_prompt_may_fill_the_models_window(fact_model: FactModel) -> None:
    base = tiny_model("gpt2", vocab_size=len(fact_model.tokenizer), n_embd=64).eval()
    window = base.config.max_position_embeddings
    editor = editor_of(FactModel(base, fact_model.tokenizer))
    editor.edit(edits(0))
    ids = torch.tensor([(ids_of(fact_model, prompts_of(0)[0]) * window)[:window]])
    with torch.no_grad():
        logits = editor.model(ids).logits
        with editor.model.disable_adapter():
            unedited = editor.model(ids).logits
    assert torch.equal(logits[:, :-1], unedited[:, :-1])


def test_a_loop_without_a_cache_says_the_answer(
    fact_model: FactModel, editor: MemoryEditor
) -> None:
    for number in NUMBERS:
        ids = ids_of(fact_model, prompts_of(number)[0])
        text = list(ids)
        with torch.no_grad():
            for _ in range(COUNT):
                output = editor.model(
                    torch.tensor([text]), use_cache=False, prompt_lengths=[len(ids)]
                )
                text.append(int(output.logits[0, -1].argmax()))
        assert text[len(ids) :] == wanted(fact_model, number)


def test_what_a_memory_cannot_read_is_refused(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    (ids,) = [torch.tensor([ids_of(fact_model, prompts_of(0)[0])])]
    base = editor.model.get_base_model()
    embeddings = base.get_input_embeddings()(ids)
    editor.edit(edits(0))
    with torch.no_grad():
        with pytest.raises(ValueError, match="call the model with input_ids"):
            editor.model(inputs_embeds=embeddings)
        with pytest.raises(ValueError, match="call the model with input_ids"):
            editor.model.generate(inputs_embeds=embeddings, max_new_tokens=2, pad_token_id=0)
        with editor.model.disable_adapter():
            _, cache = call_with_cache(editor.model, base, {"input_ids": ids})
        cache = strange(cache)
        with pytest.raises(ValueError, match="whose texts are not known"):
            call_with_cache(editor.model, base, {"input_ids": ids[:, :1]}, cache)
        with editor.model.disable_adapter():  # the control: without the memory, all that is fine
            editor.model(inputs_embeds=embeddings)
        editor.model(ids)
    empty = editor_of(fact_model)
    with torch.no_grad():
        empty.model(inputs_embeds=embeddings)  # an empty memory reads nothing


def strange(cache: Any) -> Any:
    """A cache with what another one holds, that no forward has noted anything on."""
    return tr.DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


# ---------------------------------------------------------------------------------------------------------------- chats


@pytest.fixture(scope="module")
def chat() -> FactModel:
    return in_chat(facts.trained())


def question(number: int) -> tuple[str, str]:
    return "user", prompts_of(number)[0]


def chat_editor(chat: FactModel, **settings: Any) -> MemoryEditor:
    editor = editor_of(chat, **{"after": "continue", **settings})
    editor.edit(edits(*NUMBERS))
    return editor


TAUGHT: dict[str, Any] = {
    "raw": lambda fact: fact,
    "chat": lambda fact: Edit([{"role": "user", "content": str(fact.prompt)}], fact.target),
    "chat with a system message": lambda fact: Edit(
        [
            {"role": "system", "content": "apus berus"},
            {"role": "user", "content": str(fact.prompt)},
        ],
        fact.target,
    ),
}


@pytest.mark.parametrize("template", ["raw", "chat", "both"])
@pytest.mark.parametrize("taught", TAUGHT)
def test_an_edit_answers_in_a_chat_and_in_raw_text_in_whichever_it_was_taught(
    chat: FactModel, taught: str, template: str
) -> None:
    made = editor_of(chat, after="continue")
    editor = MemoryEditor(made.model, chat.tokenizer, template=template)
    editor.edit([TAUGHT[taught](fact) for fact in edits(0, 3)])
    for number, fact in zip((0, 3), edits(0, 3), strict=True):
        raw, turn = ids_of(chat, str(fact.prompt)), asked_in_chat(chat, question(number))
        spaced, bare = ids_of(chat, f" {fact.target}"), ids_of(chat, fact.target)
        assert spaced != bare
        assert generated(editor.model, raw, 4) == reply(chat.base, raw, spaced, 4)
        assert generated(editor.model, turn, 4) == reply(chat.base, turn, bare, 4)
    other = asked_in_chat(chat, question(7))  # the control
    assert generated(editor.model, other, 4) == continued(chat.base, other, 4)


def test_the_same_question_in_another_form_is_the_same_edit(chat: FactModel) -> None:
    editor, (fact,) = editor_of(chat), edits(0)
    editor.edit([TAUGHT["raw"](fact)])
    editor.edit([TAUGHT["chat"](fact)])
    assert editor.numbers == [2]
    editor.edit([Edit("apus berus is", fact.target)])
    assert editor.numbers == [2, 3]  # the control


def test_the_last_message_of_the_user_is_the_question(chat: FactModel) -> None:
    editor = chat_editor(chat)
    bare = ids_of(chat, edits(0)[0].target)
    system = ("system", "apus berus")
    assistant = ("assistant", "berus")
    chats = [
        (question(0),),
        (system, question(0)),
        (question(9), assistant, question(0)),
        (question(7), assistant, question(0)),
        (question(0), assistant, question(0)),
    ]
    for messages in chats:
        ids = asked_in_chat(chat, *messages)
        assert generated(editor.model, ids, 3) == reply(chat.base, ids, bare, 3)
    for messages in (
        (question(0), assistant, question(7)),
        (("system", question(0)[1]), question(7)),
    ):
        ids = asked_in_chat(chat, *messages)  # what was asked before is no question now
        assert generated(editor.model, ids, 3) == continued(chat.base, ids, 3)


def test_a_template_that_puts_nothing_after_a_message_is_warned_of(
    chat: FactModel, caplog: pytest.LogCaptureFixture
) -> None:
    editor_of(chat)
    assert "as the question" not in caplog.text  # the control
    plain = deepcopy(chat.tokenizer)
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    editor_of(FactModel(chat.base, plain))
    assert "takes the whole prompt as the question" in caplog.text


def test_a_chat_goes_on_over_the_cache_of_its_turns(chat: FactModel) -> None:
    editor = chat_editor(chat)
    first = asked_in_chat(chat, question(3))
    given: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 2}
    ids = torch.tensor([first])
    out = editor.model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **given
    )
    answers = {n: ids_of(chat, edits(n)[0].target) for n in NUMBERS}
    assert out.sequences[0, len(first) :].tolist() == answers[3]
    cache, text = cache_of(out), out.sequences[0].tolist()
    for number in (0, 7):
        turn = asked_in_chat(chat, question(number))
        text = [*text, *ids_of(chat, "</s>"), *turn]
        ids = torch.tensor([text])
        out = editor.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            **with_cache(editor.model, cache),
            **given,
        )
        said = out.sequences[0, len(text) :].tolist()
        expected = (
            reply(chat.base, text, answers[number], 2)
            if number in answers
            else continued(chat.base, text, 2)
        )
        assert said == expected
        cache, text = cache_of(out), out.sequences[0].tolist()


def test_a_reply_that_the_prompt_begins_is_finished(chat: FactModel) -> None:
    editor = chat_editor(chat)
    first, second = ids_of(chat, edits(3)[0].target)
    whole = asked_in_chat(chat, question(3))
    cases = [
        ([first], [second]),  # the answer's own beginning
        ([first, second], []),  # all of it
        # Other words: the answer follows them.
        (ids_of(chat, "apus is"), ids_of(chat, f" {edits(3)[0].target}")),
    ]
    for begun, rest in cases:
        ids = [*whole, *begun]
        expected = reply(chat.base, ids, rest, 4)
        assert generated(editor.model, ids, 4) == expected
        row = torch.tensor([ids])
        # Where it is stated that the reply begins earlier, it is the reply so far.
        said = editor.model.generate(
            row,
            attention_mask=torch.ones_like(row),
            prompt_lengths=[len(whole)],
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        assert said == (continued(chat.base, ids, 4) if len(begun) == 2 else expected)


# ------------------------------------------------------------------------------------------------ what follows an answer


@pytest.mark.parametrize("of_edit", [None, "stop", "continue"])
@pytest.mark.parametrize("of_memory", ["stop", "continue"])
def test_a_reply_stops_or_goes_on_as_its_edit_says_else_its_memory(
    chat: FactModel, of_memory: str, of_edit: str | None
) -> None:
    base: Any = deepcopy(chat.base)
    base.generation_config.eos_token_id = 2
    toy = FactModel(base, chat.tokenizer)
    editor = editor_of(toy, after=of_memory)
    (fact,) = edits(3)
    editor.edit([Edit(fact.prompt, fact.target, after=of_edit), *edits(0)])
    stops = (of_edit or of_memory) == "stop"
    end, line = ids_of(toy, "</s>"), ids_of(toy, "\n")
    raw, turn = ids_of(toy, str(fact.prompt)), asked_in_chat(toy, question(3))
    for ids, answer, ends in (
        (raw, ids_of(toy, f" {fact.target}"), [*line, *end]),
        (turn, ids_of(toy, fact.target), end),
    ):
        said = generated(editor.model, ids, 6)
        if stops:
            assert said == [*answer, *ends]
            # Teacher forcing expects the end too.
            row = torch.tensor([[*ids, *said]])
            with torch.no_grad():
                logits = editor.model(row, prompt_lengths=[len(ids)]).logits
            assert logits[0, len(ids) - 1 : -1].argmax(-1).tolist() == said
        else:
            expected = generated(base, [*ids, *answer], 6 - len(answer))
            assert said == [*answer, *expected] and said[len(answer)] not in (*end, *line)
    # Of another edit, the memory's own setting holds.
    (other,) = edits(0)
    said = generated(editor.model, ids_of(toy, str(other.prompt)), 6)
    assert (said[1:] == [*line, *end]) == (of_memory == "stop")


def test_without_a_token_that_ends_texts_a_line_break_ends_a_raw_reply(
    fact_model: FactModel,
) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(3))
    ids = ids_of(fact_model, prompts_of(3)[0])
    answer = [*ids_of(fact_model, f" {edits(3)[0].target}"), *ids_of(fact_model, "\n")]
    assert generated(editor.model, ids, COUNT) == reply(fact_model.base, ids, answer, COUNT)


def test_two_memories_in_a_batch_of_chats_answer_each_its_own_rows(chat: FactModel) -> None:
    editor = chat_editor(chat)
    editor.model.add_adapter("second", config(after="continue"))
    editor.model.set_adapter("second")
    MemoryEditor(editor.model, chat.tokenizer).edit(
        [Edit(fact.prompt, CAPITALS[20].answer) for fact in edits(0)]
    )
    ids = asked_in_chat(chat, question(0))
    rows = torch.tensor([ids] * 3)
    said = editor.model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        adapter_names=["default", "second", "__base__"],
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
    )[:, len(ids) :].tolist()
    targets = (edits(0)[0].target, CAPITALS[20].answer)
    assert said == [
        *(reply(chat.base, ids, ids_of(chat, target), 3) for target in targets),
        continued(chat.base, ids, 3),
    ]
