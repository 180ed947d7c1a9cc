"""Edit a memory: learn codes side by side, keep them with the keys of their questions, forget and replace them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_baft.adapter import BaftConfig, baft_layers, find_context
from peft_baft.adapter.matching import NOWHERE, Question
from peft_baft.adapter.memory import EditCodes, EditRouter, unpacked
from peft_baft.adapter.model_call import input_device
from peft_baft.adapter.state import frozen
from peft_baft.data.batching import Tokens, collate, encode_prompt, padding_id
from peft_baft.data.cases import Edit, Prompt
from peft_baft.data.templates import Template
from peft_baft.editing.acceleration.prepared import PreparedModel
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.editor import EditResult, checked_edits, in_turn
from peft_baft.editing.memory.codes import learn_codes
from peft_baft.editing.memory.folder import SavedMemory
from peft_baft.editing.memory.statistics import key_statistics, token_texts
from peft_baft.editing.scope import NARROW, Scope
from peft_baft.editing.train import DescentConfig
from peft_baft.processes import Processes

LANES = 64  # edits that learn in the same forwards
MEMORY_DESCENT = DescentConfig(
    lr=8.0, max_steps=60, stop_loss=0.05, weight_decay=0.0, learn_end=True
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


class MemoryEditor(AdapterEditor):
    """Teaches facts to a memory of edits; `BaftEditor(model, tokenizer)` makes one where the active adapter is a memory.

    The edits of a batch are learned side by side, independently of each other. An edit whose question is in the memory already
    replaces the earlier one. Every edit has a number, from 1, which it keeps.

    Args:
        model: a PeftModel whose active adapter has `BaftConfig(memory=True)`.
        descent: how a code is learned.
        processes, template, template_options: as for `AdapterEditor`. Of several processes each makes all edits.
        prepared: what editors of the same base model share; by default the model's own.
        scope: in which contexts and wordings each fact is taught besides its bare prompt; by default in none. Contrast texts are
            not needed: the router leaves other prompts alone.
        statistics: a folder with another memory on this base model. What was measured of the model is taken from there instead of
            measured anew, where the adapter has none yet.

    Raises:
        TypeError, ValueError: as `AdapterEditor`, or the active adapter is no memory, or one that was made on another base model,
            or the statistics do not fit this model.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        descent: DescentConfig | None = None,
        *,
        processes: Processes | None = None,
        prepared: PreparedModel | None = None,
        template: str | Template = "auto",
        template_options: Mapping[str, Any] | None = None,
        scope: Scope = NARROW,
        statistics: str | Path | None = None,
    ) -> None:
        descent = descent or MEMORY_DESCENT
        super().__init__(
            model,
            tokenizer,
            descent,
            descent,
            processes=processes,
            template=template,
            template_options=template_options,
            scope=scope,
        )
        config = model.peft_config[self.adapter_name]
        if not isinstance(config, BaftConfig) or not config.memory:
            raise ValueError(
                f"The active adapter {self.adapter_name!r} is no memory of edits; make one with BaftConfig(memory=True)."
            )
        self._config, self._options = config, template_options
        # The number of the next edit, where a record of the edits has given some to edits that were taken back.
        self.next_number: int | None = None
        context = find_context(model)
        assert context is not None, "a memory has a context"
        self._context, self._base = context, model.get_base_model()
        self._prepared = prepared or PreparedModel.of(model)
        self._require_in_use()
        with self._restored_on_error():
            if not self.router.has_statistics:
                self.router.take(
                    self._statistics().tensors()
                    if statistics is None
                    else self._saved_statistics(Path(statistics))
                )
            self.router.require_model(self._base)

    @property
    def router(self) -> EditRouter:
        """What finds the edit of a prompt."""
        (router,) = (
            layer.baft_router[self.adapter_name]
            for layer in baft_layers(self.model)
            if self.adapter_name in layer.baft_router
        )
        assert isinstance(router, EditRouter)
        return router

    @property
    def numbers(self) -> list[int]:
        """The numbers of the edits that are in the memory, in the order in which they were made."""
        return self.router.kept()["numbers"].tolist()

    def _codes(self) -> dict[str, EditCodes]:
        """Get the codes of each edited block, by its name."""
        codes = {}
        for layer in baft_layers(self.model):
            if self.adapter_name in layer.baft_codes:
                part = layer.baft_codes[self.adapter_name]
                assert isinstance(part, EditCodes)
                codes[layer.name] = part
        return codes

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Learn a code for each edit, side by side; as `AdapterEditor.edit`, but that a question may stand there twice."""
        results = self.edit_independently(checked_edits(edits))
        losses = {
            name: sum(one.losses[name] for one in results) / len(results)
            for name in results[0].losses
        }
        return replace(in_turn(results), losses=losses)

    def edit_in_turn(self, edits: Iterable[Edit], batch_size: int = 1) -> Iterator[EditResult]:
        """Learn the edits, and yield the result of each; they share forwards, which changes none of them."""
        batches = self.batches(edits, batch_size)
        at_once = max(1, LANES // batch_size)
        for start in range(0, len(batches), at_once):
            part = batches[start : start + at_once]
            results = iter(self.edit_independently([fact for batch in part for fact in batch]))
            for batch in part:
                yield in_turn([next(results) for _ in batch])

    def edit_independently(
        self, edits: Sequence[Edit], numbers: Sequence[int] | None = None
    ) -> list[EditResult]:
        """Learn a code for each edit; as if one after another, but in the same forwards.

        Args:
            numbers: of the edits; by default those that follow the last one ever made.

        Raises:
            As `edit`. In each case nothing has changed.
        """
        facts = checked_edits(edits)
        self._require_in_use()
        texts = [self._encode([fact], self.descent)[0] for fact in self._with_subjects(facts)]
        if numbers is None:
            first = max(int(self.router.kept()["made"]) + 1, self.next_number or 0)
            numbers = range(first, first + len(facts))
        codes: list[torch.Tensor] = []
        results: list[EditResult] = []
        bases = {name: part.basis(input_device(self._base)) for name, part in self._codes().items()}
        with frozen(self.model), self._context.routing.at_rest():
            questions = self._questions([fact.prompt for fact in facts])
            for start in range(0, len(texts), LANES):
                found, of_lanes = learn_codes(
                    self._base,
                    self.tokenizer,
                    texts[start : start + LANES],
                    bases,
                    self._config.prompt_positions,
                    self.descent,
                )
                codes.append(found)
                results += of_lanes
        self._add(numbers, questions, torch.cat(codes))
        self.remember_form(self.adapter_name, facts)
        return results

    def _add(
        self, numbers: Sequence[int], questions: Sequence[Question], codes: torch.Tensor
    ) -> None:
        """Put edits behind those that are there; of one question the last edit stays."""
        with self._restored_on_error():
            self.router.take(self.router.with_questions(numbers, questions))
            for block, part in enumerate(self._codes().values()):
                part.take(part.with_codes(codes[:, block]))
            last = {tuple(q.ids.tolist()): place for place, q in enumerate(self.router.stored())}
            self._keep_only(sorted(last.values()))

    def _keep_only(self, places: Sequence[int]) -> None:
        if len(places) < self.router.count:
            self.router.take(self.router.only(places))
            for part in self._codes().values():
                part.take(part.only(places))

    def known(self, edits: Iterable[Edit]) -> dict[int, int]:
        """Tell which of some edits have questions that are in the memory: by their places among these, the numbers there."""
        stored = {
            tuple(question.ids.tolist()): number
            for question, number in zip(self.router.stored(), self.numbers, strict=True)
        }
        rows = self._rows([fact.prompt for fact in checked_edits(edits)])
        of_facts = [stored.get(row.ids[self.router.words_of_user(row.ids)]) for row in rows]
        return {place: number for place, number in enumerate(of_facts) if number is not None}

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
            self._keep_only([i for i in range(self.router.count) if i != place])

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
        if number not in self.numbers:
            count = len(self.numbers)
            which = f"numbers {self.numbers[0]} to {self.numbers[-1]}" if count else "it is empty"
            raise ValueError(
                f"There is no edit {number} in the memory: it has {count} edits ({which})."
            )
        return self.numbers.index(number)

    def matches(self, prompt: Prompt) -> MemoryMatch:
        """Tell which edit answers a prompt, and how near it came."""
        with frozen(self.model):
            (question,) = self._questions([prompt])
        found = self.router.match(question)
        numbers = self.numbers

        def number(place: int) -> int | None:
            return None if place == NOWHERE else numbers[place]

        return MemoryMatch(
            number(found.edit),
            number(found.best),
            number(found.runner_up),
            found.subject,
            found.relation,
            self._config.least_subject,
            self._config.strictness,
            found.asked_for,
            found.best_asks_for,
            found.differs,
        )

    def routed(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Tell which edit answers each prompt, as `RoutedEditor.routed`."""
        with frozen(self.model):
            questions = self._questions(prompts)
        numbers = self.numbers
        places = [self.router.match(question).edit for question in questions]
        return [None if place == NOWHERE else numbers[place] for place in places]

    def _questions(self, prompts: Sequence[Prompt]) -> list[Question]:
        """Make the questions of prompts, with their keys, in the first form in which facts are taught."""
        rows = self._rows(prompts)
        found: list[Question] = []
        for start in range(0, len(rows), LANES):
            found += self._questions_of(rows[start : start + LANES])
        return found

    def _rows(self, prompts: Sequence[Prompt]) -> list[Tokens]:
        return [encode_prompt(self.tokenizer, p, template=self.templates[0]) for p in prompts]

    def _questions_of(self, rows: Sequence[Tokens]) -> list[Question]:
        batch = collate(rows, padding_id(self.tokenizer))
        device = input_device(self._base)
        ids, real = batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)
        states = self._context.routing.key_states(ids, real)
        return [
            self.router.question(ids[i, : len(row.ids)], states[i, : len(row.ids)])
            for i, row in enumerate(rows)
        ]

    def _saved_statistics(self, folder: Path) -> dict[str, torch.Tensor]:
        """Read the statistics of the base model from a folder with another memory.

        Raises:
            ValueError: the folder holds no memory, or one whose keys are made in another way.
        """
        memory = SavedMemory.read(folder)
        own = {
            "key block": self._config.key_block,
            "key size": self._config.key_dimensions,
            "form of prompts": self.templates[0].name,
        }
        saved = {
            "key block": memory.config.key_block,
            "key size": memory.config.key_dimensions,
            "form of prompts": memory.form,
        }
        differing = [
            f"{what} ({saved[what]}, not {own[what]})" for what in own if saved[what] != own[what]
        ]
        if token_texts(self.tokenizer) != unpacked(memory.part("texts")):
            differing.append("tokenizer")
        if differing:
            raise ValueError(
                f"The statistics in {folder} are of another {differing[0]}. Leave statistics out to measure them anew."
            )
        return memory.statistics()

    def _statistics(self) -> Any:
        """Measure the statistics of the base model, or take those that another editor of it measured."""
        template = self.templates[0]
        known = (
            "key statistics",
            self._config.key_block,
            self._config.key_dimensions,
            repr(template),
        )
        if known not in self._prepared.computed:
            with frozen(self.model), self._context.routing.at_rest():
                self._prepared.computed[known] = key_statistics(
                    self._base,
                    self._context,
                    self.tokenizer,
                    self._config.key_dimensions,
                    self._options,
                    template,
                )
        return self._prepared.computed[known]
