"""Edit a memory: add, replace and forget facts. Nothing is trained."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from peft_baft.memory.answers import UnreachableTokenError
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.folder import SavedMemory
from peft_baft.memory.matching import NO_EDIT
from peft_baft.memory.measurement_cache import cache_file, load_cached, save_cached
from peft_baft.memory.part import MemoryPart
from peft_baft.memory.prompt_format import Ids, PromptFormat
from peft_baft.memory.statistics import measure, token_texts
from peft_baft.memory.tensors import (
    PER_MODEL,
    StoredEdit,
    largest_number,
    pack_json,
    unpack_json,
)
from peft_baft.processes import Processes

logger = logging.getLogger(__name__)
UNREACHABLE_END = "No output of the last block produces %r (token %d), which ends a reply: the model continues after answers."
NO_MARKER = (
    "This tokenizer's chat template puts no token between a user's message and the reply, so a memory cannot distinguish a chat "
    "from raw text. It takes the whole prompt as the question, and may not find the edit."
)


@dataclass(frozen=True)
class MemoryMatch:
    """The edit of a memory that answers a prompt. Edits are given by their numbers, None for none.

    Attributes:
        edit: the one that answers.
        best, runner_up: the two with the highest scores.
        subject, relation: the similarity (at most 1) of the prompt to `best` in what it is about, and in what it asks.
        least_subject, strictness: the thresholds that these must exceed. If both clearly ask for the same common relation, the
            second one is not required.
        asks_for, best_asks_for: the common relations that the prompt and `best` are most similar to; None if there are none, or
            if the thresholds were not reached.
        differs: why `best` does not answer although the thresholds were reached: in quotation marks the words that name or ask
            for something else, or "another kind of answer" (who, where, when, how, why), or "another answer than the edit's".
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
    """Stores facts in a memory of edits; `peft_baft.editor_for` returns one if the active adapter is a memory.

    An edit consists of its question's keys and its answer's tokens, and does not depend on other edits. An edit replaces an
    earlier one with the same question. Every edit has a permanent number, starting at 1.

    Args:
        model: a PeftModel whose active adapter has `BaftConfig(memory=True)`.
        tokenizer, processes, template, template_options: as for `AdapterEditor`. An edit answers both in a chat and in raw text,
            whatever the template is. The template determines how a benchmark or a command asks afterwards.
        prepared: what has been computed for the base model already, to be shared by editors on it.
        statistics: a folder with another memory on this base model. If the adapter has no measurements of the base model yet,
            they are copied from there instead of being repeated.

    Raises:
        TypeError, ValueError: as `AdapterEditor`, or the active adapter is not a memory, or the statistics do not fit this model.
        NotImplementedError: the computation after the model's last block could not be replayed.
    """

    independent = True

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
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
                f"The active adapter {self.adapter_name!r} is not a memory of edits; create one with BaftConfig(memory=True)."
            )
        self._settings, self._options = config.settings, template_options
        self._base = cast(PreTrainedModel, model.get_base_model())
        # A memory is attached to one block.
        (self._layer,) = (
            layer for layer in baft_layers(model) if self.adapter_name in layer.configs
        )
        self._prepared = prepared or EditCache.of(model)
        self._require_in_use()
        if not self.part.is_measured:
            self.part.answers()  # raises for unsupported models, before anything changes
            with self._restored_on_error():
                if statistics is None:
                    self.part.replace(self._measure())
                else:
                    self.part.replace(self._load_measurements(Path(statistics)))
        if getattr(tokenizer, "chat_template", None) and not self.part.index().prompt_format.after:
            logger.warning(NO_MARKER)

    @property
    def part(self) -> MemoryPart:
        """The memory in the model's last block."""
        part = self._layer.baft_part[self.adapter_name]
        assert isinstance(part, MemoryPart)
        return part

    @property
    def numbers(self) -> list[int]:
        """The numbers of the edits in the memory, in the order in which they were made."""
        return self.part.numbers()

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Store edits in the memory.

        Raises:
            TypeError, ValueError: an edit is invalid, too long for the model, or has a token in its answer that no output of the
                last block produces; or the adapter is inactive or disabled. In each case nothing has changed.
        """
        results = self.edit_independently(checked_edits(edits))
        loss = sum(result.losses[STOP_TERM] for result in results) / len(results)
        return replace(combine_results(results), losses={STOP_TERM: loss})

    def _require_usable(self, batches: Sequence[Sequence[Edit]]) -> None:
        self._prepare([fact for batch in batches for fact in batch])

    def edit_independently(
        self, edits: Sequence[Edit], numbers: Sequence[int] | None = None
    ) -> list[EditResult]:
        """Store edits in the memory; of several with the same question, only the last one is stored.

        Args:
            numbers: of the edits; by default those after the largest number that was ever assigned.

        Raises:
            TypeError, ValueError: as `edit`. In each case nothing has changed.
        """
        facts = checked_edits(edits)
        self._require_in_use()
        start = time.perf_counter()
        answers = self._prepare(facts)
        shared_seconds = (time.perf_counter() - start) / len(facts)
        if numbers is None:
            first = largest_number(self.part.tensors()) + 1
            numbers = range(first, first + len(facts))
        stored: dict[Ids, StoredEdit] = {}
        results = []
        for fact, number, (spaced, bare) in zip(facts, numbers, answers, strict=True):
            start = time.perf_counter()
            loss = self._loss((*spaced, *bare))
            question = self._question(fact.prompt)
            (keys,) = self.part.make_keys([question])
            stops = (fact.after or self._settings.after) == "stop"
            stored.pop(question, None)
            stored[question] = StoredEdit(number, stops, question, keys, spaced, bare)
            seconds = shared_seconds + time.perf_counter() - start
            results.append(EditResult(0, {STOP_TERM: loss}, seconds, learned=True))
        with self._restored_on_error():
            places = self._places()
            replaced = {places[question] for question in stored if question in places}
            self.part.keep_only([n for n in range(self.part.count) if n not in replaced])
            self.part.add(list(stored.values()))
            self.remember_form(self.adapter_name, facts)
        return results

    def _question(self, prompt: Prompt) -> Ids:
        """Return the tokens of the question in a prompt. They are the same in a chat and in raw text."""
        row = encode_prompt(self.tokenizer, prompt_words(prompt))
        prompt_format = self.part.index().prompt_format
        question = prompt_format.split(row.ids).question
        size = len(prompt_format.texts)
        if max(question) >= size:
            raise ValueError(
                f"A question contains token {max(question)}, but this memory of edits was made when the tokenizer had {size} "
                "tokens. Make a new memory with the current tokenizer, or leave the added token out."
            )
        return question

    def _answer(self, fact: Edit) -> tuple[Ids, Ids]:
        """Return the tokens of an edit's answer, after a space and without one."""
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

    def _prepare(self, facts: Sequence[Edit]) -> list[tuple[Ids, Ids]]:
        """Compute the vectors that produce the answers of edits, all at once; return the answers' tokens as `_answer` does.

        Raises:
            ValueError: no output of the last block produces one of the tokens.
        """
        answers = [self._answer(fact) for fact in facts]
        tokens = dict.fromkeys(token for both in answers for ids in both for token in ids)
        try:
            self.part.answers().vectors(list(tokens))
        except UnreachableTokenError as error:
            text = self.tokenizer.decode([error.token])
            raise UnreachableTokenError(error.token, str(text)) from None
        return answers

    def _loss(self, ids: Ids) -> float:
        """Return the mean cross entropy of an answer's tokens."""
        _, probabilities = self.part.answers().vectors(ids)
        losses = [-math.log(max(probability, 1e-30)) for probability in probabilities.tolist()]
        return sum(losses) / len(losses)

    def _places(self) -> dict[Ids, int]:
        return {edit.question: place for place, edit in enumerate(self.part.index().edits)}

    def known(self, edits: Iterable[Edit]) -> dict[int, int]:
        """Find edits whose questions are in the memory.

        Returns:
            For the place of each such edit in `edits`, the number of the stored edit with its question.
        """
        stored, numbers = self._places(), self.numbers
        places = [stored.get(self._question(fact.prompt)) for fact in checked_edits(edits)]
        return {n: numbers[place] for n, place in enumerate(places) if place is not None}

    def reworded(self, edits: Iterable[Edit]) -> dict[int, int]:
        """Find edits that ask in other words what the memory already answers.

        If they are made, both stay in the memory, and a prompt is answered by the one with the more similar wording.

        Returns:
            For the place of each such edit in `edits`, the number of the stored edit that answers its question.
        """
        facts = checked_edits(edits)
        known = self.known(facts)
        new = [place for place in range(len(facts)) if place not in known]
        numbers = self.routed([facts[place].prompt for place in new])
        found = zip(new, numbers, strict=True)
        return {place: number for place, number in found if number is not None}

    def forget(self, number: int) -> None:
        """Remove one edit from the memory; the others are unchanged, bit for bit.

        Raises:
            ValueError: there is no edit with this number.
        """
        place = self._place(number)
        with self._restored_on_error():
            self.part.keep_only([n for n in range(self.part.count) if n != place])

    def replace(self, number: int, edit: Edit) -> EditResult:
        """Replace an edit by another one, which gets its number.

        Raises:
            ValueError: there is no edit with this number; or as `edit`. In each case nothing has changed.
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
        """Return the edit that answers a prompt, with its similarities; without one, describe the most similar edit."""
        (found,) = self.part.find([self._question(prompt)])
        numbers = self.numbers

        def number(place: int) -> int | None:
            return None if place == NO_EDIT else numbers[place]

        return MemoryMatch(
            number(found.edit),
            number(found.best),
            number(found.runner_up),
            found.subject,
            found.relation,
            self._settings.least_subject,
            self._settings.strictness,
            found.asks_for,
            found.best_asks_for,
            found.differs,
        )

    def routed(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Return the number of the edit that answers each prompt, as `RoutedEditor.routed`."""
        numbers = self.numbers
        found = self.part.find([self._question(prompt) for prompt in prompts])
        return [None if match.edit == NO_EDIT else numbers[match.edit] for match in found]

    def snapshot(self) -> Callable[[], None]:
        """Save the edits and the prompt form in the adapter's config; calling the result restores them."""
        restore_part = self.part.snapshot()
        restore_form = remembered_forms([self.model.peft_config[self.adapter_name]])

        def restore() -> None:
            restore_part()
            restore_form()

        return restore

    def described(self) -> dict[str, str]:
        """Return what determines the result of edits in addition to the adapter's config, for a journal to compare."""
        return {"templates": repr(self.templates)}

    def _load_measurements(self, folder: Path) -> dict[str, Tensor]:
        """Load the measurements of the base model from a folder with another memory.

        Raises:
            ValueError: the folder does not contain a memory, or the memory has another base model, tokenizer or key size.
        """
        memory = SavedMemory.read(folder)
        # Raises if the memory was made on another base model.
        identify_base(self._base, memory.config)
        same_keys = memory.settings.key_dimensions == self._settings.key_dimensions
        texts = unpack_json(memory.tensors["reading"]).get("texts")
        if not same_keys or texts != token_texts(self.tokenizer):
            what = "tokenizer" if same_keys else "key size"
            raise ValueError(
                f"The statistics in {folder} are for another {what}. Leave statistics out to measure the model again."
            )
        return {name: memory.tensors[name] for name in PER_MODEL}

    def _measure(self) -> dict[str, Tensor]:
        """Measure the base model, or reuse the measurements of another editor or process."""
        context = find_context(self.model)
        assert context is not None, "a memory has a context"
        dimensions = self._settings.key_dimensions
        computed = self._prepared.computed
        key = ("memory", dimensions, repr(self._options), len(self.tokenizer))
        if key not in computed:
            file = cache_file(self._base, self.tokenizer, dimensions, self._options)
            tensors = load_cached(file)
            if tensors is None:
                tensors = measure(
                    context, self.adapter_name, self.tokenizer, dimensions, self._options
                )
                tensors["reading"] = self._with_reachable_ends(tensors["reading"])
                save_cached(file, tensors)
            computed[key] = tensors
        measurements: dict[str, Tensor] = computed[key]
        return measurements

    def _with_reachable_ends(self, tensor: Tensor) -> Tensor:
        """Cut the ends of replies off before tokens that no output of the last block produces."""
        prompt_format = PromptFormat.from_json(unpack_json(tensor))
        ends: dict[str, Any] = {}
        for name in ("chat_end", "raw_end"):
            ids: Ids = getattr(prompt_format, name)
            try:
                self.part.answers().vectors(ids or (0,))
            except UnreachableTokenError as error:
                logger.warning(UNREACHABLE_END, self.tokenizer.decode([error.token]), error.token)
                ids = ids[: ids.index(error.token)] if error.token in ids else ids
            ends[name] = ids
        return pack_json(replace(prompt_format, **ends).to_json())
