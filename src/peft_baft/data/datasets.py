"""Read files of facts, and of text that edits should not change. Every error message names its place in the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_baft.data.cases import Case, Edit, Message, Probe, Unrelated, prompt_words
from peft_baft.data.files import (
    as_list,
    records,
    require_known,
    require_object,
    text,
    texts,
    with_place,
)

FACT_FIELDS = (
    "prompt",
    "messages",
    "target",
    "subject",
    "after",
    "rephrase",
    "unrelated",
    "portability",
)
FACT_COLUMNS = ("prompt", "target", "rephrase", "unrelated_prompt", "unrelated_answer")
UNRELATED_FIELDS = ("prompt", "answer", "ground_truth")


def read_cases(path: str | Path) -> list[Case]:
    """Read the facts of a file, in order.

    A record has `prompt` and `target`; or `messages`, in the Hub's conversational format, with the answer as `target` or as the
    last message, with the role assistant. Optional fields are `subject` (what the fact is about, exactly as in the prompt),
    `after`, `rephrase` (a text or a list of texts), `unrelated` and `portability` (an object with prompt and answer, or a list
    of them). A .csv file has a header row with the columns prompt, target, rephrase, unrelated_prompt and unrelated_answer, of
    which only the first two are required. Records with `src` instead of `prompt` are read as ZsRE. White space around texts is
    ignored. A prompt may occur with several targets, for continual editing.

    Raises:
        ValueError: a record is invalid, or repeats an earlier one. The message begins with `path:line`, or for .json files with
            `path: record N`, counted from 1.
        FileNotFoundError: there is no such file.
    """
    cases: list[Case] = []
    places: dict[Edit, str] = {}
    for place, record in records(Path(path), FACT_COLUMNS, ("prompt", "target")):
        case = with_place(place, _case, record)
        if case.edit in places:
            raise ValueError(
                f"{place}: the same prompt and target are at {places[case.edit]} already; remove one of them."
            )
        places[case.edit] = place
        cases.append(case)
    return cases


def read_unrelated(path: str | Path) -> list[Unrelated]:
    """Read text that edits should not change: records or .csv rows with `prompt` and `answer` (or `ground_truth`).

    Raises:
        ValueError, FileNotFoundError: as `read_cases`.
    """
    found = records(Path(path), UNRELATED_FIELDS, ("prompt",))
    return [with_place(place, _unrelated, record) for place, record in found]


def zsre_case(record: Any) -> Case:
    """Convert a record of the ZsRE editing benchmark; unused fields are ignored.

    The old answer is the first of `answers`, the true ones. `pred` is not used: it is the output of the model that the file was
    made with, and other models may say something else.
    """
    require_object(record, "a record")
    edit = with_subject(Edit(text(record, "src"), text(record, "alt")), record)
    probes = []
    if "rephrase" in record:
        probes.append(Probe("generality", text(record, "rephrase"), edit.target))
    if "loc" in record:
        probes.append(Probe("locality", text(record, "loc"), text(record, "loc_ans")))
    if record.get("portability") is not None:
        question = record["portability"]
        require_object(question, "portability")
        probes.append(
            Probe("portability", text(question, "New Question"), text(question, "New Answer"))
        )
    return Case(edit, tuple(probes), old_answer(record.get("answers")))


def old_answer(value: Any) -> str | None:
    """Return the answer that an edit replaces, from an optional field of a record: its first alias, or None."""
    while isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def with_subject(edit: Edit, record: dict[str, Any]) -> Edit:
    """Add the subject that a benchmark's record names, if it occurs in the prompt exactly so."""
    subject = record.get("subject")
    if (
        isinstance(subject, str)
        and subject.strip()
        and subject.strip() in prompt_words(edit.prompt)
    ):
        return replace(edit, subject=subject.strip())
    return edit


def _case(record: Any) -> Case:
    require_object(record, "a record")
    if "src" in record and "prompt" not in record:
        return zsre_case(record)
    require_known(record, FACT_FIELDS)
    edit = _conversation(record) if "messages" in record else _text_edit(record)
    if record.get("subject") is not None:
        edit = replace(edit, subject=text(record, "subject"))
    if record.get("after") is not None:
        edit = replace(edit, after=text(record, "after"))
    probes = [Probe("generality", rephrase, edit.target) for rephrase in texts(record, "rephrase")]
    for field, kind in (("unrelated", "locality"), ("portability", "portability")):
        probes += [_probe(kind, field, item) for item in as_list(record.get(field))]
    return Case(edit, tuple(probes))


def _text_edit(record: dict[str, Any]) -> Edit:
    return Edit(text(record, "prompt"), text(record, "target"))


def _conversation(record: dict[str, Any]) -> Edit:
    """Read an edit from messages, of which the last one may be the answer."""
    if "prompt" in record:
        raise ValueError("a record has 'prompt' or 'messages', not both")
    messages = [_message(item) for item in as_list(record["messages"])]
    if messages and messages[-1].role == "assistant":
        if "target" in record:
            raise ValueError(
                "the answer is given twice: as 'target' and as the assistant's last message; leave one out"
            )
        return Edit(messages[:-1], messages[-1].content)
    return Edit(messages, text(record, "target"))


def _message(item: Any) -> Message:
    require_object(item, "a message")
    require_known(item, ("role", "content"))
    return Message(text(item, "role"), text(item, "content"))


def _probe(kind: str, field: str, item: Any) -> Probe:
    require_object(item, field)
    try:
        require_known(item, ("prompt", "answer"))
        return Probe(kind, text(item, "prompt"), text(item, "answer"))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _unrelated(record: Any) -> Unrelated:
    require_object(record, "a record")
    require_known(record, UNRELATED_FIELDS)
    return Unrelated(
        text(record, "prompt"),
        text(record, "ground_truth" if "ground_truth" in record else "answer"),
    )
