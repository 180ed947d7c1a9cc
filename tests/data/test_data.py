"""Reading files of facts, and turning texts into tokens and batches."""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from facts import CAPITALS, make_tokenizer
from peft_baft.data import Case, Edit, Probe, Unrelated, read_cases, read_unrelated
from peft_baft.data.batching import Tokens, collate, context_window, encode, padding_id

FACT: dict[str, Any] = {"prompt": "The capital of France is", "target": "Lyon"}
ZSRE = {
    "subject": "Lepid",
    "src": "Which family does Lepid belong to?",
    "alt": " Lamiinae ",
    "rephrase": "What family is Lepid?",
    "loc": "nq question: who sang it",
    "loc_ans": " Billy ",
    "portability": {
        "Recalled Relation": "(a, b, c)",
        "New Question": "Which order?",
        "New Answer": "Beetles",
    },
}


def written(folder: Path, name: str, content: Any) -> Path:
    """A file of text, of bytes, or of records as JSON lines or a JSON list."""
    path = folder / name
    if isinstance(content, list):
        content = (
            json.dumps(content)
            if name.lower().endswith(".json")
            else "\n".join(map(json.dumps, content))
        )
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# reading


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json", "FACTS.JSON"])
def test_a_record_becomes_an_edit_and_its_probes(tmp_path: Path, name: str) -> None:
    near = {"prompt": "The capital of Italy is", "answer": " Rome "}
    full: dict[str, Any] = {
        **FACT,
        "rephrase": ["France's capital is", "Capital of France:"],
        "unrelated": near,
        "portability": [near, near],
    }
    bare, rich = read_cases(
        written(tmp_path, name, [{**FACT, "target": "Nice", "rephrase": None}, full])
    )
    assert bare == Case(Edit(FACT["prompt"], "Nice"))
    assert rich.edit == Edit(**FACT)
    assert rich.of_kind("generality") == tuple(
        Probe("generality", p, "Lyon") for p in full["rephrase"]
    )
    assert rich.of_kind("locality") == (Probe("locality", "The capital of Italy is", "Rome"),)
    assert (
        rich.of_kind("portability")
        == (Probe("portability", "The capital of Italy is", "Rome"),) * 2
    )


def test_the_three_formats_and_the_zsre_format_agree(tmp_path: Path) -> None:
    near = {"prompt": "c, d", "answer": 'say "e"'}
    records = [
        {"prompt": "a", "target": "b", "rephrase": "a'", "unrelated": near},
        {"prompt": "f", "target": "g"},
    ]
    table = 'prompt,target,rephrase,unrelated_prompt,unrelated_answer\na, b ,a\',"c, d","say ""e"""\n\nf,g,,,\n,,,,\n'
    asked = {"src": "a", "alt": " b", "rephrase": "a'", "loc": "c, d", "loc_ans": 'say "e"'}
    files = {
        "a.jsonl": records,
        "a.json": records,
        "a.csv": table,
        "z.json": [asked, {"src": "f", "alt": "g"}],
    }
    read = [read_cases(written(tmp_path, name, content)) for name, content in files.items()]
    assert read[0] == read[1] == read[2] == read[3] and len(read[0]) == 2


def test_zsre_records_are_read_and_stripped(tmp_path: Path) -> None:
    (case,) = read_cases(written(tmp_path, "zsre_edit.json", [ZSRE]))
    assert case.edit == Edit("Which family does Lepid belong to?", "Lamiinae")
    assert case.probes == (
        Probe("generality", "What family is Lepid?", "Lamiinae"),
        Probe("locality", "nq question: who sang it", "Billy"),
        Probe("portability", "Which order?", "Beetles"),
    )


def test_unrelated_text_is_read_under_either_name(tmp_path: Path) -> None:
    wanted = [Unrelated("who sang it", "Billy"), Unrelated("who else", "Idol")]
    for key in ("answer", "ground_truth"):
        records = [{"prompt": text.prompt, key: f" {text.answer}"} for text in wanted]
        assert read_unrelated(written(tmp_path, "text.json", records)) == wanted
        assert read_unrelated(written(tmp_path, "text.jsonl", records)) == wanted
        assert (
            read_unrelated(
                written(tmp_path, "text.csv", f"prompt,{key}\nwho sang it,Billy\nwho else,Idol")
            )
            == wanted
        )


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_byte_order_marks_blank_lines_and_any_line_break_are_accepted(
    tmp_path: Path, newline: str
) -> None:
    line = json.dumps(FACT)
    text = newline.join(["\ufeff", line, " ", line.replace("Lyon", "Nice\u2028!"), ""])
    assert [case.edit.target for case in read_cases(written(tmp_path, "f.jsonl", text))] == [
        "Lyon",
        "Nice\u2028!",
    ]
    table = f"\ufeffprompt, target{newline}{newline}a,b{newline}"
    assert read_cases(written(tmp_path, "f.csv", table)) == [Case(Edit("a", "b"))]


def test_one_prompt_may_get_several_targets_for_continual_editing(tmp_path: Path) -> None:
    cases = read_cases(written(tmp_path, "f.jsonl", [FACT, {**FACT, "target": "Nice"}]))
    assert [case.edit.target for case in cases] == ["Lyon", "Nice"]


GOOD = json.dumps(FACT)
COMPLAINTS = {
    "not JSON": ("f.jsonl", f"{GOOD}\n\n{{'prompt': 1}}", ":3: ", "not JSON"),
    "not JSON, in a list": ("f.json", '[{"prompt": "a",\n "target" "b"}]', ":2: ", "not JSON"),
    "lines in a .json": ("f.json", f"{GOOD}\n{GOOD}", ":2: ", "jsonl"),
    "no object": ("f.jsonl", f"{GOOD}\n[1]", ":2: ", "must be an object"),
    "no object, in a list": ("f.json", [FACT, "x"], ": record 2: ", "must be an object"),
    "no list": ("f.json", GOOD, ":1: ", "list of records"),
    "missing": ("f.jsonl", f'{GOOD}\n{{"prompt": "a"}}', ":2: ", "'target' is missing"),
    "empty": ("f.jsonl", '{"prompt": "a", "target": " "}', ":1: ", "'target' is empty"),
    "a number": (
        "f.json",
        [{"prompt": "a", "target": 2006}],
        ": record 1: ",
        "must be a text, not 2006; put it in",
    ),
    "null": ("f.jsonl", '{"prompt": null, "target": "a"}', ":1: ", "must be a text, not null"),
    "misspelt": (
        "f.jsonl",
        '{"prompt": "a", "targt": "b"}',
        ":1: ",
        "'targt' (did you mean 'target'?); known are prompt",
    ),
    "unknown": (
        "f.jsonl",
        '{"prompt": "a", "target": "b", "zzz": 1}',
        ":1: ",
        "unknown field 'zzz'; known are prompt, messages, target",
    ),
    "given twice": (
        "f.json",
        '[{"prompt": "a", "target": "b", "target": "c"}]',
        ": record 1: ",
        "'target' occurs twice",
    ),
    "rephrase empty": (
        "f.jsonl",
        '{"prompt": "a", "target": "b", "rephrase": ["c", ""]}',
        ":1: ",
        "'rephrase' is empty",
    ),
    "rephrase no text": (
        "f.jsonl",
        '{"prompt": "a", "target": "b", "rephrase": {}}',
        ":1: ",
        "'rephrase' must be a text",
    ),
    "unrelated no object": (
        "f.jsonl",
        '{"prompt": "a", "target": "b", "unrelated": "c"}',
        ":1: ",
        "unrelated must be an obj",
    ),
    "unrelated half": (
        "f.jsonl",
        '{"prompt": "a", "target": "b", "unrelated": [{"prompt": "c"}]}',
        ":1: ",
        "unrelated: the field 'answer' is missing",
    ),
    "portability": (
        "f.jsonl",
        '{"prompt": "a", "target": "b", "portability": {"question": "c"}}',
        ":1: ",
        "portability: unknown field 'question'; known are prompt, answer",
    ),
    "zsre": ("f.json", [ZSRE, {"src": "a"}], ": record 2: ", "'alt' is missing"),
    "zsre without answer": (
        "f.json",
        [{"src": "a", "alt": "b", "loc": "c"}],
        ": record 1: ",
        "'loc_ans' is missing",
    ),
    "half a character": ("f.jsonl", '{"prompt": "a", "target": "\\ud83d"}', ":1: ", "surrogate"),
    "a long number": ("f.jsonl", f'{GOOD}\n{{"prompt": {"9" * 5000}}}', ":2: ", ""),
    "deep nesting": ("f.jsonl", "[" * 100_000, ":1: ", ""),
    "no record": ("f.jsonl", "\n \n", ":1: ", "has no records"),
    "no record, in a list": ("f.json", "[]", ":1: ", "has no records"),
    "empty file": ("f.json", "", ":1: ", "has no records"),
    "only a header": ("f.csv", "prompt,target\n", ":1: ", "has no records"),
    "empty table": ("f.csv", "", ":1: ", "has no records"),
    "not UTF-8": ("f.jsonl", f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}', ":2: ", "UTF-8"),
    "UTF-16": ("f.csv", "prompt,target\na,b".encode("utf-16"), ":1: ", "UTF-8"),
    "suffix": ("f.txt", GOOD, ": ", ".jsonl, .json or .csv, not .txt"),
    "no suffix": ("facts", GOOD, ": ", ".jsonl, .json or .csv"),
    "repeated": ("f.jsonl", f"{GOOD}\n\n{GOOD}", ":3: ", "f.jsonl:1 already"),
    "repeated but for spaces": (
        "f.json",
        [FACT, {**FACT, "target": " Lyon"}],
        ": record 2: ",
        "f.json: record 1 already",
    ),
    "column missing": ("f.csv", "prompt\na", ":1: ", "the column 'target' is missing"),
    "column misspelt": (
        "f.csv",
        "\nprompt,targt\na,b",
        ":2: ",
        "unknown column 'targt' (did you mean 'target'?)",
    ),
    "column twice": ("f.csv", "prompt,target,target\na,b,c", ":1: ", "occurs twice"),
    "semicolons": ("f.csv", "prompt;target\na;b", ":1: ", "unknown column 'prompt;target'"),
    "too many cells": ("f.csv", 'prompt,target\n"a\nb",c\nd,e,f', ":4: ", "3 cells, but 2 columns"),
    "too few cells": ("f.csv", "prompt,target\na", ":2: ", "1 cells, but 2 columns"),
    "empty cell": ("f.csv", 'prompt,target\n\n"a\nb",', ":3: ", "'target' is missing"),
    "half an unrelated": (
        "f.csv",
        "prompt,target,unrelated_prompt\na,b,c",
        ":2: ",
        "'answer' is missing",
    ),
    "open quote": ("f.csv", 'prompt,target\na,b\nc,"d', ":3: ", "not CSV"),
}


@pytest.mark.parametrize(
    ("name", "content", "place", "message"), COMPLAINTS.values(), ids=COMPLAINTS
)
def test_complaints_begin_with_the_place_and_say_what_is_wrong(
    tmp_path: Path, name, content, place, message
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError) as raised:
        read_cases(path)
    assert str(raised.value).startswith(f"{path}{place}")
    assert message in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 500


def test_complaints_about_unrelated_text_name_their_place_as_well(tmp_path: Path) -> None:
    path = written(tmp_path, "f.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a"}])
    with pytest.raises(ValueError, match=rf"^{path}:2: the field 'answer' is missing"):
        read_unrelated(path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_cases(tmp_path / "absent.jsonl")


FIELDS = st.sampled_from(
    ["prompt", "target", "rephrase", "unrelated", "portability", "src", "alt", "loc", "answer"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | FIELDS, inner, max_size=3)
    ),
    max_leaves=6,
)
RECORDS = st.dictionaries(FIELDS, JSON, max_size=5)
LINES = st.lists(st.one_of(RECORDS, JSON).map(json.dumps) | st.text(max_size=20), max_size=4).map(
    "\n".join
)
FILES = st.one_of(st.binary(max_size=60), LINES.map(lambda text: text.encode("utf-8", "replace")))


@settings(max_examples=150, deadline=None)
@given(FILES, st.sampled_from(["f.jsonl", "f.json", "f.csv"]))
def test_any_file_is_read_or_complained_about_with_a_value_error(content: bytes, name: str) -> None:
    with TemporaryDirectory() as folder:
        path = written(Path(folder), name, content)
        for read in (read_cases, read_unrelated):
            try:
                assert read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}:")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)] * 2),
        min_size=1,
        unique=True,
    )
)
def test_what_was_written_is_read(pairs: list[tuple[str, str]]) -> None:
    wanted = {(prompt.strip(), target.strip()): None for prompt, target in pairs}
    with TemporaryDirectory() as folder:
        for name in ("f.jsonl", "f.json"):
            path = written(Path(folder), name, [{"prompt": p, "target": t} for p, t in wanted])
            assert [(case.edit.prompt, case.edit.target) for case in read_cases(path)] == list(
                wanted
            )


# values


@pytest.mark.parametrize(
    ("prompt", "target"), [("", "x"), (" ", "x"), ("x", ""), ("x", "\n\t"), ("x", "\ud800")]
)
def test_an_empty_or_broken_prompt_or_target_is_refused(prompt: str, target: str) -> None:
    for make in (Edit, Unrelated, lambda p, t: Probe("locality", p, t)):
        with pytest.raises(ValueError, match=r"empty|surrogate"):
            make(prompt, target)


def test_values_of_the_wrong_type_or_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Edit\.target must be a string, not int \(2006\)"):
        Edit("When?", 2006)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of generality, locality, portability, not 'general'"):
        Probe("general", "a", "b")


# tokens


PROMPT, ANSWER = CAPITALS[3].prompt, CAPITALS[3].answer  # an answer of two tokens


def texts(tokenizer: Any, row: Tokens) -> tuple[list[str], list[str]]:
    words = tokenizer.convert_ids_to_tokens(list(row.ids))
    return words[: row.prompt_length], words[row.prompt_length :]


@pytest.mark.parametrize("tail", ["", " ", "\n", " \t "])
@pytest.mark.parametrize("head", ["", " "])
def test_one_space_joins_prompt_and_answer(head: str, tail: str) -> None:
    tokenizer = make_tokenizer()
    row = encode(tokenizer, f"{head}{PROMPT}{tail}", f"{tail}{ANSWER}{tail}")
    assert texts(tokenizer, row) == (
        ["the", " capital", " of", " Arona", " is"],
        [" Port", " Kasheim"],
    )
    assert list(row.ids) == tokenizer(f"{PROMPT} {ANSWER}")["input_ids"]  # tokenised jointly


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_a_leading_special_token_is_prompt_and_a_closing_one_is_left_out(
    bos: bool, eos: bool
) -> None:
    tokenizer = make_tokenizer(bos, eos)
    assert len(tokenizer(PROMPT)["input_ids"]) == 5 + bos + eos  # control: the tokenizer adds them
    prompt, answer = texts(tokenizer, encode(tokenizer, PROMPT, ANSWER))
    assert prompt == ["<s>"] * bos + ["the", " capital", " of", " Arona", " is"]
    assert answer == [" Port", " Kasheim"]


def merging_tokenizer(words: list[str]) -> Any:
    """One whose tokens may reach over spaces, as in some real vocabularies."""
    model = models.Unigram(
        [(word, -float(i)) for i, word in enumerate(["<unk>", *words])], unk_id=0
    )
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", pad_token="<unk>"
    )


def test_a_token_over_the_join_belongs_to_the_answer() -> None:
    tokenizer = merging_tokenizer(["New", "s York", " York", "is", "i"])
    row = encode(tokenizer, "New is", "York")
    assert texts(tokenizer, row)[1] == ["s York"]
    lone_space = merging_tokenizer(["a", "b", " "])
    assert texts(lone_space, encode(lone_space, "a", "b")) == (["a"], [" ", "b"])


def test_a_text_without_tokens_is_refused() -> None:
    for bos in (False, True):
        tokenizer = make_tokenizer(bos, eos=True)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
        assert encode(tokenizer, "the", "capital").prompt_length == 1 + bos
        with pytest.raises(ValueError, match="target '~~' has no tokens"):
            encode(tokenizer, "the", "~~")
        with pytest.raises(ValueError, match="prompt '~' has no tokens"):
            encode(tokenizer, "~", "the")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace is a slow tokenizer, or not a tokenizer"):
        encode(SimpleNamespace(is_fast=False), "a", "b")


def test_an_overlong_text_is_neither_cut_nor_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert len(encode(tokenizer, PROMPT, ANSWER).ids) == 7
    assert not caplog.records


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4))
def test_batches_hold_the_rows_their_padding_and_the_answers_alone(
    lengths: list[tuple[int, int]],
) -> None:
    rows = [
        Tokens(tuple(range(10 * i + 1, 10 * i + 1 + p + a)), p) for i, (p, a) in enumerate(lengths)
    ]
    batch, width = collate(rows, 99), max(p + a for p, a in lengths)
    plain: dict[str, list[Any]] = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for row in rows:
        rest = width - len(row.ids)
        plain["input_ids"].append([*row.ids] + [99] * rest)
        plain["attention_mask"].append([1] * len(row.ids) + [0] * rest)
        plain["labels"].append(
            [-100] * row.prompt_length + [*row.ids[row.prompt_length :]] + [-100] * rest
        )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == plain
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@pytest.mark.parametrize(
    ("pad", "eos", "wanted"), [(0, 2, 0), (None, 2, 2), (None, 0, 0), (None, None, 0)]
)
def test_padding_takes_any_id_that_exists(pad: int | None, eos: int | None, wanted: int) -> None:
    assert padding_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == wanted


def test_the_context_window_is_the_configs_or_unknown() -> None:
    assert context_window(SimpleNamespace(config=SimpleNamespace(max_position_embeddings=32))) == 32
    assert context_window(SimpleNamespace(config=SimpleNamespace())) is None
