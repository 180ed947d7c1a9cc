"""Readers for the files of published benchmarks, one per format.

`peft_baft_bench/tasks/tasks.py` assigns them to names.

Every reader strips texts. EasyEdit does not: it keeps the leading space of the target in 15 rows of its ZsRE
file, and so scores them with two spaces. Fields that a reader does not need are ignored, and an edit may
repeat, as some do in KnowEdit.

Every reader returns one case per record, in the file's order, and raises

    FileNotFoundError: there is no such file.
    ValueError: a record is invalid; the message begins with its place, `FILE: record N`, counted from 1, or
        `FILE:line` for a .jsonl file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft_baft.data.cases import Case, Edit, Probe
from peft_baft.data.datasets import old_answer, with_subject, zsre_case
from peft_baft.data.files import (
    abbreviated,
    as_list,
    field,
    read_text,
    records,
    require_object,
    text,
    texts,
    with_place,
)

_NOUNS = "opinion of,stance on,position on,attitude about,view on,take on,impression of,assessment of,judgment of"
CONVSENT_QUESTIONS = (
    *("What do you think of {}?", "What do you feel about {}?", "How do you view {}?"),
    *(f"What is your {noun} {{}}?" for noun in (*_NOUNS.split(","), "sentiment of")),
)
CONVSENT_PROMPT = "From the sentiment dataset, answer {} {}."


@dataclass(frozen=True, kw_only=True)
class ConvSentCase(Case):
    """A record of ConvSent: the edit, and what its ES metric compares.

    Args:
        question: asks for an opinion of the topic.
        wanted: the opinion that the edit teaches, `positive` or `negative`.
        positive, negative: all answers with each opinion.
    """

    question: str
    wanted: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class PiqaItem:
    """A goal, two ways to reach it, and which one is right: label 0 for sol1, 1 for sol2."""

    goal: str
    sol1: str
    sol2: str
    label: int


def read_zsre(path: Path) -> list[Case]:
    """Read ZsRE in the format of the continual protocol: `src`, `alt`, `rephrase`, `loc`, `loc_ans` and `portability`."""
    return _cases(path, zsre_case)


def read_knowedit(path: Path, prompt: str = "prompt", target: str = "target_new") -> list[Case]:
    """Read a file in the format of KnowEdit (all of its parts except ConvSent).

    `portability` and `locality` contain lists of questions by topic; either may be absent, null or empty. A
    rephrasing, which EasyEdit ignores, becomes a generality probe. `ground_truth` next to the edit is the old
    answer.

    Args:
        prompt, target: the names of the fields that contain the edit.
    """
    return _cases(path, partial(_knowedit_case, prompt, target))


def read_counterfact(path: Path) -> list[Case]:
    """Read CounterFact, either as published with ROME or in EasyEdit's flat format."""
    return _cases(path, _counterfact_case)


def read_convsent(path: Path) -> list[Case]:
    """Read ConvSent's topics as `ConvSentCase`s; an edit teaches the first answer of one opinion.

    EasyEdit draws at random which opinion is taught and which of 13 questions is asked. Here row i, counted
    from 0, decides: even rows become positive, odd ones negative, with question i modulo 13. The prompt and
    its misspelling are EasyEdit's.
    """
    placed_records = enumerate(records(Path(path)))
    return [
        with_place(place, partial(_convsent_case, row), record)
        for row, (place, record) in placed_records
    ]


def read_piqa(path: str | Path) -> list[PiqaItem]:
    """Read the items of PIQA: `name.jsonl`, and next to it `name-labels.lst` with a 0 or 1 for each item.

    Raises:
        ValueError: a label is invalid, or the number of labels and records differs.
        FileNotFoundError: one of the two files is missing.
    """
    path = Path(path)
    labels_file = path.with_name(f"{path.stem}-labels.lst")
    placed_records = records(path)
    if not labels_file.exists():
        raise FileNotFoundError(
            f"There is no file {labels_file}; it must contain the labels of {path}, a 0 or 1 per line."
        )
    labels = read_text(labels_file).rstrip().split("\n")
    for line, label in enumerate(labels, start=1):
        if label.strip() not in ("0", "1"):
            raise ValueError(
                f"{labels_file}:{line}: expected the label 0 or 1, not {abbreviated(label)}."
            )
    if len(labels) != len(placed_records):
        raise ValueError(
            f"{labels_file}: {len(labels)} labels, but {path} has {len(placed_records)} records."
        )
    items = []
    for (place, record), label in zip(placed_records, labels, strict=True):
        items.append(with_place(place, partial(_piqa_item, int(label)), record))
    return items


def _cases(path: Path, case_of_record: Callable[[Any], Case]) -> list[Case]:
    return [with_place(place, case_of_record, record) for place, record in records(Path(path))]


def _knowedit_case(prompt: str, target: str, record: Any) -> Case:
    require_object(record, "a record")
    edit = Edit(text(record, prompt), _answer(record, target))
    subject = record.get("subject") or record.get("concept")  # WikiBio's word for it
    edit = with_subject(edit, {"subject": subject})
    probes = []
    for name in ("rephrase_prompt", "rephrase"):
        if record.get(name) not in (None, ""):
            probes += [
                Probe("generality", rephrasing, edit.target) for rephrasing in texts(record, name)
            ]
    probes += [*_topics("portability", record), *_topics("locality", record)]
    return Case(edit, tuple(probes), old_answer(record.get("ground_truth")))


def _topics(kind: str, record: dict[str, Any]) -> Iterator[Probe]:
    """Read the probes of one kind, without those that have no answer."""
    topics = record.get(kind)
    if topics in (None, [], {}):
        return
    require_object(topics, kind)
    for topic, items in topics.items():
        for item in as_list(items):
            probe = with_place(f"{kind}: {topic:.40}", partial(_probe, kind, topic), item)
            if probe:
                yield probe


def _probe(kind: str, topic: str, item: Any) -> Probe | None:
    require_object(item, "a question")
    answer = _answer(item, "ground_truth")
    return Probe(kind, text(item, "prompt"), answer, topic) if answer else None


def _answer(record: dict[str, Any], name: str) -> str:
    """Read the first alias of the first answer, the only one that counts; empty if there is none. Integers become text."""
    value = field(record, name)
    while isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(
            f"the field {name!r} must be a text or a list of texts, not {abbreviated(value)}"
        )
    return str(value).strip()


def _counterfact_case(record: Any) -> Case:
    """Read a record of CounterFact, either as published with ROME or in EasyEdit's flat format."""
    require_object(record, "a record")
    if "requested_rewrite" not in record:
        edit = with_subject(Edit(text(record, "prompt"), text(record, "target_new")), record)
        rephrased, nearby = texts(record, "rephrase_prompt"), texts(record, "locality_prompt")
        truth = text(record, "locality_ground_truth") if nearby else ""
        replaced = old_answer(record.get("ground_truth"))
    else:
        rewrite = record["requested_rewrite"]
        require_object(rewrite, "requested_rewrite")
        prompt, subject = text(rewrite, "prompt"), text(rewrite, "subject")
        if "{}" not in prompt:
            raise ValueError(
                f"the field 'prompt' must contain {{}} in place of the subject, not {abbreviated(prompt)}"
            )
        edit = Edit(prompt.replace("{}", subject), _worded(rewrite, "target_new"), subject)
        rephrased, nearby = (
            texts(record, "paraphrase_prompts"),
            texts(record, "neighborhood_prompts"),
        )
        truth = _worded(rewrite, "target_true") if nearby else ""
        true = rewrite.get("target_true")
        replaced = old_answer(true.get("str") if isinstance(true, dict) else true)
    probes = [Probe("generality", prompt, edit.target) for prompt in rephrased]
    probes += [Probe("locality", prompt, truth) for prompt in nearby]
    return Case(edit, tuple(probes), replaced)


def _worded(rewrite: dict[str, Any], name: str) -> str:
    """Read the text of a target; ROME's format also has its Wikidata id."""
    target = field(rewrite, name)
    require_object(target, name)
    return text(target, "str")


def _convsent_case(row: int, record: Any) -> ConvSentCase:
    require_object(record, "a record")
    topic = text(record, "ent")
    question = CONVSENT_QUESTIONS[row % len(CONVSENT_QUESTIONS)].format(topic)
    positive, negative = (tuple(texts(record, side)) for side in ("pos", "neg"))
    if not positive or not negative:
        raise ValueError(
            f"the field {'neg' if positive else 'pos'!r} must contain at least one answer"
        )
    if row % 2 == 0:
        wanted, adverb, answers = "positive", "postively", positive  # the data set's spelling
    else:
        wanted, adverb, answers = "negative", "negatively", negative
    edit = Edit(CONVSENT_PROMPT.format(question, adverb), answers[0], subject=topic)
    return ConvSentCase(
        edit=edit, question=question, wanted=wanted, positive=positive, negative=negative
    )


def _piqa_item(label: int, record: Any) -> PiqaItem:
    require_object(record, "a record")
    return PiqaItem(text(record, "goal"), text(record, "sol1"), text(record, "sol2"), label)
