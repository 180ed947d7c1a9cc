"""Files that a kill at any instant leaves whole, and whose damage is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from peft_baft.storage import (
    append_line,
    load_with_header,
    read_lines,
    replace_file,
    save_with_header,
)


def values(file: Path) -> list[object]:
    return [value for _, value in read_lines(file)]


def test_a_file_that_a_kill_cut_at_any_byte_goes_on_with_its_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    for n in range(3):
        append_line(file, {"n": n, "text": "é\n"})
    written = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(written) if byte == 10]
    for cut in range(len(written) + 1):
        file.write_bytes(written[:cut])
        # A line whose line break alone is missing is whole.
        whole = sum(end - 1 <= cut for end in ends)
        assert [value["n"] for value in values(file)] == list(range(whole))  # type: ignore[index]
        append_line(file, {"n": "next"})
        assert [value["n"] for value in values(file)] == [*range(whole), "next"]  # type: ignore[index]
        assert file.read_bytes().count(b"\n") == whole + 1


def test_lines_are_numbered_from_one_and_empty_ones_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 1}\n\n[2]\n')
    assert read_lines(file) == [(1, {"a": 1}), (3, [2])]
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "damage", ['{"a": ', "\ud83d".encode("utf-8", "surrogatepass"), "[" * 99_999]
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: str | bytes) -> None:
    file = tmp_path / "lines.jsonl"
    line = damage if isinstance(damage, bytes) else damage.encode()
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"lines.jsonl, line 2 is damaged: "):
        read_lines(file)


def test_tensors_and_header_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "new" / "state.safetensors"
    tensors = {"a": torch.randn(3, 2).T, "n": torch.tensor(7), "half": torch.ones(2).half()}
    save_with_header(file, tensors, {"after": 3, "text": "é"})
    found, header = load_with_header(file)
    assert header == {"after": 3, "text": "é"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert list(file.parent.iterdir()) == [file]


def test_every_flipped_byte_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    save_with_header(file, {"a": torch.arange(4)}, {})
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - begin == 32
    for place in range(begin, len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="its checksum does not match"):
            load_with_header(file)
    file.write_bytes(data)
    load_with_header(file)


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", json.dumps({}).encode(), b"\x02" + bytes(7) + b"[]"]
)
def test_a_file_of_another_kind_is_damaged(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"state.safetensors is damaged \("):
        load_with_header(file)


def test_a_file_of_an_earlier_version_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(save({"a": torch.ones(1)}, {"progress": "{}"}))
    with pytest.raises(ValueError, match="no 'header'; files of earlier versions lack it"):
        load_with_header(file)


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_a_file_is_replaced_as_a_whole_with_the_mode_of_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, umask = tmp_path / "file", os.umask(0o027)
    try:
        replace_file(file, b"old")
        assert file.stat().st_mode & 0o777 == 0o640

        def no_space(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "fsync", no_space)
            replace_file(file, b"new")
        assert file.read_bytes() == b"old"
        replace_file(file, b"new")
        assert file.read_bytes() == b"new"
    finally:
        os.umask(umask)
