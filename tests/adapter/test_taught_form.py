"""An adapter remembers the form in which its facts were taught, and is asked in it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME

import facts
from facts import CAPITALS, DESCENT, OBJECTIVE, FactModel, adapted
from peft_baft import NARROW, BaftConfig, BaftEditor, DescentConfig, Edit, Journal, rolled_back
from peft_baft.adapter.taught_form import asked_form, remember, taught_form, warn_of_another
from peft_baft.data.templates import chosen_templates
from peft_baft.editing.continual import edit_continually

fact_model = facts.fact_model
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s> {{ m['content'] }}"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
FACT = Edit(CAPITALS[0].prompt, CAPITALS[8].answer)
OTHER = Edit(CAPITALS[1].prompt, CAPITALS[9].answer)


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = facts.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def editor(model: PeftModel, tokenizer: Any, **given: Any) -> BaftEditor:
    return BaftEditor(model, tokenizer, (), OBJECTIVE, DESCENT, DESCENT, scope=NARROW, **given)


def form_of(model: PeftModel, name: str = "default") -> tuple[str | None, bool]:
    config: Any = model.peft_config[name]
    return config.template, config.template_hash is not None


def saved_form(folder: Path) -> tuple[str | None, bool]:
    config = json.loads((folder / CONFIG_NAME).read_text())
    return config["template"], config["template_hash"] is not None


def test_an_editor_writes_the_form_that_it_taught_in(fact_model: FactModel) -> None:
    for template, expected in (
        ("raw", ("raw", False)),
        ("chat", ("chat", True)),
        ("both", ("both", True)),
        ("auto", ("chat", True)),
    ):
        model = adapted(fact_model.base)
        assert form_of(model) == (None, False)
        editor(model, chat_tokenizer(), template=template).edit([FACT])
        assert form_of(model) == expected


def test_a_reloaded_adapter_is_taught_and_asked_in_its_own_form(
    fact_model: FactModel, tmp_path: Path
) -> None:
    model, tokenizer = adapted(fact_model.base), chat_tokenizer()
    editor(model, tokenizer, template="raw").edit([FACT])
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(fact_model.base, str(tmp_path), is_trainable=True)
    try:
        assert form_of(loaded) == ("raw", False)
        assert editor(loaded, tokenizer).templates == chosen_templates(tokenizer, "raw")
        assert editor(loaded, tokenizer, template="chat").templates[0].chat
    finally:
        loaded.unload()


def test_what_was_taught_in_two_forms_is_both_and_asked_as_a_chat(fact_model: FactModel) -> None:
    model, tokenizer = adapted(fact_model.base), chat_tokenizer()
    editor(model, tokenizer, template="raw").edit([FACT])
    editor(model, tokenizer, template="chat").edit([OTHER])
    assert form_of(model) == ("both", True)
    assert asked_form(model.peft_config["default"]) == "chat"
    assert len(editor(model, tokenizer).templates) == 2


def test_messages_are_a_chat_also_for_an_editor_of_raw_text(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    asked = Edit([{"role": "user", "content": FACT.prompt}], FACT.target)
    editor(model, chat_tokenizer(), template="raw").edit([asked])
    assert form_of(model) == ("chat", True)


def test_an_edit_that_fails_or_is_taken_back_leaves_no_memory(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    failing = editor(model, chat_tokenizer(), template="chat")
    restore = failing.snapshot()
    failing.descent = DescentConfig(lr=1e30, max_steps=3)
    with pytest.raises(FloatingPointError):
        failing.edit([FACT])
    assert form_of(model) == (None, False)
    failing.descent = DESCENT
    failing.edit([FACT])
    assert form_of(model) == ("chat", True)
    restore()
    assert form_of(model) == (None, False)


def test_each_adapter_of_edits_side_by_side_remembers(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    names = [name for name, _ in editor(model, chat_tokenizer()).edit_each([FACT, OTHER])]
    assert [form_of(model, name) for name in names] == [("chat", True)] * 2
    assert form_of(model) == (None, False)


def test_a_run_that_goes_on_from_its_journal_remembers_too(
    fact_model: FactModel, tmp_path: Path
) -> None:
    first = editor(adapted(fact_model.base), chat_tokenizer())
    list(edit_continually(first, [FACT, OTHER], journal=Journal(tmp_path)))
    again = editor(adapted(fact_model.base), chat_tokenizer())
    records = list(edit_continually(again, [FACT, OTHER], journal=Journal(tmp_path), resume=True))
    assert len(records) == 2
    assert form_of(again.model) == ("chat", True)


def test_single_editing_leaves_no_memory(fact_model: FactModel) -> None:
    model = adapted(fact_model.base)
    with rolled_back(model):
        editor(model, chat_tokenizer(), template="chat").edit([FACT])
        assert form_of(model) == ("chat", True)
    assert form_of(model) == (None, False)


def test_a_resumed_run_remembers_what_was_taught_and_not_what_its_editor_is_for(
    fact_model: FactModel, tmp_path: Path
) -> None:
    asked = Edit([{"role": "user", "content": FACT.prompt}], FACT.target)
    first = editor(adapted(fact_model.base), chat_tokenizer(), template="raw")
    list(edit_continually(first, [asked], journal=Journal(tmp_path)))
    assert form_of(first.model) == ("chat", True)
    again = editor(adapted(fact_model.base), chat_tokenizer(), template="raw")
    list(edit_continually(again, [asked], journal=Journal(tmp_path), resume=True))
    assert form_of(again.model) == ("chat", True)


def test_a_resumed_run_does_not_remember_what_was_taken_back(
    fact_model: FactModel, tmp_path: Path
) -> None:
    def run(resume: bool) -> BaftEditor:
        made = editor(adapted(fact_model.base), chat_tokenizer(), template="chat")
        given: dict[str, Any] = {"check": lambda: "harm", "keep_only_good": True}
        list(edit_continually(made, [FACT], journal=Journal(tmp_path), resume=resume, **given))
        return made

    assert form_of(run(resume=False).model) == (None, False)
    assert form_of(run(resume=True).model) == (None, False)


def test_rolling_back_a_folder_brings_its_form_back(fact_model: FactModel, tmp_path: Path) -> None:
    model, tokenizer = adapted(fact_model.base), chat_tokenizer()
    raw = editor(model, tokenizer, template="raw")
    list(edit_continually(raw, [FACT], journal=Journal(tmp_path)))
    chat = editor(model, tokenizer, template="chat")
    list(edit_continually(chat, [OTHER], journal=Journal(tmp_path)))
    model.save_pretrained(str(tmp_path))
    assert saved_form(tmp_path) == ("both", True)
    Journal(tmp_path).roll_back(1)
    assert saved_form(tmp_path) == ("raw", False)
    Journal(tmp_path).roll_back(0)
    assert saved_form(tmp_path) == (None, False)


def test_an_adapter_from_before_the_memory_loads_and_is_asked_in_raw_text(
    fact_model: FactModel, tmp_path: Path
) -> None:
    model, tokenizer = adapted(fact_model.base), chat_tokenizer()
    editor(model, tokenizer, template="chat").edit([FACT])
    model.save_pretrained(str(tmp_path))
    file = tmp_path / CONFIG_NAME
    config = json.loads(file.read_text())
    del config["template"], config["template_hash"]
    file.write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(fact_model.base, str(tmp_path))
    try:
        assert form_of(loaded) == (None, False)
        assert asked_form(loaded.peft_config["default"]) == "raw"
    finally:
        loaded.unload()


def test_another_form_or_another_template_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, tokenizer = BaftConfig(), chat_tokenizer()
    with caplog.at_level(logging.WARNING):
        warn_of_another(config, {"raw"}, tokenizer)
        assert not caplog.messages  # nothing is known
        remember(config, "chat", tokenizer)
        warn_of_another(config, {"chat"}, tokenizer)
        assert not caplog.messages
        warn_of_another(config, {"raw"}, tokenizer)
        assert (
            "taught in the prompt format 'chat', and are now used in 'raw'" in caplog.messages[-1]
        )
        warn_of_another(config, {"chat"}, chat_tokenizer(TEMPLATE + " "))
        assert "taught in another chat template" in caplog.messages[-1]


def test_an_adapter_of_another_method_has_no_memory() -> None:
    config = LoraConfig()
    remember(config, "chat", chat_tokenizer())
    assert taught_form(config) is None
    assert asked_form(config) == "raw"


def test_a_config_holds_a_form_or_nothing() -> None:
    with pytest.raises(ValueError, match="template"):
        BaftConfig(template="haiku")
