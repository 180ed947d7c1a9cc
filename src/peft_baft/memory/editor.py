"""Edit a memory: put facts in, forget and replace them. Nothing is trained."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from peft_baft.adapter import BaftConfig, baft_layers, find_context
from peft_baft.adapter.base_identity import identify_base
from peft_baft.adapter.taught_form import remembered_forms
from peft_baft.data.batching import encode, encode_fitting, encode_prompt
from peft_baft.data.cases import Edit, Prompt, prompt_words
from peft_baft.data.templates import Template
from peft_baft.editing.attached import AttachedEditor
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import EditResult, checked_edits, combine_results
from peft_baft.editing.train import STOP_TERM
from peft_baft.memory.answers import Unsayable
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.folder import SavedMemory
from peft_baft.memory.kept import keep, kept_file, load_kept
from peft_baft.memory.matching import NOWHERE
from peft_baft.memory.part import MemoryPart
from peft_baft.memory.reading import Ids, Reading
from peft_baft.memory.statistics import measured, token_texts
from peft_baft.memory.tensors import OF_MODEL, StoredEdit, largest_number, packed, unpacked
from peft_baft.processes import Processes

logger = logging.getLogger(__name__)
UNSAYABLE_END = "This model cannot be made to say %r (token %d), which ends a reply: what follows an answer is the model's own."

UNMARKED = (
    "This tokenizer's chat template puts no token between a user's message and the reply, so that a memory cannot tell a chat "
    "from raw text: it reads the whole prompt as the question, and may not find its edit."
)


@dataclass(frozen=True)
class MemoryMatch:
    """Which edit of a memory answers a prompt, by their numbers; None where there is none.

    Attributes:
        edit: which answers. best, runner_up: the likeliest two.
        subject, relation: how alike (at most 1) the prompt is to the best one's in what it is about, and in what it asks of that.
        least_subject, strictness: what these must be above for it to answer; where both clearly ask for the same common relation,
            the relation need not be.
        asks_for, best_asks_for: the common relations that the prompt and the best edit's are most like, where they are like one
            and the two above are enough.
        differs: what keeps the best edit from answering, though these are enough: the words that ask for something else or name
            it, in quotation marks, "another kind of answer" (who, where, when, how, why), or "another answer than the edit's".
    """

    edit: int | None
    best: int | None
    runner_up: int | None
    subject: float
    relation: float
    least_subject: float
    strictness: float
    asks_for: str | None
    best_asks_for: str | None
    differs: str | None


class MemoryEditor(AttachedEditor):
    """Puts facts into a memory of edits; `peft_baft.editor_for` makes one where the active adapter is a memory.

    An edit is its question's keys and its answer's tokens. It depends on no other edit. An edit whose question is in the memory
    already replaces the earlier one. Every edit has a number, from 1, which it keeps.

    Args:
        model: a PeftModel whose active adapter has `BaftConfig(memory=True)`.
        tokenizer, processes, template, template_options: as for `AdapterEditor`. An edit answers in a chat and in raw text,
            whatever the template: this says how a benchmark or a command asks afterwards.
        statistics: a folder with another memory on this base model. What was measured of the model is taken from there instead of
            measured anew, where the adapter has none yet.

    Raises:
        TypeError, ValueError: as `AdapterEditor`, or the active adapter is no memory, or the statistics do not fit this model.
        NotImplementedError: what the model computes after its last block could not be replayed.
    """

    independent = True

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        *,
        processes: Processes | None = None,
        prepared: EditCache | None = None,
        template: str | Template = "auto",
        template_options: Mapping[str, Any] | None = None,
        statistics: str | Path | None = None,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            processes=processes,
            template=template,
            template_options=template_options,
        )
        config = model.peft_config[self.adapter_name]
        if not isinstance(config, BaftConfig) or not isinstance(config.settings, MemoryConfig):
            raise ValueError(
                f"The active adapter {self.adapter_name!r} is no memory of edits; make one with BaftConfig(memory=True)."
            )
        self._settings, self._options = config.settings, template_options
        self._base = model.get_base_model()
        # A memory is in one block.
        (self._layer,) = (
            layer for layer in baft_layers(model) if self.adapter_name in layer.configs
        )
        self._prepared = prepared or EditCache.of(model)
        self._require_in_use()
        if not self.part.is_measured:
            self.part.answers()  # what a model cannot be made to say is found out before anything is taught
            with self._restored_on_error():
                self.part.replace(
                    self._measure() if statistics is None else self._saved(Path(statistics))
                )
        if getattr(tokenizer, "chat_template", None) and not self.part.index().reading.after:
            logger.warning(UNMARKED)

    @property
    def part(self) -> MemoryPart:
        """The memory in the model's last block."""
        part = self._layer.baft_part[self.adapter_name]
        assert isinstance(part, MemoryPart)
        return part

    @property
    def numbers(self) -> list[int]:
        """The numbers of the edits that are in the memory, in the order in which they were made."""
        return self.part.numbers()

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Put edits into the memory.

        Raises:
            TypeError, ValueError: an edit is unusable, too long for the model, or has a token that the model cannot be made to
                say; or the adapter is not the active one, or disabled. In each case nothing has changed.
        """
        results = self.edit_independently(checked_edits(edits))
        loss = sum(result.losses[STOP_TERM] for result in results) / len(results)
        return replace(combine_results(results), losses={STOP_TERM: loss})

    def _require_usable(self, batches: Sequence[Sequence[Edit]]) -> None:
        self._learn([fact for batch in batches for fact in batch])

    def edit_independently(
        self, edits: Sequence[Edit], numbers: Sequence[int] | None = None
    ) -> list[EditResult]:
        """Put edits into the memory; of several with the same question the last one stays.

        Args:
            numbers: of the edits; by default those that follow the last one ever made.

        Raises:
            As `edit`. In each case nothing has changed.
        """
        facts = checked_edits(edits)
        self._require_in_use()
        begun = time.perf_counter()
        answers = self._learn(facts)
        together = (time.perf_counter() - begun) / len(facts)
        if numbers is None:
            first = largest_number(self.part.tensors()) + 1
            numbers = range(first, first + len(facts))
        stored: dict[Ids, StoredEdit] = {}
        results = []
        for fact, number, (spaced, bare) in zip(facts, numbers, answers, strict=True):
            begun = time.perf_counter()
            loss = self._loss((*spaced, *bare))
            question = self._question(fact.prompt)
            (keys,) = self.part.make_keys([question])
            stops = (fact.after or self._settings.after) == "stop"
            stored.pop(question, None)
            stored[question] = StoredEdit(number, stops, question, keys, spaced, bare)
            seconds = together + time.perf_counter() - begun
            results.append(EditResult(0, {STOP_TERM: loss}, seconds, learned=True))
        with self._restored_on_error():
            here = self._places()
            replaced = {here[question] for question in stored if question in here}
            self.part.keep_only([n for n in range(self.part.count) if n not in replaced])
            self.part.add(list(stored.values()))
            self.remember_form(self.adapter_name, facts)
        return results

    def _question(self, prompt: Prompt) -> Ids:
        """Return the tokens of the question that a prompt asks, the same in every form."""
        row = encode_prompt(self.tokenizer, prompt_words(prompt))
        reading = self.part.index().reading
        question = reading.read(row.ids).question
        known = len(reading.texts)
        if max(question) >= known:
            raise ValueError(
                f"A question has token {max(question)}, and this memory of edits was made when the tokenizer had {known} tokens. "
                "Make a new memory with the tokenizer as it is now, or leave the added token out."
            )
        return question

    def _answer(self, fact: Edit) -> tuple[Ids, Ids]:
        """Return the tokens of an edit's answer, after a space and without."""
        words = prompt_words(fact.prompt)
        raw = encode_fitting(self._base, self.tokenizer, words, fact.target)
        spaced = raw.ids[raw.prompt_length :]
        if not getattr(self.tokenizer, "chat_template", None):
            ids = tuple(self.tokenizer(fact.target.strip(), add_special_tokens=False)["input_ids"])
            return spaced, ids
        chat = Template(True, dict(self._options or {}))
        encode_fitting(self._base, self.tokenizer, fact.prompt, fact.target, template=chat)
        turn = encode(self.tokenizer, words, fact.target, template=chat)
        return spaced, turn.ids[turn.prompt_length + turn.lead :]

    def _learn(self, facts: Sequence[Edit]) -> list[tuple[Ids, Ids]]:
        """Find what says the answers of edits, all tokens of all answers at once; return the tokens as `_answer` does.

        Raises:
            ValueError: one of them cannot be said.
        """
        answers = [self._answer(fact) for fact in facts]
        tokens = dict.fromkeys(token for both in answers for ids in both for token in ids)
        try:
            self.part.answers().vectors(list(tokens))
        except Unsayable as error:
            raise Unsayable(error.token, self.tokenizer.decode([error.token])) from None
        return answers

    def _loss(self, ids: Ids) -> float:
        """Return the mean cross entropy of an answer's tokens, each said in its place."""
        _, likely = self.part.answers().vectors(ids)
        return sum(-math.log(max(chance, 1e-30)) for chance in likely.tolist()) / len(likely)

    def _places(self) -> dict[Ids, int]:
        return {edit.question: place for place, edit in enumerate(self.part.index().edits)}

    def known(self, edits: Iterable[Edit]) -> dict[int, int]:
        """Tell which of some edits have questions that are in the memory: by their places among these, the numbers there."""
        here, numbers = self._places(), self.numbers
        places = [here.get(self._question(fact.prompt)) for fact in checked_edits(edits)]
        return {n: numbers[place] for n, place in enumerate(places) if place is not None}

    def reworded(self, edits: Iterable[Edit]) -> dict[int, int]:
        """Tell which of some edits ask in other words what edits in the memory answer: by their places, the numbers of those.

        Both stay in the memory when these are made, and a prompt is answered by the one whose wording is nearer.
        """
        facts = checked_edits(edits)
        known = self.known(facts)
        new = [place for place in range(len(facts)) if place not in known]
        numbers = self.routed([facts[place].prompt for place in new])
        found = zip(new, numbers, strict=True)
        return {place: number for place, number in found if number is not None}

    def forget(self, number: int) -> None:
        """Take one edit out of the memory; what the others answer stays bit for bit.

        Raises:
            ValueError: there is no edit of this number.
        """
        place = self._place(number)
        with self._restored_on_error():
            self.part.keep_only([n for n in range(self.part.count) if n != place])

    def replace(self, number: int, edit: Edit) -> EditResult:
        """Put another edit in the place of one, under the same number.

        Raises:
            ValueError: there is no edit of this number; or as `edit`. In each case nothing has changed.
        """
        self._place(number)
        with self._restored_on_error():
            self.forget(number)
            return self.edit_independently([edit], [number])[0]

    def _place(self, number: int) -> int:
        numbers = self.numbers
        if number not in numbers:
            which = f"numbers {numbers[0]} to {numbers[-1]}" if numbers else "it is empty"
            raise ValueError(
                f"There is no edit {number} in the memory: it has {len(numbers)} edits ({which})."
            )
        return numbers.index(number)

    def matches(self, prompt: Prompt) -> MemoryMatch:
        """Tell which edit answers a prompt, and how near it came."""
        (found,) = self.part.find([self._question(prompt)])
        numbers = self.numbers

        def number(place: int) -> int | None:
            return None if place == NOWHERE else numbers[place]

        return MemoryMatch(
            number(found.edit),
            number(found.best),
            number(found.runner_up),
            found.subject,
            found.relation,
            self._settings.least_subject,
            self._settings.strictness,
            found.asked_for,
            found.best_asks_for,
            found.differs,
        )

    def routed(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Tell which edit answers each prompt, as `RoutedEditor.routed`."""
        numbers = self.numbers
        found = self.part.find([self._question(prompt) for prompt in prompts])
        return [None if one.edit == NOWHERE else numbers[one.edit] for one in found]

    def snapshot(self) -> Callable[[], None]:
        """Remember the edits and the form that the adapter's config remembers; calling the result puts them back."""
        restore_part = self.part.snapshot()
        restore_form = remembered_forms([self.model.peft_config[self.adapter_name]])

        def restore() -> None:
            restore_part()
            restore_form()

        return restore

    def described(self) -> dict[str, str]:
        """Say what decides how edits come out, besides the adapter's config, for a journal to compare."""
        return {"templates": repr(self.templates)}

    def _saved(self, folder: Path) -> dict[str, Tensor]:
        """Read what was measured of the base model from a folder with another memory.

        Raises:
            ValueError: the folder holds no memory, or one that was made on another base model, or whose keys are made in another
                way.
        """
        memory = SavedMemory.read(folder)
        # The folder's config knows its base model; on another one this raises.
        identify_base(self._base, memory.config)
        same_keys = memory.settings.key_dimensions == self._settings.key_dimensions
        texts = unpacked(memory.tensors["reading"]).get("texts")
        if not same_keys or texts != token_texts(self.tokenizer):
            what = "tokenizer" if same_keys else "key size"
            raise ValueError(
                f"The statistics in {folder} are of another {what}. Leave statistics out to measure them anew."
            )
        return {name: memory.tensors[name] for name in OF_MODEL}

    def _measure(self) -> dict[str, Tensor]:
        """Measure the base model, or take what another editor of it measured."""
        context = find_context(self.model)
        assert context is not None, "a memory has a context"
        dimensions = self._settings.key_dimensions
        known = ("memory", dimensions, repr(self._options), len(self.tokenizer))
        if known not in self._prepared.computed:
            file = kept_file(self._base, self.tokenizer, dimensions, self._options)
            found = load_kept(file)
            if found is None:
                found = measured(
                    context, self.adapter_name, self.tokenizer, dimensions, self._options
                )
                found["reading"] = self._sayable_ends(found["reading"])
                keep(file, found)
            self._prepared.computed[known] = found
        return self._prepared.computed[known]

    def _sayable_ends(self, tensor: Tensor) -> Tensor:
        """Leave ends of replies out that the model cannot be made to say."""
        reading = Reading.from_json(unpacked(tensor))
        ends = {}
        for name in ("chat_end", "raw_end"):
            ids = getattr(reading, name)
            try:
                self.part.answers().vectors(ids or (0,))
            except Unsayable as error:
                logger.warning(UNSAYABLE_END, self.tokenizer.decode([error.token]), error.token)
                ids = ids[: ids.index(error.token)] if error.token in ids else ids
            ends[name] = ids
        return packed(replace(reading, **ends).to_json())
