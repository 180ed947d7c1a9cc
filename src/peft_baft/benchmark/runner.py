"""One run: one method over the rows of a benchmark, by one schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_baft.adapter import find_context
from peft_baft.benchmark.methods import Method
from peft_baft.benchmark.metrics import Metric
from peft_baft.benchmark.progress import Progress
from peft_baft.benchmark.results import in_order
from peft_baft.benchmark.schedule import Schedule
from peft_baft.data.cases import Case, Unrelated
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.baft import BaftEditor
from peft_baft.editing.train import Outcome
from peft_baft.evaluation.asking import Question, Unedited, ask, judged, questions_of
from peft_baft.evaluation.forward import one_model
from peft_baft.processes import Processes

ASKED_TOGETHER = 8  # rows of a model that is not edited here: between two signs of life
SPLITS = ("blocks", "facts")
SEED_STRIDE = 100_003  # seeds of a run's blocks: a block's first row, and this times the run's seed


@dataclass(frozen=True)
class Bench:
    """The rows of a benchmark and the model that is judged on them.

    Args:
        base: the model without any adapter. cases: all rows of the benchmark. first, last: the rows judged, last excluded.
        unrelated: text to train beside; row i takes number i, from the beginning again at its end.
        template: how edits and rephrasings are asked, `raw` or `chat`.
        also: further measures, whose values go beside a row's replies.
        tick: called with the number of rows that are through, for a progress bar.
        parallel: how many single edits share each forward, where the method can.
        processes: those that share the work; each finds all results. split: what of a run that edits is split over them:
            its `blocks`, or the `facts` of each batch.
    """

    base: Any
    tokenizer: Any
    cases: Sequence[Case]
    first: int
    last: int
    unrelated: Sequence[Unrelated] = ()
    template: str = "raw"
    also: Sequence[Metric] = ()
    tick: Callable[[int], None] = lambda rows: None
    parallel: int = 16
    processes: Processes = field(default_factory=Processes)
    split: str = SPLITS[0]
    unedited: Unedited = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= len(self.cases):
            raise ValueError(
                f"The rows must lie in 0:{len(self.cases)}, which the data holds, not be {self.first}:{self.last}."
            )
        object.__setattr__(self, "unedited", Unedited(self.tokenizer))
        _require_apart(self.unrelated, self.cases[self.first : self.last])

    def edited(self, method: Method, schedule: Schedule, seed: int, progress: Progress) -> list[dict[str, Any]]:
        """Edit block after block, each with a fresh adapter, and ask.

        Goes on where `progress` stopped; the result is then the same as that of a run that was never interrupted.

        Returns:
            One entry a row: row, block, steps, seconds, learned, probes.
        """
        if self.split == "facts":
            return self._edit_blocks(method, schedule, seed, progress)
        return in_order(self.processes.gather(lambda: self._edit_blocks(method, schedule, seed, progress)))

    def share(self, schedule: Schedule) -> list[range]:
        """The blocks in which this process takes part."""
        blocks = schedule.blocks(self.first, self.last)
        return blocks if self.split == "facts" else self.processes.share(blocks)

    def amount(self, schedule: Schedule | None) -> int:
        """How many rows this process goes through, by a schedule or to ask alone."""
        if schedule is None:
            return len(self.processes.share(range(self.first, self.last)))
        return schedule.block * len(self.share(schedule))

    def _edit_blocks(self, method: Method, schedule: Schedule, seed: int, progress: Progress) -> list[dict[str, Any]]:
        blocks = self._left(schedule, progress)
        done = len(self.share(schedule)) - len(blocks)
        self.tick(done * schedule.block + len(progress.outcomes) * schedule.batch_size)
        self.unedited.ask(self.base, [q for block in blocks for q in self._questions(self._asked_here(block))])
        if schedule.block == 1 and self.parallel > 1 and method.objective is not None:
            self._edit_singles(method, [block.start for block in blocks], seed, progress)
        for block in self._left(schedule, progress):
            self.processes.look_up()
            done = len(progress.outcomes) * schedule.batch_size
            texts = [self.unrelated[row % len(self.unrelated)] for row in block] if self.unrelated else ()
            editor = method.start(self.base, self.tokenizer, texts, seed * SEED_STRIDE + block.start, done)
            try:
                progress.restore(editor.model)
                found = self._run_block(editor, block, schedule, progress)
            finally:
                editor.model.unload()
            progress.finished(self._numbered(found, schedule))
        return progress.cases

    def _edit_singles(self, method: Method, rows: Sequence[int], seed: int, progress: Progress) -> None:
        """Edit rows side by side, up to the first group in which one diverged: it must not take the others with it."""
        for start in range(0, len(rows), self.parallel):
            self.processes.look_up()
            entries = self._side_by_side(method, rows[start : start + self.parallel], seed)
            if entries is None:
                break
            progress.finished(self._numbered(entries, Schedule()))

    def _left(self, schedule: Schedule, progress: Progress) -> list[range]:
        """The blocks that this process has not finished."""
        done = {case["row"] for case in progress.cases}
        return [block for block in self.share(schedule) if block.start not in done]

    def _numbered(self, entries: Sequence[dict[str, Any]], schedule: Schedule) -> list[dict[str, Any]]:
        """Entries with the numbers of their blocks."""
        return [{"row": e["row"], "block": (e["row"] - self.first) // schedule.block, **e} for e in entries]

    def asked(
        self, model: Any, without: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> list[dict[str, Any]]:
        """Ask a model that is not edited here: the unedited one, or someone's adapter.

        Args:
            without: a context in which `model` is the unedited one, such as `disable_adapter`.
        """
        rows = self.processes.share(range(self.first, self.last))

        def entries() -> list[dict[str, Any]]:
            with without():
                self.unedited.ask(model, self._questions(rows))
            found = []
            for start in range(0, len(rows), ASKED_TOGETHER):
                self.processes.look_up()
                found += self._ask(model, rows[start : start + ASKED_TOGETHER])
                self.tick(len(found) - start)
            return found

        return in_order(self.processes.gather(entries))

    def _side_by_side(self, method: Method, rows: Sequence[int], seed: int) -> list[dict[str, Any]] | None:
        """Make single edits, each with the fresh adapter that it would have alone, and ask each; None if one diverged."""
        texts = [self.unrelated[row % len(self.unrelated)] for row in rows] if self.unrelated else ()
        editor = method.start(self.base, self.tokenizer, texts, seed)
        assert isinstance(editor, BaftEditor), "a method with an objective edits with BaFT's editor"
        try:
            for row in rows:
                torch.manual_seed(seed * SEED_STRIDE + row)
                editor.model.add_adapter(f"row{row}", deepcopy(editor.model.peft_config[editor.adapter_name]))
            try:
                outcomes = editor.edit_side_by_side({f"row{row}": self.cases[row].edit for row in rows})
            except FloatingPointError:
                return None
            entries = self._ask(editor.model, rows, {row: f"row{row}" for row in rows})
            self.tick(len(rows))
            return [entry | _told(outcome) for entry, outcome in zip(entries, outcomes.values(), strict=True)]
        finally:
            editor.model.unload()

    def _run_block(
        self, editor: AdapterEditor, block: range, schedule: Schedule, progress: Progress
    ) -> list[dict[str, Any]]:
        """Make the block's remaining edits and ask, after each batch or after all of them."""
        editor.processes = self._sharing
        batches = [block[i : i + schedule.batch_size] for i in range(0, len(block), schedule.batch_size)]
        for batch in batches[len(progress.outcomes) :]:
            outcome = _edit(editor, [self.cases[row] for row in batch])
            replies = self._ask_here(editor.model, batch) if schedule.when == "immediate" else []
            if schedule.edits > 1:
                progress.edited(editor.model, outcome, replies)
            else:
                progress.outcomes.append(outcome)  # asked at once below, and kept with the block
                progress.replies += replies
            self.tick(len(batch))
        entries = progress.replies if schedule.when == "immediate" else self._ask_here(editor.model, block)
        outcomes = [outcome for outcome in progress.outcomes for _ in range(schedule.batch_size)]
        return [entry | outcome for entry, outcome in zip(entries, outcomes, strict=True)]

    @property
    def _sharing(self) -> Processes:
        """Those that have one adapter, and share the facts of a batch and what is asked about it."""
        return self.processes if self.split == "facts" else Processes()

    def _asked_here(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows of a block that this process asks."""
        return [row for row in rows if row % self._sharing.count == self._sharing.rank]

    def _ask_here(self, model: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
        return in_order(self._sharing.gather(lambda: self._ask(model, self._asked_here(rows))))

    def _ask(self, model: Any, rows: Sequence[int], adapters: dict[int, str] | None = None) -> list[dict[str, Any]]:
        """What a model replies now to the questions of some rows.

        adapters: which adapter answers for which row; None for the active one.
        """
        asked, context = self._questions(rows), find_context(model)

        def batched(batch: Sequence[int]) -> AbstractContextManager[Any]:
            assert adapters is not None and context is not None, "only BaFT adapters answer side by side"
            return context.rows([adapters[asked[i].row] for i in batch])

        replies = ask(model, self.tokenizer, asked, self.template, batched if adapters else one_model)
        found: dict[int, list[dict[str, Any]]] = {row: [] for row in rows}
        for question, reply in zip(asked, replies, strict=True):
            found[question.row].append(judged(question, reply, self.unedited.reply(question)))
        entries: list[dict[str, Any]] = [{"row": row, "probes": probes} for row, probes in found.items()]
        for entry in entries:
            if self.also and adapters is not None:
                model.set_adapter(adapters[entry["row"]])
            for measure in self.also:
                entry |= measure(model, self.tokenizer, self.cases[entry["row"]])
        return entries

    def _questions(self, rows: Sequence[int]) -> list[Question]:
        return [question for row in rows for question in questions_of(row, self.cases[row])]


def _edit(editor: AdapterEditor, cases: Sequence[Case]) -> dict[str, Any]:
    """Make one edit; one that had to be given up is an edit that was not learned, and says why."""
    try:
        outcome = editor.edit([case.edit for case in cases])
    except FloatingPointError as error:
        return {"steps": None, "seconds": None, "learned": False, "failed": str(error)}
    return _told(outcome, len(cases))


def _told(outcome: Outcome, edits: int = 1) -> dict[str, Any]:
    """An outcome as it stands in a result line; the seconds are those of one edit."""
    return {"steps": outcome.steps, "seconds": outcome.seconds / edits, "learned": outcome.learned}


def _require_apart(unrelated: Sequence[Unrelated], cases: Sequence[Case]) -> None:
    """Refuse to train on what is asked."""
    trained = {text.prompt for text in unrelated}
    both = next((probe.prompt for case in cases for probe in case.probes if probe.prompt in trained), None)
    if both is not None:
        raise ValueError(f"The unrelated text holds {both!r:.80}, which the benchmark asks; take other unrelated text.")
