"""Prompt formats: raw text, or a turn of a chat in the tokenizer's chat template.

Only the output of a chat template is known. Where the assistant's reply begins, what the template puts before the answer (an
empty thinking block, a space) and what ends the turn is found by comparing renderings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from peft_baft.data.cases import Message, Prompt, as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = ("auto", "raw", "chat", "both")
# Answers to compare a rendering with. The one is used that the real answer neither begins nor ends with.
PLACEHOLDERS = "◆◇"


@dataclass(frozen=True)
class Template:
    """A prompt format.

    A prompt of messages is a chat in every format.

    Args:
        chat: whether a text is rendered as a user message in the tokenizer's chat template, or used as raw text.
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
    """The consecutive parts of a rendered chat: the prompt, the text before the answer, the answer, and the end of the turn."""

    prompt: str
    before: str
    answer: str
    end: str


def chosen_templates(
    tokenizer: PreTrainedTokenizerBase,
    form: str | Template,
    options: Mapping[str, Any] | None = None,
    taught: str | None = None,
) -> tuple[Template, ...]:
    """Return the templates that the name of a format stands for: one, or two for `both`.

    Args:
        form: `raw`, `chat`, `both`, or `auto`, which is `taught` if that is given, else `chat` if the tokenizer has a chat
            template, else `raw`. A `Template` is returned as it is.
        options: further arguments of `apply_chat_template`, used if the format is given by name.
        taught: the format that the adapter was trained on so far.

    Raises:
        ValueError: there is no such format, or it needs a chat template and the tokenizer has none.
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
            f"template={form!r} needs a chat template, and this tokenizer has none; use template='raw'."
        )
    chat = Template(True, dict(options or {}))
    if form == "both":
        return RAW, chat
    is_chat_form = form == "chat" or (form == "auto" and has_chat)
    return (chat,) if is_chat_form else (RAW,)


def is_chat(prompt: Prompt, template: Template) -> bool:
    """Check whether a prompt is rendered as a chat."""
    return template.chat or not isinstance(prompt, str)


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, options: Mapping[str, Any]
) -> str:
    """Render a prompt as a chat, up to the beginning of the assistant's reply.

    Raises:
        ValueError: the tokenizer has no chat template, or the template rejects these messages.
    """
    return _render(tokenizer, as_messages(prompt), options, add_generation_prompt=True)


def chat_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, options: Mapping[str, Any]
) -> Rendering:
    """Render a prompt with the assistant's reply, and find the parts of the reply.

    Raises:
        ValueError: as `chat_prompt`; or the rendered reply does not follow the template's generation prompt; or the template
            changes the text of the answer.
    """
    messages = as_messages(prompt)
    question = _render(tokenizer, messages, options, add_generation_prompt=True)
    reply = _reply(tokenizer, messages, question, answer, options)
    placeholder = next(mark for mark in PLACEHOLDERS if mark not in (answer[0], answer[-1]))
    other = _reply(tokenizer, messages, question, placeholder, options)
    before = _shared_start(reply, other)
    end = _shared_start(reply[::-1], other[::-1])[::-1]
    if reply != before + answer + end:
        raise ValueError(
            f"The chat template changes the answer {answer!r:.60} to {reply!r:.80}; write the answer as the template renders it, "
            "or use raw text."
        )
    return Rendering(question, before, answer, end)


def _reply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    question: str,
    answer: str,
    options: Mapping[str, Any],
) -> str:
    """Return what the template renders after the generation prompt if the assistant gives this answer."""
    turns = [*messages, Message("assistant", answer)]
    whole = _render(tokenizer, turns, options, add_generation_prompt=False)
    if not whole.startswith(question):
        shared = len(_shared_start(whole, question))
        raise ValueError(
            f"The chat template renders {question[shared:]!r:.60} before a reply is generated but {whole[shared:]!r:.60} if the "
            "reply is part of the conversation, so the beginning of the reply is unknown. Set the template option that makes "
            "them agree (such as enable_thinking=False), or use raw text."
        )
    return whole[len(question) :]


def _shared_start(first: str, second: str) -> str:
    """Return the longest common prefix of two texts."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("This tokenizer has no chat template; use raw text instead.")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: Any = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(
            f"The chat template rejects messages with the roles {roles}: {error}. Use roles that the template supports."
        ) from error
    return str(text)
