"""Write files that stay intact if the process is killed at any moment: they are replaced atomically, or appended line by line.

Files get the permissions that the user's umask gives to new files. Uses torch, safetensors and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

HEADER = "header"  # the metadata key under which our safetensors files store a JSON header


def replace_file(file: Path, data: bytes) -> None:
    """Replace a file atomically: a reader sees either the old or the new content."""
    new = file.with_name(file.name + ".new")
    with open(new, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)
    _sync_names(file.parent)


def append_line(file: Path, value: Any) -> None:
    """Append a value to a file as one line of JSON, and sync it to the disk.

    If the last line is incomplete, because an earlier call was killed while writing it, it is removed first.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as out:
        is_new = out.seek(0, os.SEEK_END) == 0
        separator = b"" if is_new else _repair_end(out)
        out.write(separator + json.dumps(value, ensure_ascii=False).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
    if is_new:
        _sync_names(file.parent)


def _repair_end(file: BinaryIO) -> bytes:
    """Remove an incomplete last line from a file that is open for appending; return what to write before the next line."""
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return b""
    file.seek(0)
    content = file.read()
    begin = content.rfind(b"\n") + 1
    if _is_torn(content[begin:]):
        file.truncate(begin)
        return b""
    return b"\n"


def read_lines(file: Path) -> list[tuple[int, Any]]:
    """Read the values of a file of JSON lines, each with its line number, counted from 1.

    Empty lines and an incomplete last line are skipped. A file that does not exist has no lines.

    Raises:
        ValueError: a line is damaged; the message names the file and the line.
    """
    if not file.exists():
        return []
    *lines, last = file.read_bytes().split(b"\n")
    if not _is_torn(last):
        lines.append(last)
    values: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except RecursionError:
                raise ValueError(
                    f"{file}, line {number} is damaged: it is nested too deeply."
                ) from None
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is damaged: {error}.") from None
    return values


def _is_torn(line: bytes) -> bool:
    """Check whether the text after the last line break is an incomplete line; a complete one may lack only the line break."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def save_with_header(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors, a JSON-serialisable header and a checksum to one safetensors file.

    The folder is created if it does not exist.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"sha256": _checksum(save(plain)), **header}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save(plain, {HEADER: json.dumps(content)}))


def load_with_header(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a file that `save_with_header` wrote.

    Raises:
        ValueError: the file is damaged. FileNotFoundError: there is no such file.
    """
    data = file.read_bytes()  # once, since the file may be replaced at any moment
    try:
        file_header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = file_header["__metadata__"]
        if HEADER not in metadata:
            raise ValueError(f"it has no {HEADER!r}; files of earlier versions lack it")
        header = json.loads(metadata[HEADER])
        tensors = load(data)
        checksum = header.pop("sha256")
    except (
        SafetensorError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(f"{file} is damaged ({error}).") from None
    if checksum != _checksum(data):
        raise ValueError(f"{file} is damaged: its checksum does not match.")
    return tensors, header


def _checksum(data: bytes) -> str:
    """Hash the tensors of a safetensors file, without its header."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def apply_umask_mode(file: Path) -> None:
    """Set the permissions of a file to those that a new file in its folder gets.

    Libraries that write through a temporary file, such as safetensors, leave it readable by its owner only. The permissions are
    copied from a new file, since the umask can only be read by changing it for all threads.
    """
    probe = file.with_name(file.name + ".mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    file.chmod(mode)


def _sync_names(folder: Path) -> None:
    """Sync a folder's list of files to the disk; Windows has no call for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
