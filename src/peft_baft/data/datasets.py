"""Read files of a user's facts, and of text that edits should leave alone. Every complaint names its place in the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_baft.data.cases import Case, Edit, Message, Probe, Unrelated, prompt_words
from peft_baft.data.files import listed, placed, records, require_known, require_object, text, texts

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
    """Read the facts of a file, in its order.

    A record has `prompt` and `target`; or `messages`, in the Hub's conversational format, with the answer as `target` or as the
    last message, the assistant's. `subject` (what the fact is about, as it stands in the prompt), `rephrase` (a text or a list
    of them), `unrelated` and `portability` (an object with prompt and answer, or a list of them) may be absent. A .csv has a
    header row of the columns prompt, target, rephrase, unrelated_prompt and unrelated_answer, of which the first two are needed.
    Records with `src` instead of `prompt` are read as ZsRE. White space around texts is dropped. One prompt may have several
    targets, for continual editing.

    Raises:
        ValueError: a record is unusable, or repeats an earlier one; the message begins with `path:line`, or for a
            record of a .json with `path: record N`, from 1.
        FileNotFoundError: there is no such file.
    """
    cases: list[Case] = []
    places: dict[Edit, str] = {}
    for place, record in records(Path(path), FACT_COLUMNS, ("prompt", "target")):
        case = placed(place, _case, record)
        if case.edit in places:
            raise ValueError(
                f"{place}: the same prompt and target stand at {places[case.edit]} already; remove one."
            )
        places[case.edit] = place
        cases.append(case)
    return cases


def read_unrelated(path: str | Path) -> list[Unrelated]:
    """Read text that edits should leave alone: records, or rows of a .csv, with `prompt` and `answer` (or `ground_truth`).

    Raises:
        ValueError, FileNotFoundError: as `read_cases`.
    """
    placed_records = records(Path(path), UNRELATED_FIELDS, ("prompt",))
    return [placed(place, _unrelated, record) for place, record in placed_records]


def zsre_case(record: Any) -> Case:
    """Read a record of the ZsRE editing benchmark; fields that are not needed are passed over.

    The old answer is the first of `answers`, which are the true ones. `pred` is what the model said that the file was made
    with, and no other model need say it.
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
    """Read the answer that an edit replaces from a record's field, which no record needs to have: its first alias, or None."""
    while isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def with_subject(edit: Edit, record: dict[str, Any]) -> Edit:
    """Add the subject that a benchmark's record names, where it stands in the prompt as it is."""
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
        probes += [_probe(kind, field, item) for item in listed(record.get(field))]
    return Case(edit, tuple(probes))


def _text_edit(record: dict[str, Any]) -> Edit:
    return Edit(text(record, "prompt"), text(record, "target"))


def _conversation(record: dict[str, Any]) -> Edit:
    """Read an edit of messages, whose last one may be the answer."""
    if "prompt" in record:
        raise ValueError("a record has 'prompt' or 'messages', not both")
    messages = [_message(item) for item in listed(record["messages"])]
    if messages and messages[-1].role == "assistant":
        if "target" in record:
            raise ValueError(
                "the answer stands twice: as 'target' and as the assistant's last message; leave one out"
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
