"""A record of a continual run that a power cut cannot spoil: a line for each edit, and snapshots of the adapter."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

LINES, SNAPSHOTS, LOCK = "journal.jsonl", "snapshots", "journal.lock"
SUFFIX = ".safetensors"
Line = dict[str, Any]


class Journal:
    """The journal of an adapter, in the adapter's folder.

    `journal.jsonl` is only ever added to. Each line is a run's beginning (`run`), an edit (`edit`, numbered from 1 over all
    runs) or a return to an earlier state (`back_to`), which ends the validity of later edits. `snapshots/` holds the adapter
    as it was after some of the edits, each written as a whole, with a checksum.

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
        """Every whole line, in order; one that a kill cut short at the end is passed over.

        Raises:
            ValueError: a line in the middle is damaged.
        """
        file = self.folder / LINES
        raw = file.read_bytes().split(b"\n") if file.exists() else []
        found: list[Line] = []
        for number, line in enumerate(raw, 1):
            try:
                if line.strip():
                    found.append(_record(line))
            except ValueError as error:
                following = next(filter(None, raw[number:]), b'{"run"')
                if not following.startswith((b'{"run"', b'{"back_to"')):  # else a kill cut the line short
                    raise ValueError(f"{file}, line {number} is damaged: {error}.") from None
        return found

    def edits(self) -> list[Line]:
        """The edits that count, in order: those that no later return has ended."""
        standing: list[Line] = []
        for line in self.lines():
            if "back_to" in line:
                standing = [edit for edit in standing if edit["edit"] <= line["back_to"]]
            elif "edit" in line:
                standing.append(line)
        return standing

    def add(self, line: Line) -> None:
        """Write one line, through to the disk."""
        with open(self.folder / LINES, "a+b") as out:
            new = out.seek(0, os.SEEK_END) == 0
            out.seek(0 if new else -1, os.SEEK_END)
            cut_short = out.read(1) not in (b"", b"\n")
            out.write(b"\n" * cut_short + json.dumps(line, ensure_ascii=False).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        if new:
            _sync_names(self.folder)

    def snapshots(self) -> list[int]:
        """After which edits the adapter was kept; 0 is before the first."""
        return sorted(int(file.stem) for file in (self.folder / SNAPSHOTS).glob(f"*{SUFFIX}") if file.stem.isdigit())

    def keep(self, number: int, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
        """Write the snapshot after edit `number`, with what else is needed to go on from it."""
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        checksum = _checksum(save(plain))
        file = self._snapshot(number)
        file.parent.mkdir(exist_ok=True)
        replace_file(file, save(plain, {"state": json.dumps({"after": number, "sha256": checksum, **more})}))

    def kept(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A snapshot's tensors, and what else was kept with them.

        Raises:
            ValueError: there is none after this edit, or it is damaged.
        """
        file = self._snapshot(number)
        if not file.exists():
            raise ValueError(f"{self.folder} has no snapshot after edit {number}, but after {_told(self.snapshots())}.")
        data = file.read_bytes()
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            state = json.loads(header["__metadata__"]["state"])
            tensors = load(data)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}). {REMEDY}") from None
        if state.get("sha256") != _checksum(data) or state.get("after") != number:
            raise ValueError(f"{file} is damaged: its content is not what was written. {REMEDY}")
        return tensors, state

    def roll_back(self, number: int) -> dict[str, Any]:
        """Put the adapter's file back to what it was after edit `number`; the edits after it count no more.

        Returns:
            What was kept with the snapshot.
        """
        with self.writing():
            made = len(self.edits())
            if not 0 <= number <= made:
                raise ValueError(f"{self.folder} holds edits 1 to {made}; it cannot go back to {number}.")
            tensors, state = self.kept(number)
            replace_file(self.folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
            self.add({"back_to": number})
            self.forget_after(number)
        return state

    def begin_anew(self) -> None:
        """Throw the record and its snapshots away."""
        with self.writing():
            (self.folder / LINES).unlink(missing_ok=True)
            self.forget_after(-1)

    def forget_after(self, number: int) -> None:
        """Delete snapshots of edits that count no more."""
        for later in self.snapshots():
            if later > number:
                self._snapshot(later).unlink()

    def _snapshot(self, number: int) -> Path:
        return self.folder / SNAPSHOTS / f"{number:06d}{SUFFIX}"


REMEDY = "Delete it to go on from the snapshot before it; the edits since then are made again."


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names that `save_pretrained` gives them."""
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def restore_state(model: PeftModel, name: str, tensors: dict[str, Tensor]) -> None:
    """Bring the adapter to a state that `adapter_state` gave."""
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def replace_file(file: Path, data: bytes) -> None:
    """Write a file as a whole: whoever looks, at whatever instant, finds the old or the new one."""
    new = file.with_name(file.name + ".new")
    with open(new, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)
    _sync_names(file.parent)


def give_umask_mode(file: Path) -> None:
    """Give a file the mode that any new file in its folder gets.

    Libraries that write through a temporary file, as safetensors does, leave it readable by its owner alone. The mode is
    read off a new file, since the umask itself can only be read by changing it, for all threads.
    """
    probe = file.with_name(file.name + ".mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    file.chmod(mode)


def _sync_names(folder: Path) -> None:
    """Bring which files are in a folder, and under which names, to the disk; Windows has no call for it."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _record(line: bytes) -> Line:
    try:
        found = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    kinds = [kind for kind in ("run", "edit", "back_to") if isinstance(found, dict) and kind in found]
    if len(kinds) != 1 or not isinstance(found[kinds[0]], int | dict):
        raise ValueError("it is no run, edit or return")
    return found


def _checksum(data: bytes) -> str:
    """Of a safetensors file's tensors, its header left out."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def _told(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if numbers else "none"
