"""Read records from JSONL, JSON and CSV files, each with its place, and fields from records. Complaints say what to mend."""

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
# Where a record stands, as "path:line" or "path: record N", and the record.
Placed = tuple[str, Any]


def records(
    path: Path, columns: tuple[str, ...] = (), needed: tuple[str, ...] = ()
) -> list[Placed]:
    """Read the records of a file with their places: `path:line`, or for a .json `path: record N`, from 1.

    columns, needed: of a .csv, the ones known and the ones required; without columns, no .csv is read.

    Raises:
        ValueError: the file is of another kind, damaged, or holds no record; the message begins with the place.
        FileNotFoundError: there is no such file.
    """
    readers: dict[str, Callable[[Path, str], Iterator[Placed]]] = {".jsonl": _jsonl, ".json": _json}
    if columns:
        readers[".csv"] = partial(_csv, columns, needed)
    if path.suffix.lower() not in readers:
        wanted = ".jsonl, .json or .csv" if columns else ".jsonl or .json"
        raise ValueError(
            f"{path}: wanted a file that ends in {wanted}, not {path.suffix or 'nothing'}."
        )
    placed_records = list(readers[path.suffix.lower()](path, text_of(path)))
    if not placed_records:
        raise ValueError(f"{path}:1: the file holds no record; it needs at least one.")
    return placed_records


def placed(place: str, make: Callable[[Any], T], record: Any) -> T:
    """Call `make(record)`, and put the place in front of every complaint."""
    try:
        return make(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def text_of(path: Path) -> str:
    """Read a file as UTF-8 text, with plain line breaks and no byte order mark."""
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
        raise ValueError(f"{path}:1: wanted a list of records, [{{…}}, {{…}}], not {shown(value)}.")
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
                header = placed(place, partial(_header, columns, needed), row)
            else:
                yield place, placed(place, partial(_record_of_row, header), row)
            place = f"{path}:{rows.line_num + 1}"  # a row may take several lines; it is named by its first
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
        what = (
            f"the column {missing[0]!r} is missing"
            if missing
            else f"the column {twice[0]!r} stands twice"
        )
        raise ValueError(f"{what}; the first row must name the columns, of {', '.join(columns)}")
    return names


def _record_of_row(header: list[str], row: list[str]) -> dict[str, Any]:
    """Turn a CSV row into the shape of a JSON record; empty cells are absent."""
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


class _Repeated(dict):
    """An object of a JSON file that names a field twice."""

    field: str = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object; one that names a field twice is marked, and refused where its place is known."""
    names = [name for name, _ in pairs]
    if len(set(names)) == len(names):
        return dict(pairs)
    repeated = _Repeated(pairs)
    repeated.field = next(name for name in names if names.count(name) > 1)
    return repeated


def _parsed(path: Path, content: str, line: int = 1) -> Any:
    """Parse the JSON value of `content`, which begins at `line` of the file."""
    try:
        return json.loads(content, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        is_jsonl = error.msg == "Extra data" and path.suffix.lower() == ".json"
        hint = " (one record a line belongs into a .jsonl)" if is_jsonl else ""
        raise ValueError(
            f"{place}: this is not JSON: {error.msg} at column {error.colno}{hint}."
        ) from None
    except (ValueError, RecursionError) as error:
        # A number has too many digits, or the nesting is too deep.
        raise ValueError(f"{path}:{line}: this JSON cannot be read: {error}.") from None


def listed(value: Any) -> list[Any]:
    """List the items of a field that may hold one, a list of them, or null for none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def text(record: dict[str, Any], name: str) -> str:
    """Read the field `name`, a text that is not empty, without white space around it."""
    value = field(record, name)
    if not isinstance(value, str):
        hint = "; put it in double quotes" if isinstance(value, int | float) else ""
        raise ValueError(f"the field {name!r} must be a text, not {shown(value)}{hint}")
    if not value.strip():
        raise ValueError(f"the field {name!r} is empty")
    return value.strip()


def texts(record: dict[str, Any], name: str) -> list[str]:
    """Read the texts of a field that may hold one or a list of them, or be absent."""
    return [text({name: item}, name) for item in listed(record.get(name))]


def field(record: dict[str, Any], name: str) -> Any:
    """Read the field `name`, whatever it holds."""
    if name not in record:
        raise ValueError(f"the field {name!r} is missing")
    return record[name]


def require_object(value: Any, what: str) -> None:
    """Refuse a value that is no JSON object, or one that names a field twice."""
    if not isinstance(value, dict):
        raise ValueError(f'{what} must be an object, {{"prompt": …}}, not {shown(value)}')
    if isinstance(value, _Repeated):
        raise ValueError(f"the field {value.field!r} stands twice in one object")


def require_known(names: Iterable[str], known: tuple[str, ...], what: str = "field") -> None:
    """Refuse names that are not known, with the one perhaps meant."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f" (meant is perhaps {near[0]!r})" if near else ""
            raise ValueError(f"unknown {what} {name!r:.60}{hint}; known are {', '.join(known)}")


def shown(value: Any) -> str:
    """Write a value for a message: as JSON writes it, cut short."""
    try:
        written = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
    except RecursionError:
        return "something nested too deeply to show"
    return written if len(written) <= 60 else written[:59] + "…"
