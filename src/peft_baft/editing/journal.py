"""The record of a continual run, safe against power failures: one line per edit, and snapshots of the adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME
from safetensors.torch import save
from torch import Tensor

from peft_baft.editing.editor import CURSOR
from peft_baft.storage import (
    append_line,
    load_with_header,
    read_lines,
    replace_file,
    save_with_header,
)

LINES, SNAPSHOTS, LOCK = "journal.jsonl", "snapshots", "journal.lock"
SUFFIX = ".safetensors"
REMEDY = (
    "Delete it to continue from the previous snapshot; the edits since then will be made again."
)
# Keys of a snapshot's header.
FORM = "form"  # the prompt formats that the adapter's config records
AFTER = "after"  # the number of the last edit in the snapshot


@dataclass(frozen=True)
class RunLine:
    """The start of a run. after: the number of the last edit before it. settings: all that affects the outcome of its edits."""

    after: int
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the line as it is written to the file."""
        return {"run": {"after": self.after, **self.settings}}


@dataclass(frozen=True)
class EditLine:
    """One batch of edits.

    Attributes:
        edit: the number of the batch, counted from 1 over all runs of the adapter.
        facts: pairs of prompt and target; messages are a list of JSON objects.
        steps, loss, seconds: the cost of training; None if it was aborted by a NaN or infinity.
        learned: whether the loss fell below the stop loss.
        problem: why the batch was rejected; None if it was accepted.
        kept: whether the batch is in the adapter.
        when: the time in UTC; None in journals of earlier versions.
    """

    edit: int
    facts: Sequence[Sequence[Any]]
    steps: int | None
    loss: float | None
    seconds: float | None
    learned: bool
    problem: str | None
    kept: bool
    when: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line as it is written to the file."""
        return asdict(self)


@dataclass(frozen=True)
class ReturnLine:
    """A rollback to an earlier state: the edits after number `back_to` were undone."""

    back_to: int

    def to_json(self) -> dict[str, Any]:
        """Return the line as it is written to the file."""
        return asdict(self)


@dataclass(frozen=True)
class ForgetLine:
    """The removal of an edit from a memory. forgotten: the number of the edit. when: the time in UTC."""

    forgotten: int
    when: str

    def to_json(self) -> dict[str, Any]:
        """Return the line as it is written to the file."""
        return asdict(self)


Line = RunLine | EditLine | ReturnLine | ForgetLine
# By the key that only this kind of line has.
LINE_TYPES: dict[str, type[Any]] = {
    "edit": EditLine,
    "back_to": ReturnLine,
    "forgotten": ForgetLine,
}


@dataclass(frozen=True)
class JournalState:
    """The result of replaying a journal.

    Attributes:
        runs: the starts of all runs, in order.
        edits: the edits that no later rollback has undone, in order; forgotten ones are among them.
        edit_runs: the run of each of these edits; None for edits of journals from before runs were recorded.
        forgotten: the lines that removed edits from a memory, by the number of the edit.
    """

    runs: tuple[RunLine, ...]
    edits: tuple[EditLine, ...]
    edit_runs: tuple[RunLine | None, ...]
    forgotten: Mapping[int, ForgetLine]

    @classmethod
    def replay(cls, lines: Iterable[Line]) -> JournalState:
        """Replay the lines of a journal in order."""
        runs: list[RunLine] = []
        edits: list[tuple[EditLine, RunLine | None]] = []
        forgotten: dict[int, ForgetLine] = {}
        for line in lines:
            if isinstance(line, RunLine):
                runs.append(line)
            elif isinstance(line, ReturnLine):
                edits = [(edit, run) for edit, run in edits if edit.edit <= line.back_to]
                forgotten = {n: forget for n, forget in forgotten.items() if n <= line.back_to}
            elif isinstance(line, ForgetLine):
                forgotten[line.forgotten] = line
            else:
                edits.append((line, runs[-1] if runs else None))
        return cls(
            tuple(runs),
            tuple(edit for edit, _ in edits),
            tuple(run for _, run in edits),
            forgotten,
        )

    @property
    def last_number(self) -> int:
        """The number of the last edit; 0 if there is none."""
        return self.edits[-1].edit if self.edits else 0


def now() -> str:
    """Return the current time in UTC, in the format of the lines."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def parse_line(value: Any) -> Line:
    """Parse one line of the file, already decoded from JSON.

    Raises:
        ValueError: it is not a line of a journal.
    """
    keys = [key for key in ("run", *LINE_TYPES) if isinstance(value, dict) and key in value]
    if len(keys) != 1 or not isinstance(value[keys[0]], int | dict):
        raise ValueError("it is not a run, edit, return or forget line")
    try:
        if keys == ["run"]:
            settings = dict(value["run"])
            return RunLine(int(settings.pop("after")), settings)
        line: Line = LINE_TYPES[keys[0]](**value)
        return line
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its fields are not those of a line ({error})") from None


class Journal:
    """The journal of an adapter, in the adapter's folder.

    Lines are only appended to `journal.jsonl`, one JSON object per `Line`. `snapshots/` has the adapter's state after some of
    the edits. Snapshots are written atomically and have a checksum.

    Args:
        folder: the adapter's folder. every: the number of edits between snapshots.

    Raises:
        ValueError: every is below 1.
    """

    def __init__(self, folder: str | Path, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"A snapshot can be taken every 1 or more edits, not every {every}.")
        self.folder, self.every = Path(folder), every

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the journal for writing.

        Raises:
            ValueError: another process has locked it. OSError: the folder is not writable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process is editing {self.folder}. Wait for it to finish, or use another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def lines(self) -> list[Line]:
        """Read all complete lines in order. A last line that was cut short by a crash is ignored.

        Raises:
            ValueError: a line is damaged.
        """
        file = self.folder / LINES
        lines = []
        for number, value in read_lines(file):
            try:
                lines.append(parse_line(value))
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is damaged: {error}.") from None
        return lines

    def state(self) -> JournalState:
        """Replay the journal.

        Raises:
            ValueError: a line is damaged.
        """
        return JournalState.replay(self.lines())

    def add(self, line: Line) -> None:
        """Append one line and flush it to the disk."""
        append_line(self.folder / LINES, line.to_json())

    def snapshots(self) -> list[int]:
        """List the numbers of the edits after which there is a snapshot; 0 is the state before the first edit."""
        files = (self.folder / SNAPSHOTS).glob(f"*{SUFFIX}")
        return sorted(int(file.stem) for file in files if file.stem.isdigit())

    def save_snapshot(
        self, number: int, state: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> None:
        """Write the snapshot after edit `number`: an editor's state, and what else is needed to continue from it."""
        save_with_header(self._snapshot(number), state, {AFTER: number, **header})

    def load_snapshot(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read a snapshot: an editor's state, and the header that was saved with it.

        Raises:
            ValueError: the snapshot does not exist or is damaged.
        """
        file = self._snapshot(number)
        if not file.exists():
            existing = ", ".join(map(str, self.snapshots())) or "none"
            raise ValueError(
                f"{self.folder} has no snapshot after edit {number}; it has snapshots after: {existing}."
            )
        try:
            state, header = load_with_header(file)
        except ValueError as error:
            raise ValueError(f"{error} {REMEDY}") from None
        if header.get(AFTER) != number:
            raise ValueError(f"{file} is damaged: it is the snapshot of another edit. {REMEDY}")
        return state, header

    def roll_back(self, number: int) -> None:
        """Restore the adapter's file to its content after edit `number`, and undo the later edits.

        The prompt formats in its config are restored as well, unless the snapshot is from a version that did not record them.

        Raises:
            ValueError: the edit or its snapshot does not exist, or another process has locked the journal.
        """
        with self.writing():
            count = len(self.state().edits)
            if not 0 <= number <= count:
                raise ValueError(
                    f"{self.folder} has edits 1 to {count}; it cannot be rolled back to {number}."
                )
            state, header = self.load_snapshot(number)
            weights = {
                name: tensor for name, tensor in state.items() if not name.startswith(CURSOR)
            }
            replace_file(self.folder / "adapter_model.safetensors", save(weights, {"format": "pt"}))
            self._restore_form(header.get(FORM, {}))
            self.add(ReturnLine(number))
            self.delete_snapshots_after(number)

    def _restore_form(self, form: Mapping[str, Any]) -> None:
        """Write the prompt formats into the adapter's config, if it exists yet."""
        file = self.folder / CONFIG_NAME
        if form and file.exists():
            config = json.loads(file.read_text("utf-8")) | dict(form)
            replace_file(file, json.dumps(config, indent=2, sort_keys=True).encode())

    def clear(self) -> None:
        """Delete the record and all snapshots."""
        with self.writing():
            (self.folder / LINES).unlink(missing_ok=True)
            self.delete_snapshots_after(-1)

    def delete_snapshots_after(self, number: int) -> None:
        """Delete the snapshots after edit `number`."""
        for later in self.snapshots():
            if later > number:
                self._snapshot(later).unlink()

    def _snapshot(self, number: int) -> Path:
        return self.folder / SNAPSHOTS / f"{number:06d}{SUFFIX}"
