"""A record of a continual run that a power cut cannot spoil: a line for each edit, and snapshots of the adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
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
REMEDY = "Delete it to go on from the snapshot before it; the edits since then are made again."
FORM = (
    "form"  # in a snapshot's header: what the adapter's config remembered of the form of its facts
)
AFTER = "after"  # in a snapshot's header: the number of its last edit


@dataclass(frozen=True)
class RunLine:
    """The beginning of a run. after: the number of the last edit before it. settings: what decides how its edits come out."""

    after: int
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give the line as it stands in the file."""
        return {"run": {"after": self.after, **self.settings}}


@dataclass(frozen=True)
class EditLine:
    """One batch of edits.

    Attributes:
        edit: its number, from 1 over all runs of the adapter.
        facts: pairs of prompt and target; a prompt of messages as JSON has them.
        steps, loss, seconds: what it cost; None if it broke off.
        learned: whether its loss fell below the stop loss.
        problem: why it is not good; None if it is.
        kept: whether it is in the adapter.
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
        """Give the line as it stands in the file."""
        return asdict(self)


@dataclass(frozen=True)
class ReturnLine:
    """A return to an earlier state: the edits after number `back_to` count no more."""

    back_to: int

    def to_json(self) -> dict[str, Any]:
        """Give the line as it stands in the file."""
        return asdict(self)


@dataclass(frozen=True)
class ForgetLine:
    """An edit that was taken out of a memory. forgotten: its number. when: the time in UTC."""

    forgotten: int
    when: str

    def to_json(self) -> dict[str, Any]:
        """Give the line as it stands in the file."""
        return asdict(self)


Line = RunLine | EditLine | ReturnLine | ForgetLine
KINDS: dict[str, type[Any]] = {"edit": EditLine, "back_to": ReturnLine, "forgotten": ForgetLine}


def now() -> str:
    """Give the time in UTC, as lines have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def parse_line(value: Any) -> Line:
    """Make a line from what stands in the file.

    Raises:
        ValueError: it is none.
    """
    kinds = [kind for kind in ("run", *KINDS) if isinstance(value, dict) and kind in value]
    if len(kinds) != 1 or not isinstance(value[kinds[0]], int | dict):
        raise ValueError("it is no run, edit, return or forgetting")
    try:
        if kinds == ["run"]:
            settings = dict(value["run"])
            return RunLine(int(settings.pop("after")), settings)
        line: Line = KINDS[kinds[0]](**value)
        return line
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its fields are not those of a line ({error})") from None


class Journal:
    """The journal of an adapter, in the adapter's folder.

    `journal.jsonl` is only ever added to: a `RunLine`, `EditLine` or `ReturnLine` each. `snapshots/` holds the adapter as it was
    after some of the edits, each written as a whole, with a checksum.

    Args:
        folder: the adapter's folder. every: a snapshot after so many edits.

    Raises:
        ValueError: every is below 1.
    """

    def __init__(self, folder: str | Path, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"A snapshot can be taken every 1 or more edits, not every {every}.")
        self.folder, self.every = Path(folder), every

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the journal alone while inside.

        Raises:
            ValueError: another process holds it. OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process is editing {self.folder}. Wait for its end, or take another folder."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def lines(self) -> list[Line]:
        """Read every whole line, in order; one that a kill cut short at the end is passed over.

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

    def runs(self) -> list[RunLine]:
        """List the beginnings of runs, in order."""
        return [line for line in self.lines() if isinstance(line, RunLine)]

    def edits(self) -> list[EditLine]:
        """List the edits that count, in order: those that no later return has ended."""
        standing: list[EditLine] = []
        for line in self.lines():
            if isinstance(line, ReturnLine):
                standing = [edit for edit in standing if edit.edit <= line.back_to]
            elif isinstance(line, EditLine):
                standing.append(line)
        return standing

    def add(self, line: Line) -> None:
        """Write one line, through to the disk."""
        append_line(self.folder / LINES, line.to_json())

    def snapshots(self) -> list[int]:
        """List after which edits there is a snapshot; 0 is before the first edit."""
        files = (self.folder / SNAPSHOTS).glob(f"*{SUFFIX}")
        return sorted(int(file.stem) for file in files if file.stem.isdigit())

    def save_snapshot(
        self, number: int, state: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> None:
        """Write the snapshot after edit `number`: an editor's state, and what else is needed to go on from it."""
        save_with_header(self._snapshot(number), state, {AFTER: number, **header})

    def load_snapshot(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read a snapshot: an editor's state, and what else was kept with it.

        Raises:
            ValueError: there is none after this edit, or it is damaged.
        """
        file = self._snapshot(number)
        if not file.exists():
            existing = ", ".join(map(str, self.snapshots())) or "none"
            raise ValueError(
                f"{self.folder} has no snapshot after edit {number}, but after {existing}."
            )
        try:
            state, header = load_with_header(file)
        except ValueError as error:
            raise ValueError(f"{error} {REMEDY}") from None
        if header.get(AFTER) != number:
            raise ValueError(f"{file} is damaged: its content is not what was written. {REMEDY}")
        return state, header

    def roll_back(self, number: int) -> None:
        """Put the adapter's file back to what it was after edit `number`; the edits after it count no more.

        So is the form that its config remembers, where the snapshot knows of one; those of earlier versions do not.

        Raises:
            ValueError: there are not so many edits, no snapshot after this one, or another process holds the journal.
        """
        with self.writing():
            count = len(self.edits())
            if not 0 <= number <= count:
                raise ValueError(
                    f"{self.folder} holds edits 1 to {count}; it cannot go back to {number}."
                )
            state, header = self.load_snapshot(number)
            weights = {
                name: tensor for name, tensor in state.items() if not name.startswith(CURSOR)
            }
            replace_file(self.folder / "adapter_model.safetensors", save(weights, {"format": "pt"}))
            self._put_form_back(header.get(FORM, {}))
            self.add(ReturnLine(number))
            self.delete_snapshots_after(number)

    def _put_form_back(self, form: Mapping[str, Any]) -> None:
        """Write what a config remembered of the form of its facts into the adapter's config, if there is one yet."""
        file = self.folder / CONFIG_NAME
        if form and file.exists():
            config = json.loads(file.read_text("utf-8")) | dict(form)
            replace_file(file, json.dumps(config, indent=2, sort_keys=True).encode())

    def begin_anew(self) -> None:
        """Throw the record and its snapshots away."""
        with self.writing():
            (self.folder / LINES).unlink(missing_ok=True)
            self.delete_snapshots_after(-1)

    def delete_snapshots_after(self, number: int) -> None:
        """Delete snapshots of edits that count no more."""
        for later in self.snapshots():
            if later > number:
                self._snapshot(later).unlink()

    def _snapshot(self, number: int) -> Path:
        return self.folder / SNAPSHOTS / f"{number:06d}{SUFFIX}"
