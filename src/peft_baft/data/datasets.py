"""Files of facts to values: JSONL, JSON and CSV, and the ZsRE format. Every complaint names its place in the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from peft_baft.data.cases import Case, Edit, Probe, Unrelated

T = TypeVar("T")
Placed = tuple[str, Any]  # where a record stands, and the record

FACT_FIELDS = ("prompt", "target", "rephrase", "unrelated", "portability")
ZSRE_FIELDS = ("src", "alt")
CSV_FIELDS = ("prompt", "target", "rephrase", "unrelated_prompt", "unrelated_answer")


def read_cases(path: str | Path) -> list[Case]:
    """The facts of a file, in its order.

    A record has `prompt` and `target`; `rephrase` (a text or a list of them), `unrelated` and `portability` (an object with
    prompt and answer, or a list of them) may be absent. A .csv has the columns prompt, target, rephrase,
    unrelated_prompt and unrelated_answer. Records with `src` and `alt` are read as ZsRE.

    Raises:
        ValueError: a record is unusable or stands twice; the message begins with its file and line, or record number.
        FileNotFoundError: there is no such file.
    """
    cases: list[Case] = []
    places: dict[Edit, str] = {}
    for place, record in _records(Path(path)):
        case = _placed(place, _case, record)
        earlier = places.setdefault(case.edit, place)
        if earlier != place:
            raise ValueError(f"{place}: the same prompt and target stand at {earlier} already; remove one of them.")
        cases.append(case)
    return cases


def read_unrelated(path: str | Path) -> list[Unrelated]:
    """Text that edits should leave alone: records with `prompt` and `answer` (or `ground_truth`).

    Raises:
        ValueError, FileNotFoundError: as `read_cases`.
    """
    return [_placed(place, _unrelated, record) for place, record in _records(Path(path))]


def _records(path: Path) -> Iterator[Placed]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: wanted a file that ends in {', '.join(readers)}, not {path.suffix or 'nothing'}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    found = list(readers[path.suffix.lower()](path, text))
    if not found:
        raise ValueError(f"{path}: the file holds no record.")
    yield from found


def _jsonl(path: Path, text: str) -> Iterator[Placed]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(f"{path}:{number}", line)


def _json(path: Path, text: str) -> Iterator[Placed]:
    records = _parsed(str(path), text)
    if not isinstance(records, list):
        raise ValueError(f"{path}: wanted a list of records, not {type(records).__name__}.")
    for number, record in enumerate(records):
        yield f"{path}: record {number}", record


def _csv(path: Path, text: str) -> Iterator[Placed]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place}: the row has not as many cells as the header ({len(rows.fieldnames or ())}).")
            yield place, _placed(place, _record_of_row, row)
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: this is not CSV: {error}.") from None


def _record_of_row(row: dict[str, str]) -> dict[str, Any]:
    """A CSV row in the shape of a JSON record; empty cells are absent."""
    _require_known(row, (*CSV_FIELDS, "answer", "ground_truth"))
    record: dict[str, Any] = {key: value for key, value in row.items() if value.strip()}
    nearby = {key: record.pop(f"unrelated_{key}", None) for key in ("prompt", "answer")}
    if any(nearby.values()):
        record["unrelated"] = nearby
    return record


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: this is not JSON: {error}.") from None


def _placed(place: str, make: Callable[[Any], T], record: Any) -> T:
    """`make(record)`, with the place in front of every complaint."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: wanted an object such as {{\"prompt\": …}}, not {record!r:.60}.")
    try:
        return make(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _case(record: dict[str, Any]) -> Case:
    if all(name in record for name in ZSRE_FIELDS):
        return _zsre_case(record)
    _require_known(record, FACT_FIELDS)
    edit = Edit(*(_text(record, name) for name in ("prompt", "target")))
    probes = [Probe("generality", text, edit.target) for text in _list(record.get("rephrase"))]
    probes += [_probe("locality", item) for item in _list(record.get("unrelated"))]
    probes += [_probe("portability", item) for item in _list(record.get("portability"))]
    return Case(edit, tuple(probes))


def _zsre_case(record: dict[str, Any]) -> Case:
    """A ZsRE record of the continual editing protocol; white space around answers is dropped."""
    edit = Edit(_text(record, "src"), _text(record, "alt"))
    probes = []
    if "rephrase" in record:
        probes.append(Probe("generality", _text(record, "rephrase"), edit.target))
    if "loc" in record:
        probes.append(Probe("locality", _text(record, "loc"), _text(record, "loc_ans")))
    if "portability" in record:
        asked = record["portability"]
        probes.append(Probe("portability", _text(asked, "New Question"), _text(asked, "New Answer")))
    return Case(edit, tuple(probes))


def _unrelated(record: dict[str, Any]) -> Unrelated:
    _require_known(record, ("prompt", "answer", "ground_truth"))
    return Unrelated(_text(record, "prompt"), _text(record, "answer" if "answer" in record else "ground_truth"))


def _probe(kind: str, item: Any) -> Probe:
    if not isinstance(item, dict):
        raise TypeError(f"a question of kind {kind} must be an object with prompt and answer, not {item!r:.60}")
    _require_known(item, ("prompt", "answer"))
    return Probe(kind, _text(item, "prompt"), _text(item, "answer"))


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _text(record: Any, name: str) -> str:
    """The field `name`, a text that is not empty, without white space around it."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"the field {name!r} is missing")
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {name!r} must be a text that is not empty, not {value!r:.60}")
    return value.strip()


def _require_known(record: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(map(str, set(record) - set(known)))
    if unknown:
        raise ValueError(f"unknown field {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
