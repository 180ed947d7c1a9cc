"""What a benchmark puts around an edit's prompt, to see whether the fact also holds in a context that it was not learned in.

Training never sees these texts: `data/contexts.py` has its own, and a test holds the two apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

from peft_baft.data.cases import Message, Prompt, as_messages
from peft_baft.data.contexts import Context
from peft_baft.data.templates import Template, chat_prompt, is_chat

# By name, which is the topic under which a frame's replies are averaged.
CHAT_FRAMES = {
    "system prompt": Context(system="You work at the information desk of a museum of technology."),
    "earlier turn": Context(
        turns=(
            Message("user", "My bicycle squeaks when I brake. What can I do?"),
            Message(
                "assistant", "Clean the rims and the brake pads first, and then check the cable."
            ),
        )
    ),
    "lead-in sentence": Context(before="My neighbour asked me this on the stairs today."),
    "longer request": Context(
        before="I am putting together a quiz for my sister's birthday on Saturday, with ten rounds and a small prize for the "
        "winner. For round seven I still need the answer to this:",
        after="One short sentence is enough.",
    ),
    "polite paraphrase": Context(before="Would you be so kind as to answer this for me:"),
}

RAW_FRAMES = {
    "a sentence": Context(before="The train was ten minutes late again."),
    "two sentences": Context(
        before="Spring came early that year. The gardens along the canal were already green."
    ),
    "a heading": Context(before="From our readers' letters:"),
}


def frames_of(prompt: Prompt, template: Template) -> dict[str, Context]:
    """Give the frames of the form in which a prompt is put to a model, by name; messages are a chat in either form."""
    return CHAT_FRAMES if is_chat(prompt, template) else RAW_FRAMES


def framed(
    prompt: Prompt, template: Template, names: Sequence[str] | None = None
) -> dict[str, Prompt]:
    """Put every frame around a prompt: a text, or messages, by the frame's name.

    A system prompt is left out where the prompt has one of its own, which stays: nothing would be asked in another way.

    Args:
        names: the frames to take; None takes all.
    """
    prompts = {}
    for name, frame in frames_of(prompt, template).items():
        around = frame.around(prompt)
        unchanged = as_messages(around) == as_messages(prompt)
        if not unchanged and (names is None or name in names):
            prompts[name] = around
    return prompts


def frames_that_render(
    tokenizer: Any, template: Template, prompts: Iterable[Prompt] = ("Where?",)
) -> list[str]:
    """List the frames that can be put to a model: a chat template may refuse a system prompt, as Gemma's does.

    Args:
        prompts: what is to be asked; messages among texts need the frames of both forms.

    Raises:
        ValueError: the template refuses all frames of a chat.
    """
    forms = {is_chat(prompt, template) for prompt in prompts}
    names = list(RAW_FRAMES) if False in forms else []
    if True in forms:
        names += _chat_frames_that_render(tokenizer, template)
    return names


def _chat_frames_that_render(tokenizer: Any, template: Template) -> list[str]:
    names, refusals = [], []
    for name, frame in CHAT_FRAMES.items():
        try:
            chat_prompt(tokenizer, frame.around("Where?"), template.options)
            names.append(name)
        except ValueError as error:
            refusals.append(str(error))
    if not names:
        raise ValueError(f"No frame can be put to this model. {refusals[0]}")
    return names


def described_frames(names: Sequence[str]) -> dict[str, Any]:
    """Name the frames as they stand in a result line, with a hash of their texts."""
    frames = CHAT_FRAMES | RAW_FRAMES
    texts = [[name, repr(frames[name])] for name in names]
    digest = sha256(json.dumps(texts).encode()).hexdigest()
    return {"frames": list(names), "sha256": digest[:12]}
