"""A memory in the model's last block: while an answer is generated, it sets the block's output to produce the next token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.call import Call
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import EditContext
from peft_baft.adapter.kinds import Part
from peft_baft.adapter.state import evaluating
from peft_baft.adapter.texts import Text
from peft_baft.data.batching import context_window
from peft_baft.memory.answers import Answers
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.keys import KEY_LENGTH, key_states, states_to_keys
from peft_baft.memory.matching import NO_EDIT, Match, QuestionIndex, Thresholds
from peft_baft.memory.prompt_format import PromptFormat
from peft_baft.memory.question import Question
from peft_baft.memory.relations import Relations
from peft_baft.memory.tail import Tail
from peft_baft.memory.tensors import (
    StoredEdit,
    add_edits,
    edit_numbers,
    empty_tensors,
    select_edits,
    stored_edits,
    unpack_json,
)
from peft_baft.running import input_device

MOST_MATCHES = 4096  # matches that are cached


@dataclass(frozen=True)
class Reply:
    """The reply to a prompt.

    Attributes:
        ids: its tokens.
        vectors: (n, d) float32, for each token the output of the last block that produces it.
    """

    ids: tuple[int, ...]
    vectors: Tensor


@dataclass
class _Index:
    """What is computed from the tensors for the search. tensors: copies, which show whether other code has written to them."""

    tensors: dict[str, Tensor]
    edits: list[StoredEdit]
    prompt_format: PromptFormat
    questions: QuestionIndex
    matches: dict[tuple[int, ...], Match]


class MemoryPart(Part):
    """The edits of a memory, with their search and their output.

    Args:
        width: d, of the block's output.
        name: the adapter's name.
        block: the full name of the last block.
    """

    def __init__(
        self, config: BaftConfig, width: int, context: EditContext, name: str, block: str
    ) -> None:
        settings: MemoryConfig = config.settings
        super().__init__(empty_tensors(width, settings.key_dimensions))
        self._config, self._context, self._name, self._block = config, context, name, block
        self._index: _Index | None = None
        self._answers: Answers | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_answers": None}

    def changed(self) -> None:
        """Discard what was computed from the tensors."""
        self._index = None

    # ------------------------------------------------------------------------------------------------ answering

    @torch.compiler.disable
    @torch.no_grad()
    def change(
        self, hidden: Tensor, call: Call, only_rows: Collection[int] | None = None
    ) -> Tensor | None:
        """Compute the change of the block's output that produces the next tokens of answers, (rows, tokens, d) float32.

        None if no answer continues in this forward; the output is then bit-for-bit the base model's.

        Args:
            only_rows: in a mixed batch, the rows that use this memory.
        """
        if call.texts is None or not self.count:
            return None
        rows, columns, vectors = [], [], []
        for text in call.texts:
            if only_rows is not None and text.row not in only_rows:
                continue
            for column, vector in self._next_vectors(text):
                rows.append(text.row)
                columns.append(column)
                vectors.append(vector)
        if not rows:
            return None
        target = torch.stack(vectors).to(hidden.device)
        change = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        change[rows, columns] = target - hidden[rows, columns].float()
        return change

    def _next_vectors(self, text: Text) -> list[tuple[int, Tensor]]:
        """Return the columns of a text after which its answer continues, each with the vector of the next token."""
        last = text.first + len(text.columns) - 1
        if last < -1:  # the prompt continues in the next forward
            return []
        if self not in text.notes:
            text.notes[self] = self.reply_to(text.prompt)
        reply: Reply | None = text.notes[self]
        found: list[tuple[int, Tensor]] = []
        if reply is None:
            return found
        start = max(0, text.first + 1)
        if text.reply[:start] != reply.ids[:start]:
            return found
        for number in range(start, min(len(reply.ids), last + 2)):
            if number > start and text.reply[number - 1] != reply.ids[number - 1]:
                break
            column = text.column(number - 1)
            if column is not None:
                found.append((column, reply.vectors[number]))
        return found

    def reply_to(self, prompt: Sequence[int]) -> Reply | None:
        """Return the reply to a prompt of these tokens; None if no edit answers it."""
        index = self.index()
        split = index.prompt_format.split(prompt)
        (match,) = self.find([split.question])
        if match.edit == NO_EDIT:
            return None
        edit = index.edits[match.edit]
        ids = index.prompt_format.reply(split, edit.spaced, edit.bare, stops=edit.stops)
        return Reply(ids, self.answers().vectors(ids)[0]) if ids else None

    def answering(self, prompt: Sequence[int]) -> int | None:
        """Return the number of the edit that answers a prompt of these tokens; None if none does."""
        (match,) = self.find([self.index().prompt_format.split(prompt).question])
        return None if match.edit == NO_EDIT else self.numbers()[match.edit]

    def answers(self) -> Answers:
        """Return the vectors that produce tokens, for the model's current weights.

        Raises:
            NotImplementedError: the modules after the last block could not be replayed.
        """
        if self._answers is None or not self._answers.tail.is_current():
            model: Any = self._context.model
            device = input_device(model)

            def run(ids: Tensor) -> Tensor:
                mask = torch.ones_like(ids, dtype=torch.bool)
                return self._context.run_base(ids.to(device), mask.to(device), self._name)

            with torch.inference_mode(False), torch.no_grad(), evaluating(model):
                tail = Tail.of(model, model.get_submodule(self._block), run)
                self._answers = Answers(tail)
        return self._answers

    # ------------------------------------------------------------------------------------------------- search

    def find(self, questions: Sequence[tuple[int, ...]]) -> list[Match]:
        """Find the edit that each question asks for.

        Args:
            questions: token ids, including the token that always precedes them.
        """
        index = self.index()
        settings: MemoryConfig = self._config.settings
        thresholds = Thresholds(settings.least_subject, settings.strictness, settings.most_unlike)
        questions = [self._truncated(question) for question in questions]
        new = [question for question in dict.fromkeys(questions) if question not in index.matches]
        if len(index.matches) > MOST_MATCHES:
            index.matches.clear()
            new = list(dict.fromkeys(questions))
        for question, keys in zip(new, self.make_keys(new), strict=True):
            ids = torch.tensor(question, dtype=torch.int32)
            index.matches[question] = index.questions.match(Question(ids, keys), thresholds)
        return [index.matches[question] for question in questions]

    def _truncated(self, question: tuple[int, ...]) -> tuple[int, ...]:
        """Return a question with its first token and as many of its last ones as fit into the model's context window.

        A prompt may fill the window without that token.
        """
        window = context_window(self._context.model) or len(question)
        excess = len(question) - window
        return question if excess <= 0 else (question[0], *question[1 + excess :])

    def make_keys(self, questions: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Compute the keys (n - 1, k) int8 of questions' tokens, except the first token of each."""
        states = key_states(self._context, self._name, questions) if questions else []
        mean, whitening = (self.tensors()[name] for name in ("mean", "whitening"))
        return [states_to_keys(found[1:], mean, whitening).cpu() for found in states]

    def index(self) -> _Index:
        """Return the search index. It is built when it is needed, and rebuilt after the tensors have changed."""
        tensors = self.tensors()
        if self._index is not None:
            known = self._index.tensors
            if all(_equal(known[name], tensors[name]) for name in known):
                return self._index
        prompt_format = PromptFormat.from_json(unpack_json(tensors["reading"]))
        edits = stored_edits(tensors)
        # Before the model is measured, the tensors of relations hold placeholders.
        count = None if prompt_format.relations else 0
        keys = tensors["relation_keys"][:count].cpu().float() / KEY_LENGTH
        relations = Relations(keys, tensors["wordings"][:count], prompt_format.relations)
        questions = QuestionIndex(
            [_question(edit) for edit in edits], prompt_format.texts, relations
        )
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self._index = _Index(copies, edits, prompt_format, questions, {})
        return self._index

    # ------------------------------------------------------------------------------------------------- editing

    @property
    def count(self) -> int:
        """The number of edits."""
        return len(self.tensors()["edits"]) - 1

    @property
    def is_measured(self) -> bool:
        """Whether the memory has measurements of the base model."""
        return bool(self.index().prompt_format.texts)

    def numbers(self) -> list[int]:
        """The numbers of the edits, in the order in which they were made."""
        return edit_numbers(self.tensors())

    def add(self, edits: Sequence[StoredEdit]) -> None:
        """Append edits. Their questions must differ from those of the existing edits."""
        index = self.index()
        changed = add_edits(self.tensors(), edits)
        self.replace(changed)
        # The index is extended: rebuilding it after each edit would take time proportional to the number of edits.
        index.tensors |= {name: tensor.clone() for name, tensor in changed.items()}
        index.edits += edits
        index.questions.add([_question(edit) for edit in edits])
        index.matches.clear()
        self._index = index

    def keep_only(self, places: Sequence[int]) -> None:
        """Remove all edits except those at some places."""
        if len(places) < self.count:
            edits = self.index().edits
            self.replace(select_edits(self.tensors(), [edits[place] for place in places]))


def _question(edit: StoredEdit) -> Question:
    return Question(torch.tensor(edit.question, dtype=torch.int32), edit.keys)


def _equal(one: Tensor, other: Tensor) -> bool:
    # Values are compared because writing through `.data` leaves no other trace.
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
