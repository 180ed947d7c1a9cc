"""Texts around an edit's prompt, which test whether the edit works in contexts it was not trained in.

They are never used in training. The contexts for training are in `data/contexts.py`; a test checks that the two do not overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from peft_baft.data.cases import Message, Prompt, as_messages
from peft_baft.data.contexts import Context
from peft_baft.data.templates import Template, chat_prompt, is_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# By name. Scores are averaged by frame, with its name as the topic.
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
    """Return the frames for a prompt's format, by name. Prompts of messages are a chat under any template."""
    return CHAT_FRAMES if is_chat(prompt, template) else RAW_FRAMES


def framed(
    prompt: Prompt, template: Template, names: Sequence[str] | None = None
) -> dict[str, Prompt]:
    """Return a prompt inside each frame, by the frame's name.

    A frame that does not change the prompt is left out: a system prompt has no effect on messages that already have one.

    Args:
        names: the frames to use; None for all.
    """
    prompts = {}
    for name, frame in frames_of(prompt, template).items():
        around = frame.around(prompt)
        unchanged = as_messages(around) == as_messages(prompt)
        if not unchanged and (names is None or name in names):
            prompts[name] = around
    return prompts


def frames_that_render(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompts: Iterable[Prompt] = ("Where?",),
) -> list[str]:
    """List the frames that a chat template can render: some templates reject system prompts, for example Gemma's.

    Args:
        prompts: the prompts that will be framed. If they include both texts and messages, frames of both formats are listed.

    Raises:
        ValueError: the template rejects all chat frames.
    """
    forms = {is_chat(prompt, template) for prompt in prompts}
    names = list(RAW_FRAMES) if False in forms else []
    if True in forms:
        names += _chat_frames_that_render(tokenizer, template)
    return names


def _chat_frames_that_render(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    names, refusals = [], []
    for name, frame in CHAT_FRAMES.items():
        try:
            chat_prompt(tokenizer, frame.around("Where?"), template.options)
            names.append(name)
        except ValueError as error:
            refusals.append(str(error))
    if not names:
        raise ValueError(f"This model's chat template rejects all frames. {refusals[0]}")
    return names


def described_frames(names: Sequence[str]) -> dict[str, Any]:
    """Return the names of the frames and a hash of their texts, for a result line."""
    frames = CHAT_FRAMES | RAW_FRAMES
    texts = [[name, repr(frames[name])] for name in names]
    digest = sha256(json.dumps(texts).encode()).hexdigest()
    return {"frames": list(names), "sha256": digest[:12]}
