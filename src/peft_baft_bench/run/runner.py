"""Make one run: one method over the rows of a benchmark, by one schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from peft_baft.data.cases import Case, Unrelated
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
from peft_baft_bench.questions.asking import Question, Unedited, ask, judged
from peft_baft_bench.questions.probing import Probing
from peft_baft_bench.run.peak_memory import begin_peak, peak
from peft_baft_bench.run.progress import Progress
from peft_baft_bench.run.results import in_order
from peft_baft_bench.run.schedule import Schedule

ASKED_TOGETHER = (
    8  # rows of a model that is not edited here, between two updates of the progress bar
)
TOGETHER = 64  # independent edits that are made at once, and kept at once
SPLITS = ("blocks", "facts")
Routed = Callable[[Sequence[Any]], list[int | None]]
SEED_STRIDE = 100_003  # the seed of a block is its first row, plus this times the run's seed


@dataclass(frozen=True)
class Runner:
    """The rows of a benchmark and the model that is edited and asked.

    Args:
        base: the model without any edit. cases: all rows of the benchmark. first, last: the rows judged, last excluded.
        unrelated: text to train beside; row i takes number i, from the beginning again at its end.
        template: the form in which facts are taught, and everything is asked.
        also: further metrics, whose values go beside a row's replies.
        tick: called with the number of rows that are through, for a progress bar.
        parallel: how many single edits share each forward, where the method can.
        processes: those that share the work; each gets all results.
        split: what of a run that edits is split over them: its `blocks`, or the `facts` of each batch.
        probing: which questions are asked; None asks those of the data alone.
        after_block: given the edited model and its tokenizer after the last edit of a block, further values by name.
    """

    base: Any
    tokenizer: Any
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
    after_block: Callable[[Any, Any], dict[str, float]] | None = None
    unedited: Unedited = field(init=False)
    prepared: EditCache = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= len(self.cases):
            raise ValueError(
                f"The rows must lie in 0:{len(self.cases)}, which the data holds, not be {self.first}:{self.last}."
            )
        if self._probing.template != self.template:
            raise ValueError(
                f"The runner asks in the form {self.template.name}, but its probing is for {self._probing.template.name}."
            )
        unedited = Unedited(self.tokenizer, self.template, self._probing.statement_tokens)
        object.__setattr__(self, "unedited", unedited)
        object.__setattr__(self, "prepared", EditCache())
        _require_apart(self.unrelated, self._questions(range(self.first, self.last)))

    # ------------------------------------------------------------------------------------------- runs that edit

    def edited(
        self, method: Method, schedule: Schedule, seed: int, progress: Progress
    ) -> list[dict[str, Any]]:
        """Edit block after block, each with a fresh editor, and ask.

        A run goes on where `progress` stopped; the result is then that of a run that was never interrupted.

        Returns:
            One entry a row: row, block, steps, seconds, learned, probes.
        """
        if self.split == "facts":
            return self._edit_blocks(method, schedule, seed, progress)
        return in_order(
            self.processes.all_gather(lambda: self._edit_blocks(method, schedule, seed, progress))
        )

    def share(self, schedule: Schedule) -> list[range]:
        """List the blocks in which this process takes part."""
        blocks = schedule.blocks(self.first, self.last)
        return blocks if self.split == "facts" else self.processes.shard(blocks)

    def amount(self, schedule: Schedule | None) -> int:
        """Count the rows that this process goes through, by a schedule or to ask alone."""
        if schedule is None:
            return len(self.processes.shard(range(self.first, self.last)))
        return schedule.block * len(self.share(schedule))

    def _edit_blocks(
        self, method: Method, schedule: Schedule, seed: int, progress: Progress
    ) -> list[dict[str, Any]]:
        """Go through this process's blocks: side by side where single edits can be, then one after another."""
        blocks = self._unfinished(schedule, progress)
        finished_blocks = len(self.share(schedule)) - len(blocks)
        self.tick(finished_blocks * schedule.block + len(progress.outcomes) * schedule.batch_size)
        questions: list[Question] = []
        for block in blocks:
            questions += self._questions(self._asked_here(block))
        # Locality compares with the unedited model, which is asked while there is no edit on it.
        self.unedited.ask(self.base, questions)
        side_by_side = method.settings.side_by_side and self.after_block is None
        if schedule.block == 1 and self.parallel > 1 and side_by_side:
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
        """Make the editor of some rows, with the unrelated text of each."""
        texts = (
            [self.unrelated[row % len(self.unrelated)] for row in rows] if self.unrelated else ()
        )
        setup = EditorSetup(texts, seed, self._sharing, self.prepared, self.template)
        return method.settings.start(self.base, self.tokenizer, setup)

    def _edit_singles(
        self, method: Method, rows: Sequence[int], seed: int, progress: Progress
    ) -> None:
        """Edit rows side by side, up to the first group in which one diverged: it must not take the others with it."""
        for start in range(0, len(rows), self.parallel):
            # A failure elsewhere ends this process too, and not only when its own share is done.
            self.processes.raise_if_peer_failed()
            entries = self._edit_side_by_side(method, rows[start : start + self.parallel], seed)
            if entries is None:
                break
            progress.finish_block(self._numbered(entries, Schedule()))

    def _edit_side_by_side(
        self, method: Method, rows: Sequence[int], seed: int
    ) -> list[dict[str, Any]] | None:
        """Make single edits, each with the fresh adapter that it would have alone, and ask each; None if one diverged."""
        editor = self._start(method, rows, seed)
        if not isinstance(editor, SideBySideEditor):
            raise TypeError(
                f"{method.name}: its settings promise edits side by side, but its editor has none."
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
        """Make the block's remaining edits and ask, after each batch or after all of them."""
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
                progress.outcomes.append(outcome)  # the block is asked at once, and kept whole
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
        """Make a block's remaining edits, which do not depend on each other, some at a time; none where one diverges."""
        while len(progress.outcomes) < len(batches):
            done = len(progress.outcomes)
            rows = [row for batch in batches[done : done + TOGETHER] for row in batch]
            outcomes = _edit_independently(editor, [self.cases[row] for row in rows])
            if outcomes is None:
                return  # one by one, then: it must not take the others with it
            progress.add_edits(editor, outcomes)
            self.tick(len(rows))

    def _unfinished(self, schedule: Schedule, progress: Progress) -> list[range]:
        """List the blocks that this process has not finished."""
        finished_rows = {case["row"] for case in progress.cases}
        return [block for block in self.share(schedule) if block.start not in finished_rows]

    def _numbered(
        self, entries: Sequence[dict[str, Any]], schedule: Schedule
    ) -> list[dict[str, Any]]:
        """Give entries the numbers of their blocks."""
        numbered = []
        for entry in entries:
            block = (entry["row"] - self.first) // schedule.block
            numbered.append({"row": entry["row"], "block": block, **entry})
        return numbered

    # ------------------------------------------------------------------------------------------- asking

    def asked(
        self, model: Any, without: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> list[dict[str, Any]]:
        """Ask a model that is not edited here: the unedited one, or someone's adapter.

        Args:
            without: a context in which `model` is the unedited one, such as `disable_adapter`.
        """
        rows = self.processes.shard(range(self.first, self.last))

        def ask_rows() -> list[dict[str, Any]]:
            with without():
                self.unedited.ask(model, self._questions(rows))
            entries: list[dict[str, Any]] = []
            for start in range(0, len(rows), ASKED_TOGETHER):
                self.processes.raise_if_peer_failed()
                entries += self._ask(model, rows[start : start + ASKED_TOGETHER])
                self.tick(len(entries) - start)
            return entries

        return in_order(self.processes.all_gather(ask_rows))

    @property
    def _sharing(self) -> Processes:
        """The processes that have one editor, and share the facts of a batch and what is asked about it."""
        return self.processes if self.split == "facts" else Processes()

    def _asked_here(self, rows: Sequence[int]) -> list[int]:
        """List those rows of a block that this process asks."""
        return [row for row in rows if row % self._sharing.world_size == self._sharing.rank]

    def _ask_here(
        self, model: Any, rows: Sequence[int], edited: Sequence[int], routed: Routed | None
    ) -> list[dict[str, Any]]:
        def ask_rows() -> list[dict[str, Any]]:
            return self._ask(model, self._asked_here(rows), edited=edited, routed=routed)

        return in_order(self._sharing.all_gather(ask_rows))

    def _ask(
        self,
        model: Any,
        rows: Sequence[int],
        editor: SideBySideEditor | None = None,
        adapter_names: dict[int, str] | None = None,
        edited: Sequence[int] = (),
        routed: Routed | None = None,
    ) -> list[dict[str, Any]]:
        """Ask the questions of some rows, and compute the further metrics.

        Args:
            editor, adapter_names: of edits side by side, the editor and which adapter answers for which row.
            edited: the rows that the model was edited by together, in turn. routed: tells which edit answers a prompt.
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
            probes[question.row].append(judged(question, reply, self.unedited.reply(question)))
        if routed is not None:
            answered_by = routed([question.prompt for question in questions])
            _mark_routes(probes, questions, answered_by, edited)
        entries: list[dict[str, Any]] = [
            {"row": row, "probes": of_row} for row, of_row in probes.items()
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
    """Count the bytes that an editor's edits so far take when they are kept: its state without cursors."""
    state = editor.state_dict()
    return sum(tensor.nbytes for name, tensor in state.items() if not name.startswith(CURSOR))


def _edit(editor: Editor, cases: Sequence[Case]) -> dict[str, Any]:
    """Make one edit; one that had to be given up is an edit that was not learned, and says why.

    Its seconds are those of the whole call, shared among the facts of a batch: what a method computes once for all edits of a
    model counts to the first.
    """
    device = input_device(editor.model)
    begin_peak(device)
    begin = time.perf_counter()
    try:
        result = editor.edit([case.edit for case in cases])
    except FloatingPointError as error:
        return {"steps": None, "seconds": None, "learned": False, "failed": str(error)}
    seconds = (time.perf_counter() - begin) / len(cases)
    held = peak(device)
    return _outcome(replace(result, seconds=seconds)) | ({"peak_bytes": held} if held else {})


def _edit_independently(
    editor: IndependentEditor, cases: Sequence[Case]
) -> list[dict[str, Any]] | None:
    """Make independent edits at once; None if one could not be made."""
    device = input_device(editor.model)
    begin_peak(device)
    begin = time.perf_counter()
    try:
        results = editor.edit_independently([case.edit for case in cases])
    except (FloatingPointError, ValueError):
        return None
    seconds = (time.perf_counter() - begin) / len(cases)
    held = peak(device)
    memory = {"peak_bytes": held} if held else {}
    return [_outcome(replace(result, seconds=seconds)) | memory for result in results]


def _outcome(result: EditResult) -> dict[str, Any]:
    """Give a result as it stands in a result line."""
    return {"steps": result.steps, "seconds": result.seconds, "learned": result.learned}


def _require_apart(unrelated: Sequence[Unrelated], questions: Sequence[Question]) -> None:
    """Raise a ValueError if text that is trained on is asked as well."""
    trained = {text.prompt for text in unrelated}
    for question in questions:
        if question.kind != "reliability" and question.prompt in trained:
            raise ValueError(
                f"The unrelated text holds {question.prompt!r:.80}, which the benchmark asks; "
                "take other unrelated text."
            )


def _mark_routes(
    probes: Mapping[int, Sequence[dict[str, Any]]],
    questions: Sequence[Question],
    answered_by: Sequence[int | None],
    edited: Sequence[int],
) -> None:
    """Note in the probe of each question whether the row's own edit answers it, another one, or none.

    Args:
        probes: of each row, in the order of its questions. answered_by: the number of each question's edit, from 1, in the order
            of the rows in `edited`.
    """
    places = {row: number for number, row in enumerate(edited, start=1)}
    following = {row: iter(of_row) for row, of_row in probes.items()}
    for question, number in zip(questions, answered_by, strict=True):
        of_edit = "own" if number == places[question.row] else "other"
        next(following[question.row])["route"] = "none" if number is None else of_edit
