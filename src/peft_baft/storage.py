"""Files that a kill at any instant leaves whole: replaced as a whole, or lines that are only ever added.

Files get the mode that the user's umask gives to new files. Torch, safetensors and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

HEADER = "header"  # where a safetensors file of ours keeps its JSON header, among its metadata


def replace_file(file: Path, data: bytes) -> None:
    """Write a file as a whole: whoever looks, at whatever instant, finds the old or the new one."""
    new = file.with_name(file.name + ".new")
    with open(new, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)
    _sync_names(file.parent)


def append_line(file: Path, value: Any) -> None:
    """Add a value to a file as one line of JSON, through to the disk.

    A last line that a kill cut short, which nobody was told is there, is cut off first.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as out:
        is_new = out.seek(0, os.SEEK_END) == 0
        begin = b"" if is_new else _repair_end(out)
        out.write(begin + json.dumps(value, ensure_ascii=False).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
    if is_new:
        _sync_names(file.parent)


def _repair_end(file: Any) -> bytes:
    """Cut a torn last line off a file that is open for adding; give what has to stand before the next line."""
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
    """Read the values of a file of JSON lines, each with the number of its line, from 1.

    Empty lines, and a last line that a kill cut short, are passed over. A file that is not there has no lines.

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
    """Tell whether what follows the last line break of a file is a part of a line. A whole one may lack its line break alone."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def save_with_header(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors, with a header that JSON can hold and a checksum, as one safetensors file.

    The folder is made if it is not there.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"sha256": _checksum(save(plain)), **header}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save(plain, {HEADER: json.dumps(content)}))


def load_with_header(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_with_header` wrote.

    Raises:
        ValueError: the file is damaged. FileNotFoundError: there is none.
    """
    data = file.read_bytes()  # in one go: the file may be replaced at any instant
    try:
        file_header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = file_header["__metadata__"]
        if HEADER not in metadata:
            raise ValueError(f"it has no {HEADER!r}, as files of earlier versions have none")
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
        raise ValueError(f"{file} is damaged: its content is not what was written.")
    return tensors, header


def _checksum(data: bytes) -> str:
    """Hash the tensors of a safetensors file, its header left out."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


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
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
