"""Read records with their places from JSONL, JSON and CSV files, and fields from records. Error messages say what to fix."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
# The place of a record ("path:line" or "path: record N"), and the record.
Placed = tuple[str, Any]


def records(
    path: Path, columns: tuple[str, ...] = (), needed: tuple[str, ...] = ()
) -> list[Placed]:
    """Read the records of a file with their places: `path:line`, or `path: record N` for .json, counted from 1.

    Args:
        columns, needed: the known and the required columns of a .csv file. Without columns, .csv files are not accepted.

    Raises:
        ValueError: the file has another type, is damaged, or has no records. The message begins with the place.
        FileNotFoundError: there is no such file.
    """
    readers: dict[str, Callable[[Path, str], Iterator[Placed]]] = {".jsonl": _jsonl, ".json": _json}
    if columns:
        readers[".csv"] = partial(_csv, columns, needed)
    if path.suffix.lower() not in readers:
        wanted = ".jsonl, .json or .csv" if columns else ".jsonl or .json"
        raise ValueError(
            f"{path}: expected a file that ends in {wanted}, not {path.suffix or 'nothing'}."
        )
    found = list(readers[path.suffix.lower()](path, read_text(path)))
    if not found:
        raise ValueError(f"{path}:1: the file has no records; it needs at least one.")
    return found


def with_place(place: str, make: Callable[[Any], T], record: Any) -> T:
    """Return `make(record)`; if it raises a ValueError or TypeError, prefix the message with the place."""
    try:
        return make(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def read_text(path: Path) -> str:
    """Read a file as UTF-8 text, with \\n as line breaks and without a byte order mark."""
    data = path.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: byte {error.start} is not UTF-8 text; save the file as UTF-8."
        ) from None
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl(path: Path, content: str) -> Iterator[Placed]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(path, line, number)


def _json(path: Path, content: str) -> Iterator[Placed]:
    value = _parsed(path, content) if content.strip() else []
    if not isinstance(value, list):
        raise ValueError(
            f"{path}:1: expected a list of records, [{{…}}, {{…}}], not {abbreviated(value)}."
        )
    for number, record in enumerate(value, start=1):
        yield f"{path}: record {number}", record


def _csv(
    columns: tuple[str, ...], needed: tuple[str, ...], path: Path, content: str
) -> Iterator[Placed]:
    rows = csv.reader(io.StringIO(content), strict=True)
    header: list[str] | None = None
    place = f"{path}:1"
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                pass
            elif header is None:
                header = with_place(place, partial(_header, columns, needed), row)
            else:
                yield place, with_place(place, partial(_record_of_row, header), row)
            place = f"{path}:{rows.line_num + 1}"  # a row may have several lines; its place is the first
    except csv.Error as error:
        raise ValueError(
            f"{place}: this is not CSV: {error}; put texts with quotes in double quotes."
        ) from None


def _header(columns: tuple[str, ...], needed: tuple[str, ...], row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    require_known(names, columns, "column")
    missing = [name for name in needed if name not in names]
    twice = [name for name in names if names.count(name) > 1]
    if missing or twice:
        problem = f"{missing[0]!r} is missing" if missing else f"{twice[0]!r} occurs twice"
        raise ValueError(
            f"the column {problem}; the first row must have column names, from {', '.join(columns)}"
        )
    return names


def _record_of_row(header: list[str], row: list[str]) -> dict[str, Any]:
    """Convert a CSV row to the form of a JSON record, without empty cells."""
    if len(row) != len(header):
        raise ValueError(
            f"{len(row)} cells, but {len(header)} columns; put texts with commas in double quotes"
        )
    record: dict[str, Any] = {
        name: cell for name, cell in zip(header, row, strict=True) if cell.strip()
    }
    unrelated = {}
    for part in ("prompt", "answer"):
        cell = record.pop(f"unrelated_{part}", None)
        if cell is not None:
            unrelated[part] = cell
    if unrelated:
        record["unrelated"] = unrelated
    return record


class _Repeated(dict[str, Any]):
    """A JSON object that has a field twice."""

    field: str = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Convert a JSON object to a dict. One with a repeated field is marked, to be rejected later where its place is known."""
    names = [name for name, _ in pairs]
    if len(set(names)) == len(names):
        return dict(pairs)
    repeated = _Repeated(pairs)
    repeated.field = next(name for name in names if names.count(name) > 1)
    return repeated


def _parsed(path: Path, content: str, line: int = 1) -> Any:
    """Parse `content` as JSON; it begins at `line` of the file."""
    try:
        return json.loads(content, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        is_jsonl = error.msg == "Extra data" and path.suffix.lower() == ".json"
        hint = " (a file with one record per line must end in .jsonl)" if is_jsonl else ""
        raise ValueError(
            f"{place}: this is not JSON: {error.msg} at column {error.colno}{hint}."
        ) from None
    except (ValueError, RecursionError) as error:
        # A number has too many digits, or the nesting is too deep.
        raise ValueError(f"{path}:{line}: this JSON cannot be read: {error}.") from None


def as_list(value: Any) -> list[Any]:
    """Return the items of a field that may be one item, a list of items, or null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def text(record: dict[str, Any], name: str) -> str:
    """Return the field `name`, a text that must not be empty, without white space around it."""
    value = field(record, name)
    if not isinstance(value, str):
        hint = "; put it in double quotes" if isinstance(value, int | float) else ""
        raise ValueError(f"the field {name!r} must be a text, not {abbreviated(value)}{hint}")
    if not value.strip():
        raise ValueError(f"the field {name!r} is empty")
    return value.strip()


def texts(record: dict[str, Any], name: str) -> list[str]:
    """Return the texts of an optional field that may be one text or a list of texts."""
    return [text({name: item}, name) for item in as_list(record.get(name))]


def field(record: dict[str, Any], name: str) -> Any:
    """Return the field `name`, of any type."""
    if name not in record:
        raise ValueError(f"the field {name!r} is missing")
    return record[name]


def require_object(value: Any, what: str) -> None:
    """Raise a ValueError unless a value is a JSON object without repeated fields."""
    if not isinstance(value, dict):
        raise ValueError(f'{what} must be an object, {{"prompt": …}}, not {abbreviated(value)}')
    if isinstance(value, _Repeated):
        raise ValueError(f"the field {value.field!r} occurs twice in one object")


def require_known(names: Iterable[str], known: tuple[str, ...], what: str = "field") -> None:
    """Raise a ValueError for an unknown name, and suggest a similar one."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown {what} {name!r:.60}{hint}; known are {', '.join(known)}")


def abbreviated(value: Any) -> str:
    """Return a value as JSON for a message, truncated to 60 characters."""
    try:
        written = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
    except RecursionError:
        return "something nested too deeply to show"
    return written if len(written) <= 60 else written[:59] + "…"
