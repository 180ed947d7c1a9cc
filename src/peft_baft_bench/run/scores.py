"""Average replies to the scores of a table. This is only arithmetic on the values of a result line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import sqrt
from statistics import mean, stdev
from typing import Any

FORCED = ("reliability", "generality", "portability", "locality")
# Fields of a case that are not further metrics.
KNOWN = {"row", "block", "steps", "seconds", "learned"}
Value = Callable[[dict[str, Any]], float]


def scores(cases: Sequence[dict[str, Any]], averaged: Sequence[str]) -> dict[str, float]:
    """Average the cases of a result line; scores about which nothing was asked are absent.

    `reliability`, `generality`, `portability`, `locality`: teacher-forced token match by KnowEdit's first
    rule: the mean over the cases with such probes, of the mean over their topics, of the mean over a topic's
    probes.
    `*_by_topic`: its second rule, the mean over topics of the mean over the cases with that topic.
    `*_exact`, `*_prefix`, `locality_text`: freely generated answers, by the first rule.
    `*_contains`: freely generated statements that contain the new answer and not the old one.
    `in_context`, `in_context_contains`: the edit in frames; `in_context_lowest`: `in_context_contains` in the
    worst frame.
    `neighbour_subject`, `neighbour_relation`: the edit's question about other subjects, and other questions
    about its subject; token match with the reply before the edit. `*_unchanged`: identical text. `*_spared`:
    without the new answer.
    `routed_*`: for methods that select an edit per prompt: `recall` and `wrong` are the shares of rephrasings
    answered by their own edit and by another edit; `locality`, `portability`, `neighbour_subject` and
    `neighbour_relation` are the shares of such questions answered by any edit.
    `average`: the mean of those scores in `averaged` that are present. Further metrics keep their names.
    """
    means: dict[str, float | None] = {}
    for kind in FORCED:
        asked = [[probe for probe in case["probes"] if probe["kind"] == kind] for case in cases]
        means[kind] = mean_by_case(asked, lambda probe: probe["match"])
        if any(probe["topic"] for probes in asked for probe in probes):
            means[f"{kind}_by_topic"] = mean_by_topic(asked, lambda probe: probe["match"])
        if kind == "locality":
            means["locality_text"] = mean_by_case(asked, lambda probe: probe["unchanged"])
        else:
            means[f"{kind}_exact"] = mean_by_case(asked, lambda probe: probe["exact"])
            means[f"{kind}_prefix"] = mean_by_case(asked, lambda probe: probe["prefix"])
            means[f"{kind}_contains"] = _contains(asked)
    means |= _in_context(cases) | _neighbours(cases) | _routed(cases)
    means["average"] = _mean(means[kind] for kind in averaged if means[kind] is not None)
    for name, key in (("steps", "steps"), ("edit_seconds", "seconds"), ("learned", "learned")):
        means[name] = _mean(case[key] for case in cases if case.get(key) is not None)
    names = {name for case in cases for name in case}
    for name in sorted(names - KNOWN):
        means[name] = _mean(case[name] for case in cases if isinstance(case.get(name), int | float))
    return {name: value for name, value in means.items() if value is not None}


def standard_error_over_rows(
    cases: Sequence[dict[str, Any]], averaged: Sequence[str]
) -> float | None:
    """Compute the standard error of `average` over the rows of one result line; None for fewer than two rows.

    It estimates the variation between samples of rows, not that between seeds or orders of edits.
    """
    means = []
    for case in cases:
        asked = [[probe for probe in case["probes"] if probe["kind"] == kind] for kind in averaged]
        row_mean = _mean(mean_by_case([probes], lambda probe: probe["match"]) for probes in asked)
        if row_mean is not None:
            means.append(row_mean)
    return stdev(means) / sqrt(len(means)) if len(means) > 1 else None


def _contains(asked: Sequence[Sequence[dict[str, Any]]]) -> float | None:
    with_statement = [[probe for probe in probes if "contains" in probe] for probes in asked]
    return mean_by_case(with_statement, lambda probe: probe["contains"])


def _in_context(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average over the frames, and find the worst frame."""
    asked = [[probe for probe in case["probes"] if probe["kind"] == "in_context"] for case in cases]
    frames = {probe["topic"] for probes in asked for probe in probes}
    shares = [
        _contains([[probe for probe in probes if probe["topic"] == frame] for probes in asked])
        for frame in sorted(frames)
    ]
    return {
        "in_context": mean_by_case(asked, lambda probe: probe["match"]),
        "in_context_contains": _contains(asked),
        "in_context_lowest": min((share for share in shares if share is not None), default=None),
    }


def _neighbours(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average over the neighbours with another subject, and over those with another relation."""
    means: dict[str, float | None] = {}
    for what in ("subject", "relation"):
        asked = [
            [p for p in case["probes"] if p["kind"] == "neighbour" and p["topic"] == what]
            for case in cases
        ]
        means[f"neighbour_{what}"] = mean_by_case(asked, lambda probe: probe["match"])
        means[f"neighbour_{what}_unchanged"] = mean_by_case(asked, lambda probe: probe["unchanged"])
        means[f"neighbour_{what}_spared"] = mean_by_case(asked, lambda probe: probe["spared"])
    return means


# By name: the kind of the probe, its topic (None for any), and which edit counts (None for any).
ROUTED = {
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
        means[f"routed_{name}"] = mean_by_case(asked, partial(_is_routed, counted))
    return means


def _is_routed(counted: str | None, probe: dict[str, Any]) -> bool:
    return bool(probe["route"] == counted if counted else probe["route"] != "none")


def mean_by_case(asked: Sequence[Sequence[dict[str, Any]]], value: Value) -> float | None:
    """Average over cases the mean over topics of the mean over probes; cases without probes are skipped."""
    return _mean(_mean(_topics(probes, value).values()) for probes in asked if probes)


def mean_by_topic(asked: Sequence[Sequence[dict[str, Any]]], value: Value) -> float | None:
    """Average over topics the mean over the cases with that topic, of the mean over probes."""
    topics: dict[str, list[float]] = {}
    for probes in asked:
        for topic, topic_mean in _topics(probes, value).items():
            topics.setdefault(topic, []).append(topic_mean)
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
