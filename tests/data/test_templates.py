"""Chat templates of a dozen families, in small variants of our own: where a reply begins, and what ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_baft import Edit, read_cases
from peft_baft.data.batching import encode, encode_prompt, prompt_text
from peft_baft.data.cases import Message
from peft_baft.data.templates import CHAT, RAW, Template, chosen_templates
from peft_baft.editing.editor import encode_edits
from peft_baft.evaluation.forward import answer_ids

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|/head|>"),
    *("<turn>", "<end_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
]
LOOP, END = "{% for m in messages %}", "{% endfor %}"
ROLE, TEXT = "{{ m['role'] }}", "{{ m['content'] }}"
CHATML_TURN = f"<|im_start|>{ROLE}\n{TEXT}<|im_end|>\n"
OPEN = "{% if add_generation_prompt %}"
CHATML_OPEN = OPEN + "<|im_start|>assistant\n{% endif %}"
IF_USER = "{% if m['role'] == 'user' %}"


def by_role(user: str, assistant: str, opening: str = "") -> str:
    """A template that renders users and others apart."""
    turns = f"{IF_USER}{user}{{% else %}}{assistant}{{% endif %}}"
    return f"{LOOP}{turns}{END}" + (f"{OPEN}{opening}{{% endif %}}" if opening else "")


# Name: the template, what it puts between its generation prompt and the answer, what ends the reply.
FAMILIES = {
    "chatml": (f"{LOOP}{CHATML_TURN}{END}{CHATML_OPEN}", "", "<|im_end|>"),
    "a default system prompt": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        f"{LOOP}{CHATML_TURN}{END}{CHATML_OPEN}",
        "",
        "<|im_end|>",
    ),
    "an empty thinking block": (
        f"{LOOP}<|im_start|>{ROLE}\n{{% if m['role'] == 'assistant' and loop.last %}}<think>\n\n</think>\n\n{{% endif %}}"
        f"{TEXT}<|im_end|>\n{END}{OPEN}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "headers": (
        f"<s>{LOOP}<|head|>{ROLE}<|/head|>\n\n{TEXT}<|eot|>{END}{OPEN}<|head|>assistant<|/head|>\n\n{{% endif %}}",
        "",
        "<|eot|>",
    ),
    "instructions in brackets": (
        "<s>" + by_role(f"[INST] {TEXT} [/INST]", f" {TEXT} </s>"),
        " ",
        " </s>",
    ),
    "brackets without a space": (
        "<s>" + by_role(f"[INST]{TEXT}[/INST]", f"{TEXT}</s>"),
        "",
        "</s>",
    ),
    "another name for the assistant": (
        "<s>"
        + by_role(
            f"<turn>user\n{TEXT}<end_turn>\n", f"<turn>model\n{TEXT}<end_turn>\n", "<turn>model\n"
        ),
        "",
        "<end_turn>",
    ),
    "roles as tokens": (
        by_role(f"<|user|>\n{TEXT}<|end|>\n", f"<|assistant|>\n{TEXT}<|end|>\n", "<|assistant|>\n"),
        "",
        "<|end|>",
    ),
    "an end of sequence after each turn": (
        f"{LOOP}<|{ROLE}|>\n{TEXT}</s>\n{END}{OPEN}<|assistant|>\n{{% endif %}}",
        "",
        "</s>",
    ),
    "words alone": (by_role(f"USER: {TEXT} ", f"ASSISTANT: {TEXT}</s>", "ASSISTANT:"), " ", "</s>"),
    "words alone, with no end": (by_role(f"Q: {TEXT}\n", f"A: {TEXT}\n", "A: "), "", "</s>"),
    "trimmed content": (
        f"{LOOP}<|im_start|>{ROLE}\n{{{{ m['content'] | trim }}}}<|im_end|>\n{END}{CHATML_OPEN}",
        "",
        "<|im_end|>",
    ),
    "a tool list": (
        "{% if tools %}<|im_start|>system\n{{ tools | length }} tools<|im_end|>\n{% endif %}"
        f"{LOOP}{CHATML_TURN}{END}{CHATML_OPEN}",
        "",
        "<|im_end|>",
    ),
}


def make_tokenizer(template: str | None) -> tr.PreTrainedTokenizerFast:
    """A tokenizer of single bytes, with special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.chat_template = template
    return fast


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[tr.PreTrainedTokenizerFast, str, str]:
    template, before, end = FAMILIES[request.param]
    return make_tokenizer(template), before, end


def test_what_is_trained_is_what_the_template_renders(family: Any) -> None:
    tokenizer, before, end = family
    row = encode(tokenizer, " What is it? ", " Lyon ", template=CHAT, end=True)
    question = [{"role": "user", "content": "What is it?"}]
    used = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    turn = [*question, {"role": "assistant", "content": "Lyon"}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False)
    assert (
        tokenizer.decode(list(row.ids[: row.prompt_length])) == used
    )  # to the letter: no strip, no space
    assert tokenizer.decode(list(row.ids[row.prompt_length :])) == f"{before}Lyon{end}"
    if (
        "</s>" in rendered or end != "</s>"
    ):  # else the template ends no turn, and the end of sequence does
        assert rendered.startswith(tokenizer.decode(list(row.ids)))
    # In use the model is given exactly these tokens.
    assert (
        encode_prompt(tokenizer, "What is it?", template=CHAT).ids == row.ids[: row.prompt_length]
    )
    assert prompt_text(tokenizer, "What is it?", template=CHAT) == used


def test_a_score_is_of_the_answer_alone(family: Any) -> None:
    tokenizer, before, _ = family
    scored = tokenizer.decode(answer_ids(encode(tokenizer, "What is it?", "Lyon", template=CHAT)))
    assert scored == (f"{before}Lyon" if before.isspace() else "Lyon")


def test_several_turns_and_a_system_prompt(family: Any) -> None:
    tokenizer, before, end = family
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello to you."},
        {"role": "user", "content": "What is it?"},
    ]
    edit = Edit(turns, "Lyon")
    assert edit.prompt == tuple(Message(**turn) for turn in turns) and hash(edit)
    # Messages are a chat whatever the form of texts, so both forms are one row.
    (rows,) = encode_edits(model_without_window(), tokenizer, [edit], (RAW, CHAT), end=True)
    (row,) = rows
    used = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(list(row.ids)) == f"{used}{before}Lyon{end}"


def test_both_forms_of_one_fact() -> None:
    tokenizer = make_tokenizer(FAMILIES["chatml"][0])
    templates = chosen_templates(tokenizer, "both")
    (rows,) = encode_edits(
        model_without_window(), tokenizer, [Edit("It is", "Lyon")], templates, end=True
    )
    raw, chat = (tokenizer.decode(list(row.ids)) for row in rows)
    assert raw == "It is Lyon\n"
    assert chat == "<|im_start|>user\nIt is<|im_end|>\n<|im_start|>assistant\nLyon<|im_end|>"


def test_the_end_is_learned_only_where_it_is_asked_for() -> None:
    tokenizer = make_tokenizer(FAMILIES["chatml"][0])
    for template, end in ((RAW, "\n"), (CHAT, "<|im_end|>")):
        without = encode(tokenizer, "It is", "Lyon", template=template)
        row = encode(tokenizer, "It is", "Lyon", template=template, end=True)
        assert row.ids[: len(without.ids)] == without.ids
        assert tokenizer.decode(list(row.ids[len(without.ids) :])) == end


def test_options_reach_the_template() -> None:
    tokenizer = make_tokenizer(FAMILIES["an empty thinking block"][0])
    quiet = Template(True, {"enable_thinking": False})
    row = encode(tokenizer, "It is", "Lyon", template=quiet, end=True)
    assert (
        tokenizer.decode(list(row.ids[row.prompt_length :])) == "Lyon<|im_end|>" and row.lead == 0
    )
    # Control: without the option, the block is a part of the reply.
    assert encode(tokenizer, "It is", "Lyon", template=CHAT).lead == len("<think>\n\n</think>\n\n")
    tools = make_tokenizer(FAMILIES["a tool list"][0])
    assert "2 tools" in prompt_text(tools, "It is", template=Template(True, {"tools": [{}, {}]}))


def test_what_cannot_be_known_is_refused() -> None:
    thinking = f"{LOOP}<|{ROLE}|>{TEXT}</s>{END}{OPEN}<|assistant|><think>\n{{% endif %}}"
    with pytest.raises(
        ValueError, match=r"renders '<think>\\n' before a reply is generated but 'Lyon"
    ):
        encode(make_tokenizer(thinking), "It is", "Lyon", template=CHAT)
    shouting = (
        f"{LOOP}<|{ROLE}|>{{{{ m['content'] | upper }}}}</s>{END}{OPEN}<|assistant|>{{% endif %}}"
    )
    with pytest.raises(ValueError, match="changes the answer 'Lyon'"):
        encode(make_tokenizer(shouting), "It is", "Lyon", template=CHAT)
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + FAMILIES["chatml"][0]
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "It is"}]
    with pytest.raises(ValueError, match="rejects messages with the roles system, user: no system"):
        encode_prompt(make_tokenizer(refusing), system)
    with pytest.raises(ValueError, match="no chat template"):
        encode(make_tokenizer(None), system, "Lyon")
    for form in ("chat", "both"):
        with pytest.raises(ValueError, match="this tokenizer has none"):
            chosen_templates(make_tokenizer(None), form)
    with pytest.raises(ValueError, match="one of auto, raw, chat, both, not 'Chat'"):
        chosen_templates(make_tokenizer(None), "Chat")


def test_auto_is_the_chat_template_where_there_is_one() -> None:
    assert chosen_templates(make_tokenizer(None), "auto") == (RAW,)
    assert chosen_templates(make_tokenizer(FAMILIES["chatml"][0]), "auto") == (CHAT,)


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        ([], TypeError, "a string or a list of messages, not list"),
        (7, TypeError, "not int"),
        ([{"role": "user"}], TypeError, "role and content only"),
        ([{"role": "user", "content": " "}], ValueError, "content is empty"),
        ([{"role": "assistant", "content": "Hi"}], ValueError, "it is the answer"),
    ],
)
def test_messages_that_are_none(prompt: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Edit(prompt, "Lyon")


def test_a_file_of_conversations(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "It is"}]
    answered = [*turns, {"role": "assistant", "content": "Lyon"}]
    file = tmp_path / "facts.jsonl"
    file.write_text(f"{json.dumps({'messages': answered, 'rephrase': 'So it is'})}\n")
    (case,) = read_cases(file)
    assert case.edit == Edit(turns, "Lyon") and case.probes[0].answer == "Lyon"
    file.write_text(json.dumps({"messages": turns, "target": "Lyon"}))
    assert read_cases(file)[0].edit == case.edit
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"messages": answered, "target": "Lyon"}, "the answer is given twice"),
        ({"messages": turns, "prompt": "It is", "target": "Lyon"}, "not both"),
        ({"messages": turns}, "'target' is missing"),
        (
            {"messages": [{"role": "user", "text": "It is"}], "target": "Lyon"},
            "unknown field 'text'",
        ),
    ]
    for record, says in wrong:
        file.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=says):
            read_cases(file)


def model_without_window() -> Any:
    """What `encode_edits` needs of a model."""
    return type("Model", (), {"config": tr.GPT2Config(n_positions=4096)})()
