"""The forms in which a fact is put to a model: as raw text, or as a turn of a chat in the tokenizer's own template.

A template is only known by what it renders. Where the assistant's reply begins, what the template puts before the answer (an
empty thinking block, a space) and what ends the turn are found by comparing renderings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from peft_baft.data.cases import Message, Prompt, as_messages

FORMS = ("auto", "raw", "chat", "both")
PLACEHOLDERS = (
    "◆◇"  # an answer to compare with; the one that the real answer does not begin or end with
)


@dataclass(frozen=True)
class Template:
    """A form in which prompts are put to a model.

    A prompt of messages is put to it as a chat in either form.

    Args:
        chat: whether a text is a user's message in the tokenizer's chat template; else it is raw text.
        options: further arguments of `apply_chat_template`, such as `enable_thinking` or `tools`.
    """

    chat: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`raw` or `chat`."""
        return "chat" if self.chat else "raw"


RAW, CHAT = Template(), Template(chat=True)


@dataclass(frozen=True)
class Rendering:
    """The texts that a model reads and says one after another: prompt, what comes before the answer, answer, end of the turn."""

    prompt: str
    before: str
    answer: str
    end: str


def chosen_templates(
    tokenizer: Any,
    form: str | Template,
    options: Mapping[str, Any] | None = None,
    taught: str | None = None,
) -> tuple[Template, ...]:
    """List the templates that a form stands for: one, or two for `both`.

    Args:
        form: `raw`, `chat`, `both`, or `auto`: the form `taught` where that is known, else the chat template where the tokenizer
            has one, else raw text. A `Template` stands for itself.
        options: further arguments of `apply_chat_template`, where the form is a name.
        taught: the form in which an adapter's facts were taught before.

    Raises:
        ValueError: there is no such form, or the form needs a chat template and the tokenizer has none.
    """
    if isinstance(form, Template):
        return (form,)
    if form not in FORMS:
        raise ValueError(f"template must be one of {', '.join(FORMS)}, not {form!r}.")
    if form == "auto" and taught is not None:
        form = taught
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if form in ("chat", "both") and not has_chat:
        raise ValueError(
            f"template={form!r} needs a chat template, and this tokenizer has none; take template='raw'."
        )
    chat = Template(True, dict(options or {}))
    if form == "both":
        return RAW, chat
    return (chat,) if form == "chat" or (form == "auto" and has_chat) else (RAW,)


def is_chat(prompt: Prompt, template: Template) -> bool:
    """Tell whether a prompt is put to the model as a chat."""
    return template.chat or not isinstance(prompt, str)


def chat_prompt(tokenizer: Any, prompt: Prompt, options: Mapping[str, Any]) -> str:
    """Render a prompt as a chat, up to where the assistant's reply begins.

    Raises:
        ValueError: the tokenizer has no chat template, or it refuses these messages.
    """
    return _render(tokenizer, as_messages(prompt), options, add_generation_prompt=True)


def chat_turn(tokenizer: Any, prompt: Prompt, answer: str, options: Mapping[str, Any]) -> Rendering:
    """Render a prompt and the assistant's reply to it, and find the parts of that reply.

    Raises:
        ValueError: as `chat_prompt`; or the template renders the reply elsewhere than behind its own generation prompt, or
            changes the answer's text.
    """
    messages = as_messages(prompt)
    question = _render(tokenizer, messages, options, add_generation_prompt=True)
    reply = _reply(tokenizer, messages, question, answer, options)
    unlike = next(mark for mark in PLACEHOLDERS if answer[0] != mark != answer[-1])
    other = _reply(tokenizer, messages, question, unlike, options)
    before = _shared_start(reply, other)
    end = _shared_start(reply[::-1], other[::-1])[::-1]
    if reply != before + answer + end:
        raise ValueError(
            f"The chat template changes the answer {answer!r:.60} to {reply!r:.80}; give the answer as the template renders it, "
            "or teach it as raw text."
        )
    return Rendering(question, before, answer, end)


def _reply(
    tokenizer: Any,
    messages: Sequence[Message],
    question: str,
    answer: str,
    options: Mapping[str, Any],
) -> str:
    """Render what follows the generation prompt where the assistant answers."""
    turns = [*messages, Message("assistant", answer)]
    whole = _render(tokenizer, turns, options, add_generation_prompt=False)
    if not whole.startswith(question):
        shared = len(_shared_start(whole, question))
        raise ValueError(
            f"The chat template asks with {question[shared:]!r:.60} and renders a reply with {whole[shared:]!r:.60}, so where "
            "the reply begins cannot be known. Give the template's option that makes them agree (such as "
            "enable_thinking=False), or teach raw text."
        )
    return whole[len(question) :]


def _shared_start(first: str, second: str) -> str:
    """Return what two texts have in common at their beginnings."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("This tokenizer has no chat template; use raw text instead.")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(
            f"The chat template refuses messages of {roles}: {error}. Give messages that the model was trained on."
        ) from error
