"""A memory in the model's last block: where a routed answer goes on, the block's output is set to what says its next token."""

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
from peft_baft.memory.keys import INT8, key_states, keys_of
from peft_baft.memory.matching import NOWHERE, Match, Question, Questions, Thresholds
from peft_baft.memory.reading import Reading
from peft_baft.memory.relations import Relations
from peft_baft.memory.tail import Tail
from peft_baft.memory.tensors import (
    OF_EDITS,
    StoredEdit,
    empty_tensors,
    numbers_of,
    stored_edits,
    unpacked,
    with_edits,
)
from peft_baft.running import input_device

MOST_FOUND = 4096  # questions of which is remembered what they were found to ask for


@dataclass(frozen=True)
class Reply:
    """What answers a prompt. ids: of its tokens; vectors: (n, d) float32, what the last block's output is set to for each."""

    ids: tuple[int, ...]
    vectors: Tensor


@dataclass
class _Index:
    """What was made of the tensors to search them, and copies of these, to see whether somebody else has written into them."""

    tensors: dict[str, Tensor]
    edits: list[StoredEdit]
    reading: Reading
    questions: Questions
    found: dict[tuple[int, ...], Match]


class MemoryPart(Part):
    """The edits of a memory, and what finds and says them.

    Args:
        width: d, of the block's output. name: of the adapter. block: full name of the last block.
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
        """Forget what was made of the tensors."""
        self._index = None

    # ------------------------------------------------------------------------------------------------ answering

    @torch.compiler.disable
    @torch.no_grad()
    def change(
        self, hidden: Tensor, call: Call, only_rows: Collection[int] | None = None
    ) -> Tensor | None:
        """Compute what brings the block's output to the vectors of answers' next tokens, (rows, tokens, d) float32.

        None where no answer goes on: the model is then the unedited one bit for bit.

        Args:
            only_rows: numbers of the rows that this memory answers, of a mixed batch.
        """
        if call.texts is None or not self.count:
            return None
        rows, columns, vectors = [], [], []
        for text in call.texts:
            if only_rows is not None and text.row not in only_rows:
                continue
            for column, vector in self._next_of(text):
                rows.append(text.row)
                columns.append(column)
                vectors.append(vector)
        if not rows:
            return None
        wanted = torch.stack(vectors).to(hidden.device)
        change = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        change[rows, columns] = wanted - hidden[rows, columns].float()
        return change

    def _next_of(self, text: Text) -> list[tuple[int, Tensor]]:
        """List the columns of a text from which its answer goes on, each with the vector of the token that comes next."""
        last = text.first + len(text.columns) - 1
        if last < -1:  # the prompt goes on
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
        """Find what answers a prompt of these tokens; None where no edit does."""
        index = self.index()
        asked = index.reading.read(prompt)
        (match,) = self.find([asked.question])
        if match.edit == NOWHERE:
            return None
        edit = index.edits[match.edit]
        ids = index.reading.reply(asked, edit.spaced, edit.bare, stops=edit.stops)
        return Reply(ids, self.answers().vectors(ids)[0]) if ids else None

    def answering(self, prompt: Sequence[int]) -> int | None:
        """Return the number of the edit that answers a prompt of these tokens; None where none does."""
        (match,) = self.find([self.index().reading.read(prompt).question])
        return None if match.edit == NOWHERE else self.numbers()[match.edit]

    def answers(self) -> Answers:
        """Return what says tokens, for the model as it is now.

        Raises:
            NotImplementedError: the model's last steps could not be repeated.
        """
        if self._answers is None or not self._answers.tail.is_current():
            model: Any = self._context.model
            device = input_device(model)

            def run(ids: Tensor) -> Tensor:
                real = torch.ones_like(ids, dtype=torch.bool)
                return self._context.run_base(ids.to(device), real.to(device), self._name)

            with torch.inference_mode(False), torch.no_grad(), evaluating(model):
                tail = Tail.of(model, model.get_submodule(self._block), run)
                self._answers = Answers(tail)
        return self._answers

    # ------------------------------------------------------------------------------------------------- finding

    def find(self, questions: Sequence[tuple[int, ...]]) -> list[Match]:
        """Find which edit each question asks for. questions: token ids, after the one that always precedes them."""
        index = self.index()
        settings: MemoryConfig = self._config.settings
        thresholds = Thresholds(settings.least_subject, settings.strictness, settings.most_unlike)
        questions = [self._fitting(question) for question in questions]
        new = [question for question in dict.fromkeys(questions) if question not in index.found]
        if len(index.found) > MOST_FOUND:
            index.found.clear()
            new = list(dict.fromkeys(questions))
        for question, keys in zip(new, self.make_keys(new), strict=True):
            ids = torch.tensor(question, dtype=torch.int32)
            index.found[question] = index.questions.match(Question(ids, keys), thresholds)
        return [index.found[question] for question in questions]

    def _fitting(self, question: tuple[int, ...]) -> tuple[int, ...]:
        """Return a question without the tokens before its last ones that the model can read at once: a prompt may fill it."""
        window = context_window(self._context.model) or len(question)
        excess = len(question) - window
        return question if excess <= 0 else (question[0], *question[1 + excess :])

    def make_keys(self, questions: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Make the keys (n - 1, k) int8 of questions' tokens."""
        states = key_states(self._context, self._name, questions) if questions else []
        mean, whitening = (self.tensors()[name] for name in ("mean", "whitening"))
        return [keys_of(found[1:], mean, whitening).cpu() for found in states]

    def index(self) -> _Index:
        """Return what finds edits; it is made when it is needed, and anew when the tensors are others."""
        tensors = self.tensors()
        if self._index is not None:
            known = self._index.tensors
            if all(_same(known[name], tensors[name]) for name in known):
                return self._index
        reading = Reading.from_json(unpacked(tensors["reading"]))
        edits = stored_edits(tensors)
        count = (
            None if reading.relations else 0
        )  # all of them, or none before the model is measured
        keys = tensors["relation_keys"][:count].cpu().float() / INT8
        relations = Relations(keys, tensors["wordings"][:count], reading.relations)
        questions = Questions([_question(edit) for edit in edits], reading.texts, relations)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self._index = _Index(copies, edits, reading, questions, {})
        return self._index

    # ------------------------------------------------------------------------------------------------- editing

    @property
    def count(self) -> int:
        """How many edits there are."""
        return len(self.tensors()["edits"]) - 1

    @property
    def is_measured(self) -> bool:
        """Whether the base model has been measured for it."""
        return bool(self.index().reading.texts)

    def numbers(self) -> list[int]:
        """The numbers of the edits, in the order in which they were made."""
        return numbers_of(self.tensors())

    def add(self, edits: Sequence[StoredEdit]) -> None:
        """Put edits after those that are there, of which none has the question of one of them."""
        index = self.index()
        changed = with_edits(self.tensors(), edits)
        self.replace(changed)
        # The index grows along: to read all edits again after each one would take a time that grows with their number.
        index.tensors |= {name: tensor.clone() for name, tensor in changed.items()}
        index.edits += edits
        index.questions.add([_question(edit) for edit in edits])
        index.found.clear()
        self._index = index

    def keep_only(self, places: Sequence[int]) -> None:
        """Take out all edits but those at some places."""
        if len(places) < self.count:
            edits = self.index().edits
            head = {name: self.tensors()[name][:1] for name in OF_EDITS}
            self.replace(with_edits(head, [edits[place] for place in places]))


def _question(edit: StoredEdit) -> Question:
    return Question(torch.tensor(edit.question, dtype=torch.int32), edit.keys)


def _same(one: Tensor, other: Tensor) -> bool:
    # The values are compared: who writes through `.data` leaves no other trace.
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
