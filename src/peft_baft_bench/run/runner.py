"""Run one editing method over the rows of a benchmark with one schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.cases import Case, Prompt, Unrelated
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import (
    CURSOR,
    Editor,
    EditResult,
    IndependentEditor,
    RoutedEditor,
    SideBySideEditor,
)
from peft_baft.evaluation.forward import one_model
from peft_baft.processes import Processes
from peft_baft.running import input_device
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.methods import Method
from peft_baft_bench.metrics.metrics import Metric
from peft_baft_bench.questions.asking import Question, UneditedReplies, ask, judge
from peft_baft_bench.questions.probing import Probing
from peft_baft_bench.run.peak_memory import peak_bytes, reset_peak
from peft_baft_bench.run.progress import Progress
from peft_baft_bench.run.results import sort_by_row
from peft_baft_bench.run.schedule import Schedule

ROWS_PER_UPDATE = 8  # how often the progress bar moves where nothing is edited
EDITS_PER_GROUP = 64  # independent edits that are made and saved together
SPLITS = ("blocks", "facts")
Routed = Callable[[Sequence[Prompt]], list[int | None]]
SEED_STRIDE = 100_003  # the seed of a block is its first row plus SEED_STRIDE times the run's seed


@dataclass(frozen=True)
class Runner:
    """Edits a model with a method, row by row of a benchmark, and asks the benchmark's questions.

    Args:
        base: the unedited model.
        tokenizer: the model's tokenizer.
        cases: all rows of the benchmark.
        first, last: the range of rows to evaluate; `last` is excluded.
        unrelated: texts to train alongside the edits; row i uses text i, modulo their number.
        template: the prompt format used for teaching and for all questions.
        also: further metrics, stored next to a row's replies.
        tick: called with the number of rows just completed, for a progress bar.
        parallel: how many single edits share each forward, where the method supports it.
        processes: the processes that share the work; each of them returns all results.
        split: how an editing run is distributed over the processes: by `blocks`, or by the `facts` of each
            batch.
        probing: which questions are asked; None asks only those of the data.
        after_block: called with the edited model and its tokenizer after the last edit of a block; returns
            further values by name.
        unedited: replies of the unedited model, shared by all runs.
        prepared: what editors of the base model share.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cases: Sequence[Case]
    first: int
    last: int
    unrelated: Sequence[Unrelated] = ()
    template: Template = RAW
    also: Sequence[Metric] = ()
    tick: Callable[[int], None] = lambda rows: None
    parallel: int = 16
    processes: Processes = field(default_factory=Processes)
    split: str = SPLITS[0]
    probing: Probing | None = None
    after_block: Callable[[nn.Module, PreTrainedTokenizerBase], dict[str, float]] | None = None
    unedited: UneditedReplies = field(init=False)
    prepared: EditCache = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= len(self.cases):
            raise ValueError(
                f"The rows {self.first}:{self.last} must lie within 0:{len(self.cases)}, the rows of the data."
            )
        if self._probing.template != self.template:
            raise ValueError(
                f"The runner uses the template {self.template.name}, but its probing uses {self._probing.template.name}."
            )
        unedited = UneditedReplies(self.tokenizer, self.template, self._probing.statement_tokens)
        object.__setattr__(self, "unedited", unedited)
        object.__setattr__(self, "prepared", EditCache())
        _require_disjoint(self.unrelated, self._questions(range(self.first, self.last)))

    # ------------------------------------------------------------------------------------------- runs that edit

    def edit_and_ask(
        self, method: Method, schedule: Schedule, seed: int, progress: Progress
    ) -> list[dict[str, Any]]:
        """Edit block after block, each with a fresh editor, and ask the questions.

        A run resumes from `progress`; the result equals that of an uninterrupted run.

        Returns:
            One entry per row with the keys row, block, steps, seconds, learned and probes.
        """
        if self.split == "facts":
            return self._edit_blocks(method, schedule, seed, progress)
        return sort_by_row(
            self.processes.all_gather(lambda: self._edit_blocks(method, schedule, seed, progress))
        )

    def own_blocks(self, schedule: Schedule) -> list[range]:
        """List the blocks that this process works on."""
        blocks = schedule.blocks(self.first, self.last)
        return blocks if self.split == "facts" else self.processes.shard(blocks)

    def count_rows(self, schedule: Schedule | None) -> int:
        """Count the rows that this process handles with a schedule, or without one when it only asks."""
        if schedule is None:
            return len(self.processes.shard(range(self.first, self.last)))
        return schedule.block_size * len(self.own_blocks(schedule))

    def _edit_blocks(
        self, method: Method, schedule: Schedule, seed: int, progress: Progress
    ) -> list[dict[str, Any]]:
        """Process this process's blocks: single edits in shared forwards where possible, the rest one after another."""
        blocks = self._unfinished(schedule, progress)
        finished_blocks = len(self.own_blocks(schedule)) - len(blocks)
        self.tick(
            finished_blocks * schedule.block_size + len(progress.outcomes) * schedule.batch_size
        )
        questions: list[Question] = []
        for block in blocks:
            questions += self._questions(self._asked_here(block))
        # Locality is relative to the unedited model, so ask it before the first edit.
        self.unedited.ask(self.base, questions)
        side_by_side = method.settings.side_by_side and self.after_block is None
        if schedule.block_size == 1 and self.parallel > 1 and side_by_side:
            self._edit_singles(method, [block.start for block in blocks], seed, progress)
        for block in self._unfinished(schedule, progress):
            self.processes.raise_if_peer_failed()
            editor = self._start(method, block, seed * SEED_STRIDE + block.start)
            try:
                progress.restore(editor)
                entries = self._run_block(editor, block, schedule, progress)
                stored = {"stored_bytes": stored_bytes(editor)}
                entries = [entry | stored for entry in entries]
                if self.after_block is not None:
                    entries[-1] |= self.after_block(editor.model, self.tokenizer)
            finally:
                editor.remove()
            progress.finish_block(self._numbered(entries, schedule))
        return progress.cases

    def _start(self, method: Method, rows: Sequence[int], seed: int) -> Editor:
        """Create the editor for some rows, with the unrelated text of each row."""
        texts = (
            [self.unrelated[row % len(self.unrelated)] for row in rows] if self.unrelated else ()
        )
        setup = EditorSetup(texts, seed, self._sharing, self.prepared, self.template)
        return method.settings.start(self.base, self.tokenizer, setup)

    def _edit_singles(
        self, method: Method, rows: Sequence[int], seed: int, progress: Progress
    ) -> None:
        """Make single edits in shared forwards, up to the first group in which one diverged."""
        for start in range(0, len(rows), self.parallel):
            # If another process has failed, stop now instead of after finishing this share.
            self.processes.raise_if_peer_failed()
            entries = self._edit_side_by_side(method, rows[start : start + self.parallel], seed)
            if entries is None:
                break
            progress.finish_block(self._numbered(entries, Schedule()))

    def _edit_side_by_side(
        self, method: Method, rows: Sequence[int], seed: int
    ) -> list[dict[str, Any]] | None:
        """Make independent single edits in shared forwards, and ask about each; None if one diverged.

        Each edit has its own fresh adapter.
        """
        editor = self._start(method, rows, seed)
        if not isinstance(editor, SideBySideEditor):
            raise TypeError(
                f"{method.name}: its settings have side_by_side=True, but its editor is not a SideBySideEditor."
            )
        names = {row: f"row{row}" for row in rows}
        edits = {names[row]: self.cases[row].edit for row in rows}
        seeds = {names[row]: seed * SEED_STRIDE + row for row in rows}
        try:
            try:
                results = editor.edit_fresh(edits, seeds)
            except FloatingPointError:
                return None
            entries = self._ask(editor.model, rows, editor, names)
            self.tick(len(rows))
            stored = {"stored_bytes": stored_bytes(editor)}
            return [entry | _outcome(results[names[entry["row"]]]) | stored for entry in entries]
        finally:
            editor.remove()

    def _run_block(
        self, editor: Editor, block: range, schedule: Schedule, progress: Progress
    ) -> list[dict[str, Any]]:
        """Make the remaining edits of a block and ask the questions, after each batch or after all of them."""
        batches = [
            block[i : i + schedule.batch_size] for i in range(0, len(block), schedule.batch_size)
        ]
        in_turn = schedule.batch_size == 1 and schedule.when == "after_all"
        if in_turn and isinstance(editor, IndependentEditor):
            self._edit_together(editor, batches, progress)
        routed = editor.routed if isinstance(editor, RoutedEditor) else None
        for batch in batches[len(progress.outcomes) :]:
            outcome = _edit(editor, [self.cases[row] for row in batch])
            replies = (
                self._ask_here(editor.model, batch, block, routed)
                if schedule.when == "immediate"
                else []
            )
            if schedule.edits > 1:
                progress.add_edit(editor, outcome, replies)
            else:
                progress.outcomes.append(outcome)  # saved with the whole block
                progress.replies += replies
            self.tick(len(batch))
        entries = (
            progress.replies
            if schedule.when == "immediate"
            else self._ask_here(editor.model, block, block, routed)
        )
        outcomes: list[dict[str, Any]] = []
        for outcome in progress.outcomes:
            outcomes += [outcome] * schedule.batch_size
        return [entry | outcome for entry, outcome in zip(entries, outcomes, strict=True)]

    def _edit_together(
        self, editor: IndependentEditor, batches: Sequence[Sequence[int]], progress: Progress
    ) -> None:
        """Make the remaining edits of a block in groups; they must be independent.

        Stop at a group in which one diverges.
        """
        while len(progress.outcomes) < len(batches):
            done = len(progress.outcomes)
            rows = [row for batch in batches[done : done + EDITS_PER_GROUP] for row in batch]
            outcomes = _edit_independently(editor, [self.cases[row] for row in rows])
            if outcomes is None:
                return  # the caller makes them one by one, so that only the diverging edit fails
            progress.add_edits(editor, outcomes)
            self.tick(len(rows))

    def _unfinished(self, schedule: Schedule, progress: Progress) -> list[range]:
        """List the blocks that this process has not finished."""
        finished_rows = {case["row"] for case in progress.cases}
        return [block for block in self.own_blocks(schedule) if block.start not in finished_rows]

    def _numbered(
        self, entries: Sequence[dict[str, Any]], schedule: Schedule
    ) -> list[dict[str, Any]]:
        """Add the block number to each entry."""
        numbered = []
        for entry in entries:
            block = (entry["row"] - self.first) // schedule.block_size
            numbered.append({"row": entry["row"], "block": block, **entry})
        return numbered

    # ------------------------------------------------------------------------------------------- asking

    def ask_model(
        self, model: nn.Module, without: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> list[dict[str, Any]]:
        """Ask a model that this run does not edit: the unedited model, or an existing adapter.

        Args:
            without: returns a context in which `model` is unedited, such as `disable_adapter`.
        """
        rows = self.processes.shard(range(self.first, self.last))

        def ask_rows() -> list[dict[str, Any]]:
            with without():
                self.unedited.ask(model, self._questions(rows))
            entries: list[dict[str, Any]] = []
            for start in range(0, len(rows), ROWS_PER_UPDATE):
                self.processes.raise_if_peer_failed()
                entries += self._ask(model, rows[start : start + ROWS_PER_UPDATE])
                self.tick(len(entries) - start)
            return entries

        return sort_by_row(self.processes.all_gather(ask_rows))

    @property
    def _sharing(self) -> Processes:
        """The processes that share one editor: they divide the facts of a batch and the questions about it."""
        return self.processes if self.split == "facts" else Processes()

    def _asked_here(self, rows: Sequence[int]) -> list[int]:
        """List the rows of a block that this process asks about."""
        return [row for row in rows if row % self._sharing.world_size == self._sharing.rank]

    def _ask_here(
        self, model: nn.Module, rows: Sequence[int], edited: Sequence[int], routed: Routed | None
    ) -> list[dict[str, Any]]:
        def ask_rows() -> list[dict[str, Any]]:
            return self._ask(model, self._asked_here(rows), edited=edited, routed=routed)

        return sort_by_row(self._sharing.all_gather(ask_rows))

    def _ask(
        self,
        model: nn.Module,
        rows: Sequence[int],
        editor: SideBySideEditor | None = None,
        adapter_names: dict[int, str] | None = None,
        edited: Sequence[int] = (),
        routed: Routed | None = None,
    ) -> list[dict[str, Any]]:
        """Ask the questions about some rows and compute the further metrics.

        Args:
            editor, adapter_names: for edits in parallel adapters, the editor and the adapter that answers for
                each row.
            edited: the rows that the model was edited with, in order.
            routed: returns the number of the edit that answers each prompt.
        """
        questions = self._questions(rows, edited)
        names = adapter_names or {}

        def answering(batch: Sequence[int]) -> AbstractContextManager[Any]:
            if editor is None:
                return nullcontext()
            return editor.answering([names[questions[i].row] for i in batch])

        context = one_model if editor is None else answering
        replies = ask(
            model,
            self.tokenizer,
            questions,
            self.template,
            context,
            statement_tokens=self._probing.statement_tokens,
            unedited=self.unedited.reply,
        )
        probes: dict[int, list[dict[str, Any]]] = {row: [] for row in rows}
        for question, reply in zip(questions, replies, strict=True):
            probes[question.row].append(judge(question, reply, self.unedited.reply(question)))
        if routed is not None:
            answered_by = routed([question.prompt for question in questions])
            _mark_routes(probes, questions, answered_by, edited)
        entries: list[dict[str, Any]] = [
            {"row": row, "probes": probes_of_row} for row, probes_of_row in probes.items()
        ]
        for entry in entries:
            if self.also and editor is not None:
                editor.use(names[entry["row"]])
            for metric in self.also:
                entry |= metric(model, self.tokenizer, self.cases[entry["row"]], self.template)
        return entries

    @property
    def _probing(self) -> Probing:
        return self.probing or Probing(self.template)

    def _questions(self, rows: Sequence[int], edited: Sequence[int] = ()) -> list[Question]:
        return self._probing.questions(rows, self.cases, edited)


def stored_bytes(editor: Editor) -> int:
    """Count the bytes needed to store an editor's edits: its state without cursors."""
    state = editor.state_dict()
    return sum(tensor.nbytes for name, tensor in state.items() if not name.startswith(CURSOR))


def _edit(editor: Editor, cases: Sequence[Case]) -> dict[str, Any]:
    """Make one edit and return its outcome.

    If a loss diverged, the edit counts as not learned and the outcome contains the reason.

    The seconds are those of the whole call, divided by the number of facts in the batch. What a method
    computes once for all edits of a model is therefore charged to the first edit.
    """
    device = input_device(editor.model)
    reset_peak(device)
    begin = time.perf_counter()
    try:
        result = editor.edit([case.edit for case in cases])
    except FloatingPointError as error:
        return {"steps": None, "seconds": None, "learned": False, "failed": str(error)}
    seconds = (time.perf_counter() - begin) / len(cases)
    peak = peak_bytes(device)
    return _outcome(replace(result, seconds=seconds)) | ({"peak_bytes": peak} if peak else {})


def _edit_independently(
    editor: IndependentEditor, cases: Sequence[Case]
) -> list[dict[str, Any]] | None:
    """Make independent edits together; None if one of them could not be made."""
    device = input_device(editor.model)
    reset_peak(device)
    begin = time.perf_counter()
    try:
        results = editor.edit_independently([case.edit for case in cases])
    except (FloatingPointError, ValueError):
        return None
    seconds = (time.perf_counter() - begin) / len(cases)
    peak = peak_bytes(device)
    memory = {"peak_bytes": peak} if peak else {}
    return [_outcome(replace(result, seconds=seconds)) | memory for result in results]


def _outcome(result: EditResult) -> dict[str, Any]:
    """Convert a result to the fields of a result line."""
    return {"steps": result.steps, "seconds": result.seconds, "learned": result.learned}


def _require_disjoint(unrelated: Sequence[Unrelated], questions: Sequence[Question]) -> None:
    """Raise a ValueError if a training text is also a question of the benchmark."""
    trained = {text.prompt for text in unrelated}
    for question in questions:
        if question.kind != "reliability" and question.prompt in trained:
            raise ValueError(
                f"The unrelated text contains {question.prompt!r:.80}, which the benchmark asks; "
                "use other unrelated text."
            )


def _mark_routes(
    probes: Mapping[int, Sequence[dict[str, Any]]],
    questions: Sequence[Question],
    answered_by: Sequence[int | None],
    edited: Sequence[int],
) -> None:
    """Record for each question whether the row's own edit answers it, another edit, or none.

    Args:
        probes: the probes of each row, in the order of its questions.
        answered_by: for each question, the number of the edit that answers it, counted from 1 in the order of
            `edited`; None for no edit.
    """
    numbers = {row: number for number, row in enumerate(edited, start=1)}
    remaining = {row: iter(probes_of_row) for row, probes_of_row in probes.items()}
    for question, number in zip(questions, answered_by, strict=True):
        next(remaining[question.row])["route"] = _route(number, numbers[question.row])


def _route(answered_by: int | None, own: int) -> str:
    if answered_by is None:
        return "none"
    return "own" if answered_by == own else "other"
