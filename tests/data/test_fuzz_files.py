"""Whatever stands in an edit file, it is read as facts or complained about with its name and place."""

# mypy: disable-error-code="arg-type, attr-defined, return-value"
from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_baft.data import Case, Edit, read_cases, read_unrelated

QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    max_examples=300,
)
LONG = settings(QUICK, max_examples=20_000)
PLACE = re.compile(r"(:\d+|: record \d+): ")


ENDS: Counter[str] = Counter()  # of all readings


@pytest.fixture(autouse=True)
def told(tally: Callable[..., None]) -> Iterator[None]:
    before = Counter(ENDS)
    yield
    ends = ENDS - before
    tally("a fuzzed or hostile edit file", refused=ends["refused"], harmless=ends["read"])


def outcome(path: Path, data: bytes) -> str:
    """How the reading of a file of these bytes ends: `read`, or `refused` with its place."""
    path.write_bytes(data)
    ends = []
    for read in (read_cases, read_unrelated):
        try:
            found: list[Any] = read(path)
        except ValueError as error:
            assert type(error) is ValueError
            assert str(error).startswith(str(path)) and PLACE.match(str(error)[len(str(path)) :])
            assert len(str(error)) < len(str(path)) + 600 and str(error).isprintable()
            ends.append("refused")
        else:
            assert found
            ends.append("read")
    if ends[0] == "read":
        texts = [
            text for case in read_cases(path) for text in (str(case.edit.prompt), case.edit.target)
        ]
        assert all(text == text.strip() != "" and text.encode() for text in texts)
    ENDS["read" if "read" in ends else "refused"] += 1
    return "read" if "read" in ends else "refused"


def both_ends_met(
    budget: settings, files: st.SearchStrategy[tuple[str, bytes]], folder: Path
) -> None:
    """Every file of the strategy is read or refused, and some end either way."""
    ends: Counter[str] = Counter()

    @budget
    @given(files)
    def check(file: tuple[str, bytes]) -> None:
        ends[outcome(folder / file[0], file[1])] += 1

    check()
    assert min(ends["read"], ends["refused"]) > 30, ends


# fuzz: files that are nearly right

CHARACTERS = st.characters() | st.sampled_from(
    "\0\t\n\r\x0b\x0c\x1b\x85\u2028\u202e\u200f\ufeff\ufffe🙂🏳️‍🌈אب\"',\\{}[]:;"
)
TEXT = st.text(CHARACTERS, max_size=12)
VALUE = st.recursive(
    TEXT | st.none() | st.booleans() | st.floats() | st.sampled_from([10**400, -0.0, 1e308, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NEAR = st.fixed_dictionaries({"prompt": TEXT | VALUE, "answer": TEXT | VALUE})
FIELDS = {
    "rephrase": VALUE,
    "unrelated": NEAR | VALUE,
    "portability": st.lists(NEAR, max_size=2),
    "x": VALUE,
}
WORD = TEXT.map("a{}".format)
FACT = st.fixed_dictionaries({"prompt": WORD, "target": WORD})
RECORD = (
    FACT
    | st.fixed_dictionaries({"prompt": TEXT, "target": TEXT | VALUE}, optional=FIELDS)
    | NEAR
    | VALUE
)
CODECS = ["utf-8"] * 16 + [
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "latin-1",
    "cp1252",
    "utf-7",
    "shift_jis",
]


def as_lines(records: list[Any]) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def as_table(records: list[Any]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "target"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(record for record in records if isinstance(record, dict))
    return table.getvalue()


def as_list(records: list[Any]) -> str:
    return json.dumps(records)


WRITE = {"f.jsonl": as_lines, "f.json": as_list, "f.csv": as_table}


@st.composite
def nearly_right_files(draw: Any) -> tuple[str, bytes]:
    """A file's name and content: right but for its records, encoding, or a few bytes."""
    records = draw(st.lists(FACT, min_size=1, max_size=3) | st.lists(RECORD, max_size=3))
    name = draw(st.sampled_from([*WRITE]))
    text = WRITE[name](records)
    data = text.encode(
        draw(st.sampled_from(CODECS)),
        draw(st.sampled_from(["replace", "ignore", "backslashreplace"])),
    )
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(data)))
        noise = draw(st.binary(max_size=3) | TEXT.map(lambda text: text.encode("utf-8", "replace")))
        data = data[:at] + noise + data[at + 1 :]
    return name, data


def test_a_nearly_right_file_is_read_or_refused_with_its_place(tmp_path: Path) -> None:
    both_ends_met(QUICK, nearly_right_files(), tmp_path)


@pytest.mark.slow
def test_a_nearly_right_file_is_read_or_refused_with_its_place_at_length(tmp_path: Path) -> None:
    both_ends_met(LONG, nearly_right_files(), tmp_path)


def test_any_bytes_are_refused_with_their_place_or_read(tmp_path: Path) -> None:
    QUICK(
        given(st.binary(max_size=200), st.sampled_from([*WRITE]))(
            lambda d, n: outcome(tmp_path / n, d) and None
        )
    )()


# hostile on purpose

GOOD = '{"prompt": "a", "target": "b"}'
DEEP = "[" * 10_000 + "]" * 10_000
# The csv module's limit.
HOSTILE = {
    "deep": ("f.json", DEEP, ":1: "),
    "deep and open": ("f.jsonl", f"{GOOD}\n" + '{"prompt":' * 10_000, ":2: "),
    "deep in a field": ("f.jsonl", f'{GOOD}\n{{"prompt": "a", "target": {DEEP}}}', ":2: "),
    "deep in a known field": (
        "f.json",
        f'[{{"prompt": "a", "target": "b", "rephrase": {DEEP}}}]',
        ":1: ",
    ),
    "nested below the limit": (
        "f.json",
        f'[{{"prompt": "a", "target": {"[" * 400 + "]" * 400}}}]',
        ": record 1: ",
    ),
    "many digits": ("f.jsonl", f'{GOOD}\n{{"prompt": "a", "target": {"9" * 5000}}}', ":2: "),
    "many digits, in a float": ("f.jsonl", f'{{"prompt": "a", "target": 1e{"9" * 5000}}}', ":1: "),
    "NaN": ("f.jsonl", '{"prompt": "a", "target": NaN}', ":1: "),
    "a field twice": (
        "f.jsonl",
        f'{GOOD}\n{{"prompt": "a", "prompt": "a", "target": "c"}}',
        ":2: ",
    ),
    "a field twice, inside": (
        "f.jsonl",
        '{"prompt": "a", "target": "b", "unrelated": {"prompt": "c", "answer": "d", "answer": "e"}}',
        ":1: ",
    ),
    "a lone surrogate": ("f.jsonl", '{"prompt": "\\udc00", "target": "b"}', ":1: "),
    "a lone surrogate as a name": ("f.jsonl", '{"\\ud800": "a", "target": "b"}', ":1: "),
    "a surrogate in UTF-8": ("f.jsonl", b'{"prompt": "\xed\xa0\x80", "target": "b"}', ":1: "),
    "overlong UTF-8": ("f.jsonl", b'{"prompt": "\xc0\xae", "target": "b"}', ":1: "),
    "NUL bytes": ("f.jsonl", b"\0" * 1000, ":1: "),
    "a raw NUL in a text": ("f.jsonl", '{"prompt": "a\0", "target": "b"}', ":1: "),
    "a megabyte as a name": ("f.jsonl", f'{{"{"x" * 2**20}": 1}}', ":1: "),
    "a megabyte as a column": ("f.csv", f"prompt,{'x' * 2**20}\na,b", ":1: "),
    "a megabyte of columns": ("f.csv", "," * 2**20 + "\na,b", ":2: "),
    "a megabyte of quotes": ("f.csv", 'prompt,target\n"' + '""' * 2**19, ":2: "),
    "a megabyte in a cell": (
        "f.csv",
        f"prompt,target\na,{'b' * 2**20}",
        ":2: ",
    ),
    "an open quote": ("f.csv", 'prompt,target\na,b\n"c,d\n' + "e,f\n" * 100, ":3: "),
    "prototype names": (
        "f.jsonl",
        '{"__class__": "a", "__init__": "b", "prompt": "c", "target": "d"}',
        ":1: ",
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_file_is_refused_with_its_place(tmp_path: Path, how: str) -> None:
    name, content, place = HOSTILE[how]
    path = tmp_path / name
    assert outcome(path, content if isinstance(content, bytes) else content.encode()) == "refused"
    with pytest.raises(ValueError, match=f"^{re.escape(str(path) + place)}"):
        read_cases(path)


LONG_TEXT = "a long, long \"prompt\" of 'ever' so many\nwords " * 25_000  # more than a megabyte
UNUSUAL = {
    "a megabyte": LONG_TEXT.strip(),
    "emoji": "👩‍👩‍👧‍👦 lives in 🏴󠁧󠁢󠁷󠁬󠁳󠁿",
    "right to left": "בירת צרפת היא \u202eabc\u202c وعاصمة",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "control characters": "a\x00\x01\x07\x1b[31m\x7f\x85b",
    "line breaks": "a\u2028b\u2029c\x0bd\x0ce\nf",
    "a byte order mark inside": "a\ufeffb",
    "looks like CSV": 'a,"b"\n"",c;\t=1+1',
    "looks like JSON": '{"prompt": "a\\u0000"}',
    "a nonbreaking space": "a\u00a0b",
    "outside the basic plane": "\U0010ffff\U00010000",
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how) for name in WRITE for how in UNUSUAL if (name, how) != ("f.csv", "a megabyte")
    ],  # refused: see above
)
def test_unusual_text_is_read_to_the_letter(tmp_path: Path, name: str, how: str) -> None:
    record = {"prompt": UNUSUAL[how], "target": "x " + UNUSUAL[how]}
    write = WRITE[name]
    (tmp_path / name).write_text(write([record]), "utf-8", newline="")
    assert read_cases(tmp_path / name) == [Case(Edit(**record))]


# there and back

VALID = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
PAIRS = st.lists(st.tuples(VALID, VALID), min_size=1, max_size=4)


@pytest.mark.parametrize("name", WRITE)
def test_what_is_written_is_read_but_for_white_space_around_it(tmp_path: Path, name: str) -> None:
    write = WRITE[name]

    @QUICK
    @given(PAIRS)
    def check(pairs: list[tuple[str, str]]) -> None:
        wanted = dict.fromkeys((prompt.strip(), target.strip()) for prompt, target in pairs)
        records = [
            {"prompt": f" {prompt}\n", "target": f"\t{target} "} for prompt, target in wanted
        ]
        (tmp_path / name).write_text(write(records), "utf-8", newline="")
        edits = [(case.edit.prompt, case.edit.target) for case in read_cases(tmp_path / name)]
        assert edits == [
            (plain_breaks(prompt, name), plain_breaks(target, name)) for prompt, target in wanted
        ]

    check()


def plain_breaks(text: str, name: str) -> str:
    """The text as a table gives it back: every line break as \\n. JSON escapes its line breaks, and keeps them."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if name.endswith(".csv") else text
