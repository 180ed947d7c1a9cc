"""A conversation with an edited model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from peft_baft.adapter.state import evaluating, without_adapters
from peft_baft.data.batching import context_window, encode_prompt
from peft_baft.data.cases import Message
from peft_baft.data.templates import Template
from peft_baft.evaluation.forward import greedy_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Conversation:
    """A conversation with a model.

    Args:
        model: the model, with its adapters active. tokenizer: the model's tokenizer, with a chat template.
        system: the system prompt; None for the template's default.
        options: further arguments of `apply_chat_template`.
        max_new_tokens: the maximum length of an answer.
        turns: the conversation so far.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 64
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "This tokenizer has no chat template, so the model cannot be used in a chat; prompt it in raw text with "
                "baft ask --template raw."
            )
        self.restart()

    def restart(self) -> None:
        """Start again with only the system prompt."""
        self.turns = [] if self.system is None else [Message("system", self.system)]

    def say(self, question: str) -> str:
        """Ask a question and return the edited model's answer. Both become part of the conversation.

        Raises:
            ValueError: the question is empty, or the conversation is longer than the context window. The question is not
                added to the conversation.
        """
        messages = [*self.turns, Message("user", question)]
        answer = self._answer(messages, edited=True)
        # A message must not be empty, so an ellipsis stands for an empty answer.
        self.turns = [*messages, Message("assistant", answer or "…")]
        return answer

    def unedited(self) -> str:
        """Return the unedited model's answer to the last question, after the same turns.

        Raises:
            ValueError: no question has been asked yet.
        """
        if not self.turns or self.turns[-1].role != "assistant":
            raise ValueError("No question has been asked yet.")
        return self._answer(self.turns[:-1], edited=False)

    def _answer(self, messages: list[Message], edited: bool) -> str:
        row = encode_prompt(self.tokenizer, messages, template=Template(True, self.options))
        window = context_window(self.model)
        if window is not None and len(row.ids) >= window:
            raise ValueError(
                f"The conversation has {len(row.ids)} tokens, but the context window is {window}; start a new conversation."
            )
        with evaluating(self.model), nullcontext() if edited else without_adapters(self.model):
            (tokens,) = greedy_tokens(self.model, self.tokenizer, [row], [self.max_new_tokens])
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
