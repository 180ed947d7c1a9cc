"""Average single replies to the scores of a table. Pure arithmetic on the values of a result line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import sqrt
from statistics import mean, stdev
from typing import Any

FORCED = ("reliability", "generality", "portability", "locality")
# Of a case; other numbers are further metrics, by their name.
KNOWN = {
    "row",
    "block",
    "steps",
    "seconds",
    "learned",
}
Value = Callable[[dict[str, Any]], float]


def scores(cases: Sequence[dict[str, Any]], averaged: Sequence[str]) -> dict[str, float]:
    """Average over the cases of a result line; what nothing was asked about is absent.

    `reliability`, `generality`, `portability`, `locality`: teacher-forced token match, by KnowEdit's first rule: the mean over
    the cases that have such probes, of the mean over their topics, of the mean over a topic's probes.
    `*_by_topic`: its second rule, the mean over topics, of the mean over the cases that have it.
    `*_exact`, `*_prefix`, `locality_text`: the free answers, by the first rule.
    `*_contains`: the freely made statements that say the new answer and not the old one.
    `in_context`, `in_context_contains`: the edit in frames; `in_context_lowest`: the latter in the worst of them.
    `neighbour_subject`, `neighbour_relation`: the edit's question of other subjects, other questions of its subject, by tokens as
    before the edit; `*_unchanged`: to the letter; `*_spared`: without the new answer.
    `routed_*`: of methods that choose an edit by the prompt: `recall` and `wrong`, how often a rephrasing was answered by its
    own edit, and by another one; `locality`, `portability`, `neighbour_subject` and `neighbour_relation`, how often such a
    question was answered by any.
    `average`: the mean of the scores `averaged` that are there. Further metrics of the cases: by their names.
    """
    means: dict[str, float | None] = {}
    for kind in FORCED:
        asked = [[probe for probe in case["probes"] if probe["kind"] == kind] for case in cases]
        means[kind] = by_case(asked, lambda probe: probe["match"])
        if any(probe["topic"] for probes in asked for probe in probes):
            means[f"{kind}_by_topic"] = by_topic(asked, lambda probe: probe["match"])
        if kind == "locality":
            means["locality_text"] = by_case(asked, lambda probe: probe["unchanged"])
        else:
            means[f"{kind}_exact"] = by_case(asked, lambda probe: probe["exact"])
            means[f"{kind}_prefix"] = by_case(asked, lambda probe: probe["prefix"])
            means[f"{kind}_contains"] = _contains(asked)
    means |= _in_context(cases) | _neighbours(cases) | _routed(cases)
    means["average"] = _mean(means[kind] for kind in averaged if means[kind] is not None)
    for name, key in (("steps", "steps"), ("edit_seconds", "seconds"), ("learned", "learned")):
        means[name] = _mean(case[key] for case in cases if case.get(key) is not None)
    names = {name for case in cases for name in case}
    for name in sorted(names - KNOWN):
        means[name] = _mean(case[name] for case in cases if isinstance(case.get(name), int | float))
    return {name: value for name, value in means.items() if value is not None}


def error_over_rows(cases: Sequence[dict[str, Any]], averaged: Sequence[str]) -> float | None:
    """Compute the standard error of `average` over the rows of one result line; None for fewer than two rows.

    It says how far another sample of rows may lie, and nothing of what another seed, or another order of edits, would do.
    """
    of_rows = []
    for case in cases:
        asked = [[probe for probe in case["probes"] if probe["kind"] == kind] for kind in averaged]
        of_row = _mean(by_case([probes], lambda probe: probe["match"]) for probes in asked)
        if of_row is not None:
            of_rows.append(of_row)
    return stdev(of_rows) / sqrt(len(of_rows)) if len(of_rows) > 1 else None


def _contains(asked: Sequence[Sequence[dict[str, Any]]]) -> float | None:
    told = [[probe for probe in probes if "contains" in probe] for probes in asked]
    return by_case(told, lambda probe: probe["contains"])


def _in_context(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average over the frames, and find the worst of them."""
    asked = [[probe for probe in case["probes"] if probe["kind"] == "in_context"] for case in cases]
    frames = {probe["topic"] for probes in asked for probe in probes}
    of_frames = [
        _contains([[probe for probe in probes if probe["topic"] == frame] for probes in asked])
        for frame in sorted(frames)
    ]
    return {
        "in_context": by_case(asked, lambda probe: probe["match"]),
        "in_context_contains": _contains(asked),
        "in_context_lowest": min((share for share in of_frames if share is not None), default=None),
    }


def _neighbours(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average over the neighbours that differ in their subject, and over those that differ in their relation."""
    means: dict[str, float | None] = {}
    for what in ("subject", "relation"):
        asked = [
            [p for p in case["probes"] if p["kind"] == "neighbour" and p["topic"] == what]
            for case in cases
        ]
        means[f"neighbour_{what}"] = by_case(asked, lambda probe: probe["match"])
        means[f"neighbour_{what}_unchanged"] = by_case(asked, lambda probe: probe["unchanged"])
        means[f"neighbour_{what}_spared"] = by_case(asked, lambda probe: probe["spared"])
    return means


ROUTED = {  # name: kind of the probe, its topic if that matters, and which edit is counted, None for any
    "recall": ("generality", None, "own"),
    "wrong": ("generality", None, "other"),
    "locality": ("locality", None, None),
    "portability": ("portability", None, None),
    "neighbour_subject": ("neighbour", "subject", None),
    "neighbour_relation": ("neighbour", "relation", None),
}


def _routed(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average how often prompts of each kind were answered by an edit."""
    means: dict[str, float | None] = {}
    for name, (kind, topic, counted) in ROUTED.items():
        asked = [
            [
                probe
                for probe in case["probes"]
                if probe["kind"] == kind and topic in (None, probe["topic"]) and "route" in probe
            ]
            for case in cases
        ]
        fired = partial(_is_routed, counted)
        means[f"routed_{name}"] = by_case(asked, fired)
    return means


def _is_routed(counted: str | None, probe: dict[str, Any]) -> bool:
    return probe["route"] == counted if counted else probe["route"] != "none"


def by_case(asked: Sequence[Sequence[dict[str, Any]]], value: Value) -> float | None:
    """Average over cases the mean over topics of the mean over probes; cases without probes are passed over."""
    return _mean(_mean(_topics(probes, value).values()) for probes in asked if probes)


def by_topic(asked: Sequence[Sequence[dict[str, Any]]], value: Value) -> float | None:
    """Average over topics the mean over the cases that have it, of the mean over probes."""
    topics: dict[str, list[float]] = {}
    for probes in asked:
        for topic, of_case in _topics(probes, value).items():
            topics.setdefault(topic, []).append(of_case)
    return _mean(map(mean, topics.values()))


def _topics(probes: Sequence[dict[str, Any]], value: Value) -> dict[str, float]:
    """Average over the probes of each topic of one case."""
    topics: dict[str, list[float]] = {}
    for probe in probes:
        topics.setdefault(probe["topic"], []).append(float(value(probe)))
    return {topic: mean(values) for topic, values in topics.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    present = [float(value) for value in values if value is not None]
    return mean(present) if present else None
