"""One run: one method over the rows of a benchmark, by one schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from peft_baft.bench.methods import Method
from peft_baft.bench.progress import Progress
from peft_baft.bench.schedule import Schedule
from peft_baft.data.cases import Case, Unrelated
from peft_baft.editing.editor import AdapterEditor
from peft_baft.evaluation.asking import Question, Unedited, ask, judged, questions_of

SEED_STRIDE = 100_003  # seeds of a run's blocks: a block's first row, and this times the run's seed
Measure = Callable[[Any, Any, Case], dict[str, Any]]  # an edited model, its tokenizer, a case to values by name


@dataclass(frozen=True)
class Bench:
    """The rows of a benchmark and the model that is judged on them.

    Args:
        base: the model without any adapter. cases: all rows of the benchmark. first, last: the rows judged, last excluded.
        unrelated: text to train beside; row i takes number i, from the beginning again at its end.
        template: how edits and rephrasings are asked, `raw` or `chat`.
        also: further measures, whose values go beside a row's replies.
        tick: called with the number of rows that are through, for a progress bar.
    """

    base: Any
    tokenizer: Any
    cases: Sequence[Case]
    first: int
    last: int
    unrelated: Sequence[Unrelated] = ()
    template: str = "raw"
    also: Sequence[Measure] = ()
    tick: Callable[[int], None] = lambda rows: None
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
        blocks = schedule.blocks(self.first, self.last)
        open_blocks = blocks[len(progress.cases) // schedule.block :]
        self.tick(len(progress.cases) + len(progress.outcomes) * schedule.batch_size)
        self.unedited.ask(self.base, [q for block in open_blocks for q in self._questions(block)])
        for block in open_blocks:
            done = len(progress.outcomes) * schedule.batch_size
            texts = [self.unrelated[row % len(self.unrelated)] for row in block] if self.unrelated else ()
            editor = method.start(self.base, self.tokenizer, texts, seed * SEED_STRIDE + block.start, done)
            try:
                progress.restore(editor.model)
                found = self._run_block(editor, block, schedule, progress)
            finally:
                editor.model.unload()
            number = len(progress.cases) // schedule.block
            progress.finished([{"row": entry["row"], "block": number, **entry} for entry in found])
        return progress.cases

    def asked(
        self, model: Any, without: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> list[dict[str, Any]]:
        """Ask a model that is not edited here: the unedited one, or someone's adapter.

        Args:
            without: a context in which `model` is the unedited one, such as `disable_adapter`.
        """
        rows = range(self.first, self.last)
        with without():
            self.unedited.ask(model, self._questions(rows))
        entries = []
        for row in rows:
            entries += self._ask(model, range(row, row + 1))
            self.tick(1)
        return entries

    def _run_block(
        self, editor: AdapterEditor, block: range, schedule: Schedule, progress: Progress
    ) -> list[dict[str, Any]]:
        """Make the block's remaining edits and ask, after each batch or after all of them."""
        batches = [block[i : i + schedule.batch_size] for i in range(0, len(block), schedule.batch_size)]
        for batch in batches[len(progress.outcomes) :]:
            outcome = _edit(editor, [self.cases[row] for row in batch])
            replies = self._ask(editor.model, batch) if schedule.when == "immediate" else []
            if schedule.edits > 1:
                progress.edited(editor.model, outcome, replies)
            else:
                progress.outcomes.append(outcome)  # asked at once below, and kept with the block
                progress.replies += replies
            self.tick(len(batch))
        entries = progress.replies if schedule.when == "immediate" else self._ask(editor.model, block)
        outcomes = [outcome for outcome in progress.outcomes for _ in range(schedule.batch_size)]
        return [entry | outcome for entry, outcome in zip(entries, outcomes, strict=True)]

    def _ask(self, model: Any, rows: range) -> list[dict[str, Any]]:
        """What a model replies now to the questions of some rows."""
        asked = self._questions(rows)
        replies = ask(model, self.tokenizer, asked, self.template)
        found: dict[int, list[dict[str, Any]]] = {row: [] for row in rows}
        for question, reply in zip(asked, replies, strict=True):
            found[question.row].append(judged(question, reply, self.unedited.reply(question)))
        entries: list[dict[str, Any]] = [{"row": row, "probes": probes} for row, probes in found.items()]
        for entry in entries:
            for measure in self.also:
                entry |= measure(model, self.tokenizer, self.cases[entry["row"]])
        return entries

    def _questions(self, rows: range) -> list[Question]:
        return [question for row in rows for question in questions_of(row, self.cases[row])]


def _edit(editor: AdapterEditor, cases: Sequence[Case]) -> dict[str, Any]:
    """Make one edit; one that had to be given up is an edit that was not learned, and says why."""
    try:
        outcome = editor.edit([case.edit for case in cases])
    except FloatingPointError as error:
        return {"steps": None, "seconds": None, "learned": False, "failed": str(error)}
    return {"steps": outcome.steps, "seconds": outcome.seconds / len(cases), "learned": outcome.learned}


def _require_apart(unrelated: Sequence[Unrelated], cases: Sequence[Case]) -> None:
    """Refuse to train on what is asked."""
    trained = {text.prompt for text in unrelated}
    both = next((probe.prompt for case in cases for probe in case.probes if probe.prompt in trained), None)
    if both is not None:
        raise ValueError(f"The unrelated text holds {both!r:.80}, which the benchmark asks; take other unrelated text.")
