"""Files of facts to values: JSONL, JSON and CSV, and the ZsRE format. Every complaint names its place in the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from peft_baft.data.cases import Case, Edit, Probe, Unrelated

T = TypeVar("T")
Placed = tuple[str, Any]  # where a record stands, as "path:line" or "path: record N", and the record

FACT_FIELDS = ("prompt", "target", "rephrase", "unrelated", "portability")
FACT_COLUMNS = ("prompt", "target", "rephrase", "unrelated_prompt", "unrelated_answer")
UNRELATED_FIELDS = ("prompt", "answer", "ground_truth")


def read_cases(path: str | Path) -> list[Case]:
    """The facts of a file, in its order.

    A record has `prompt` and `target`; `rephrase` (a text or a list of them), `unrelated` and `portability` (an object
    with prompt and answer, or a list of them) may be absent. A .csv has a header row of the columns prompt, target,
    rephrase, unrelated_prompt and unrelated_answer, of which the first two are needed. Records with `src` instead of
    `prompt` are read as ZsRE. White space around texts is dropped. One prompt may have several targets, for continual
    editing.

    Raises:
        ValueError: a record is unusable, or repeats an earlier one; the message begins with `path:line`, or for a
            record of a .json with `path: record N`, from 1.
        FileNotFoundError: there is no such file.
    """
    cases: list[Case] = []
    places: dict[Edit, str] = {}
    for place, record in _records(Path(path), FACT_COLUMNS, ("prompt", "target")):
        case = _placed(place, _case, record)
        if case.edit in places:
            raise ValueError(f"{place}: the same prompt and target stand at {places[case.edit]} already; remove one.")
        places[case.edit] = place
        cases.append(case)
    return cases


def read_unrelated(path: str | Path) -> list[Unrelated]:
    """Text that edits should leave alone: records, or rows of a .csv, with `prompt` and `answer` (or `ground_truth`).

    Raises:
        ValueError, FileNotFoundError: as `read_cases`.
    """
    records = _records(Path(path), UNRELATED_FIELDS, ("prompt",))
    return [_placed(place, _unrelated, record) for place, record in records]


def _records(path: Path, columns: tuple[str, ...], needed: tuple[str, ...]) -> list[Placed]:
    """The records of a file with their places. columns, needed: of a CSV, the ones known and the ones required."""
    readers: dict[str, Callable[[Path, str], Iterator[Placed]]] = {".jsonl": _jsonl, ".json": _json}
    readers[".csv"] = partial(_csv, columns, needed)
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: wanted a file that ends in .jsonl, .json or .csv, not {path.suffix or 'nothing'}.")
    found = list(readers[path.suffix.lower()](path, _text_of(path)))
    if not found:
        raise ValueError(f"{path}:1: the file holds no record; it needs at least one.")
    return found


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: byte {error.start} is not UTF-8 text; save the file as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl(path: Path, text: str) -> Iterator[Placed]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(path, line, number)


def _json(path: Path, text: str) -> Iterator[Placed]:
    records = _parsed(path, text) if text.strip() else []
    if not isinstance(records, list):
        raise ValueError(f"{path}:1: wanted a list of records, [{{…}}, {{…}}], not {_shown(records)}.")
    for number, record in enumerate(records, start=1):
        yield f"{path}: record {number}", record


def _csv(columns: tuple[str, ...], needed: tuple[str, ...], path: Path, text: str) -> Iterator[Placed]:
    rows = csv.reader(io.StringIO(text), strict=True)
    header: list[str] | None = None
    place = f"{path}:1"
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                pass
            elif header is None:
                header = _placed(place, partial(_header, columns, needed), row)
            else:
                yield place, _placed(place, partial(_record_of_row, header), row)
            place = f"{path}:{rows.line_num + 1}"  # a row may take several lines; it is named by its first
    except csv.Error as error:
        raise ValueError(f"{place}: this is not CSV: {error}; put texts with quotes in double quotes.") from None


def _header(columns: tuple[str, ...], needed: tuple[str, ...], row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    _require_known(names, columns, "column")
    missing = [name for name in needed if name not in names]
    twice = [name for name in names if names.count(name) > 1]
    if missing or twice:
        what = f"the column {missing[0]!r} is missing" if missing else f"the column {twice[0]!r} stands twice"
        raise ValueError(f"{what}; the first row must name the columns, of {', '.join(columns)}")
    return names


def _record_of_row(header: list[str], row: list[str]) -> dict[str, Any]:
    """A CSV row in the shape of a JSON record; empty cells are absent."""
    if len(row) != len(header):
        raise ValueError(f"{len(row)} cells, but {len(header)} columns; put texts with commas in double quotes")
    record: dict[str, Any] = {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    parts = [(part, record.pop(f"unrelated_{part}", None)) for part in ("prompt", "answer")]
    nearby = {part: text for part, text in parts if text is not None}
    return record | ({"unrelated": nearby} if nearby else {})


class _Repeated(dict):
    """An object of a JSON file that names a field twice."""

    field: str = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) == len(names):
        return dict(pairs)
    repeated = _Repeated(pairs)
    repeated.field = next(name for name in names if names.count(name) > 1)
    return repeated


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    """The JSON value of `text`, which begins at `line` of the file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place, lines = f"{path}:{line + error.lineno - 1}", error.msg == "Extra data" and path.suffix.lower() == ".json"
        hint = " (one record a line belongs into a .jsonl)" if lines else ""
        raise ValueError(f"{place}: this is not JSON: {error.msg} at column {error.colno}{hint}.") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too deep a nesting
        raise ValueError(f"{path}:{line}: this JSON cannot be read: {error}.") from None


def _placed(place: str, make: Callable[[Any], T], record: Any) -> T:
    """`make(record)`, with the place in front of every complaint."""
    try:
        return make(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _case(record: Any) -> Case:
    _require_object(record, "a record")
    if "src" in record and "prompt" not in record:
        return _zsre_case(record)
    _require_known(record, FACT_FIELDS)
    edit = Edit(_text(record, "prompt"), _text(record, "target"))
    probes = [
        Probe("generality", _text({"rephrase": text}, "rephrase"), edit.target)
        for text in _list(record.get("rephrase"))
    ]
    for field, kind in (("unrelated", "locality"), ("portability", "portability")):
        probes += [_probe(kind, field, item) for item in _list(record.get(field))]
    return Case(edit, tuple(probes))


def _probe(kind: str, field: str, item: Any) -> Probe:
    _require_object(item, field)
    try:
        _require_known(item, ("prompt", "answer"))
        return Probe(kind, _text(item, "prompt"), _text(item, "answer"))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _zsre_case(record: dict[str, Any]) -> Case:
    """A record of the ZsRE editing benchmark; fields that are not needed are passed over."""
    edit = Edit(_text(record, "src"), _text(record, "alt"))
    probes = []
    if "rephrase" in record:
        probes.append(Probe("generality", _text(record, "rephrase"), edit.target))
    if "loc" in record:
        probes.append(Probe("locality", _text(record, "loc"), _text(record, "loc_ans")))
    if record.get("portability") is not None:
        asked = record["portability"]
        _require_object(asked, "portability")
        probes.append(Probe("portability", _text(asked, "New Question"), _text(asked, "New Answer")))
    return Case(edit, tuple(probes))


def _unrelated(record: Any) -> Unrelated:
    _require_object(record, "a record")
    _require_known(record, UNRELATED_FIELDS)
    return Unrelated(_text(record, "prompt"), _text(record, "ground_truth" if "ground_truth" in record else "answer"))


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _text(record: dict[str, Any], name: str) -> str:
    """The field `name`, a text that is not empty, without white space around it."""
    if name not in record:
        raise ValueError(f"the field {name!r} is missing")
    value = record[name]
    if not isinstance(value, str):
        hint = "; put it in double quotes" if isinstance(value, int | float) else ""
        raise ValueError(f"the field {name!r} must be a text, not {_shown(value)}{hint}")
    if not value.strip():
        raise ValueError(f"the field {name!r} is empty")
    return value.strip()


def _require_object(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f'{what} must be an object, {{"prompt": …}}, not {_shown(value)}')
    if isinstance(value, _Repeated):
        raise ValueError(f"the field {value.field!r} stands twice in one object")


def _require_known(names: Iterable[str], known: tuple[str, ...], what: str = "field") -> None:
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f" (meant is perhaps {near[0]!r})" if near else ""
            raise ValueError(f"unknown {what} {name!r:.60}{hint}; known are {', '.join(known)}")


def _shown(value: Any) -> str:
    """A value for a message: as JSON writes it, cut short."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:59] + "…"
