"""A conversation with an edited model, turn after turn."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel

from peft_baft.adapter.state import evaluating, without_adapters
from peft_baft.data.batching import context_window, encode_prompt
from peft_baft.data.cases import Message
from peft_baft.data.templates import Template
from peft_baft.evaluation.forward import greedy_tokens


@dataclass
class Conversation:
    """The turns so far, and the model that answers.

    Args:
        model: with its adapters active. tokenizer: the model's own, with a chat template.
        system: the system prompt; None for the template's own, if it has one.
        options: further arguments of `apply_chat_template`.
        max_new_tokens: the longest answer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    model: PeftModel
    tokenizer: Any
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 64
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "This tokenizer has no chat template, so nobody can chat with the model; ask it in raw text: "
                "baft ask --template raw."
            )
        self.again()

    def again(self) -> None:
        """Forget all turns but the system prompt."""
        self.turns = [] if self.system is None else [Message("system", self.system)]

    def say(self, question: str) -> str:
        """Put a question, and return the edited model's answer, which becomes part of the conversation.

        Raises:
            ValueError: the question is empty, or the conversation has become longer than the model can read. It is then as it
                was before the question.
        """
        asked = [*self.turns, Message("user", question)]
        answer = self._answer(asked, edited=True)
        # A turn of the assistant holds something; an empty answer is put as an ellipsis.
        self.turns = [*asked, Message("assistant", answer or "…")]
        return answer

    def unedited(self) -> str:
        """Return what the model without the edits would have said to the last question, after the same turns.

        Raises:
            ValueError: nothing was asked yet.
        """
        if not self.turns or self.turns[-1].role != "assistant":
            raise ValueError("Nothing was asked yet.")
        return self._answer(self.turns[:-1], edited=False)

    def _answer(self, messages: list[Message], edited: bool) -> str:
        row = encode_prompt(self.tokenizer, messages, template=Template(True, self.options))
        window = context_window(self.model)
        if window is not None and len(row.ids) >= window:
            raise ValueError(
                f"The conversation has {len(row.ids)} tokens, and the model reads at most {window}; begin again."
            )
        with evaluating(self.model), nullcontext() if edited else without_adapters(self.model):
            (tokens,) = greedy_tokens(self.model, self.tokenizer, [row], [self.max_new_tokens])
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
