"""From replies to a table's means, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peft_baft_bench.run.plan import mean_of
from peft_baft_bench.run.schedule import Schedule
from peft_baft_bench.run.scores import scores


def asked(
    kind: str, match: float, topic: str = "", exact: bool = False, prefix: bool = False
) -> dict[str, Any]:
    free = {"unchanged": exact} if kind == "locality" else {"exact": exact, "prefix": prefix}
    return {"kind": kind, "topic": topic, "match": match, **free, "said": ""}


CASES: list[dict[str, Any]] = [
    {
        "row": 0,
        "steps": 10,
        "seconds": 2.0,
        "learned": True,
        "fluency": 4.0,
        "probes": [
            asked("reliability", 0.5, exact=True, prefix=True),
            asked("portability", 1.0, "A", exact=True, prefix=True),
            asked("portability", 0.0, "A"),
            asked("portability", 1.0, "B", prefix=True),
            asked("locality", 0.5, "X", exact=True),
        ],
    },
    {
        "row": 1,
        "steps": 20,
        "seconds": 4.0,
        "learned": False,
        "fluency": 5.0,
        "probes": [asked("reliability", 1.0), asked("portability", 0.5, "A")],
    },
    {
        "row": 2,
        "steps": None,
        "seconds": None,
        "learned": False,
        "probes": [asked("reliability", 0.0)],
    },
]


def test_every_mean_of_a_result_line_on_a_case_worked_by_hand() -> None:
    found = scores(CASES, ("reliability", "portability", "locality"))
    assert found == pytest.approx(
        {
            "reliability": 0.5,
            "reliability_exact": 1 / 3,
            "reliability_prefix": 1 / 3,
            "portability": (0.75 + 0.5) / 2,  # rows without such probes are passed over
            "portability_exact": (0.25 + 0.0) / 2,
            "portability_prefix": (0.75 + 0.0) / 2,
            "portability_by_topic": ((0.5 + 0.5) / 2 + 1.0) / 2,
            "locality": 0.5,
            "locality_text": 1.0,
            "locality_by_topic": 0.5,
            "average": (0.5 + 0.625 + 0.5) / 3,
            "steps": 15.0,
            "edit_seconds": 3.0,
            "learned": 1 / 3,
            "fluency": 4.5,
        }
    )


def judged(kind: str, topic: str, match: float, **judgements: bool) -> dict[str, Any]:
    return {"kind": kind, "topic": topic, "match": match, **judgements, "said": ""}


def framed(frame: str, match: float, contains: bool) -> dict[str, Any]:
    return judged("in_context", frame, match, contains=contains, exact=False, prefix=False)


def near(what: str, match: float, unchanged: bool, spared: bool) -> dict[str, Any]:
    return judged("neighbour", what, match, unchanged=unchanged, spared=spared)


def test_contexts_and_neighbours_on_a_case_worked_by_hand() -> None:
    cases = [
        {
            "row": 0,
            "probes": [
                judged("reliability", "", 1.0, exact=True, prefix=True, contains=True),
                framed("turn", 1.0, True),
                framed("system", 0.5, False),
                near("subject", 1.0, True, True),
                near("subject", 0.5, False, True),
                near("relation", 0.0, False, False),
            ],
        },
        {
            "row": 1,
            "probes": [
                judged("reliability", "", 0.0, exact=False, prefix=False, contains=False),
                framed("turn", 1.0, True),
                framed("system", 1.0, True),
                near("subject", 0.25, False, False),
            ],
        },
    ]
    found = scores(cases, ("reliability",))
    assert found == pytest.approx(
        {
            "reliability": 0.5,
            "reliability_exact": 0.5,
            "reliability_prefix": 0.5,
            "reliability_contains": 0.5,
            "in_context": (0.75 + 1.0) / 2,
            "in_context_contains": (0.5 + 1.0) / 2,
            "in_context_lowest": 0.5,  # with a system prompt; after another turn it is 1
            "neighbour_subject": (0.75 + 0.25) / 2,
            "neighbour_subject_unchanged": (0.5 + 0.0) / 2,
            "neighbour_subject_spared": (1.0 + 0.0) / 2,
            "neighbour_relation": 0.0,  # the second row has none
            "neighbour_relation_unchanged": 0.0,
            "neighbour_relation_spared": 0.0,
            "average": 0.5,
        }
    )


def test_the_average_is_over_the_measures_that_were_asked() -> None:
    assert scores(CASES[1:], ("reliability", "locality"))["average"] == pytest.approx(0.5)
    assert "generality" not in scores(CASES, ("reliability",))


@pytest.mark.parametrize(
    ("schedule", "rows", "blocks", "name"),
    [
        (Schedule(), (3, 6), [(3, 4), (4, 5), (5, 6)], "single"),
        (Schedule(2), (0, 5), [(0, 2), (2, 4)], "continual"),  # an unfinished block is left out
        (Schedule(2, 3), (1, 13), [(1, 7), (7, 13)], "batched"),  # T counts batches
    ],
)
def test_blocks_are_consecutive_rows(schedule: Schedule, rows, blocks, name: str) -> None:
    assert schedule.blocks(*rows) == [range(*block) for block in blocks]
    assert schedule.name == name


@pytest.mark.parametrize("given", [(0, 1), (1, 0), (1, 1, "later")])
def test_a_schedule_that_edits_nothing_is_refused(given: tuple) -> None:
    with pytest.raises(ValueError, match="must be"):
        Schedule(*given)
    with pytest.raises(TypeError):
        Schedule(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need 4 rows, but rows 0:3 are 3"):
        Schedule(2, 2).blocks(0, 3)


def test_means_of_nested_values_are_taken_element_by_element() -> None:
    values = [
        {"blocks": ["a"], "edit": [[0.0, 1.0]]},
        {"blocks": ["a"], "edit": [[1.0, 0.0]], "locality": [[0.5]]},
    ]
    assert mean_of(values) == {"blocks": ["a"], "edit": [[0.5, 0.5]], "locality": [[0.5]]}


def test_routes_are_averaged_by_what_was_asked() -> None:
    def probe(kind: str, route: str, topic: str = "") -> dict[str, Any]:
        rest = {"match": 1.0, "exact": True, "prefix": True, "unchanged": True, "spared": True}
        return {"kind": kind, "topic": topic, "route": route, **rest}

    cases = [
        {
            "probes": [
                probe("generality", "own"),
                probe("locality", "none"),
                probe("neighbour", "other", "subject"),
            ]
        },
        {
            "probes": [
                probe("generality", "other"),
                probe("locality", "own"),
                probe("neighbour", "none", "subject"),
            ]
        },
        {"probes": [probe("generality", "none"), probe("neighbour", "own", "relation")]},
    ]
    found = scores(cases, ())
    assert found["routed_recall"] == found["routed_wrong"] == pytest.approx(1 / 3)
    assert found["routed_locality"] == found["routed_neighbour_subject"] == 0.5
    assert found["routed_neighbour_relation"] == 1.0 and "routed_portability" not in found
    without = [{"probes": [{**probe("generality", "own")}]}]
    del without[0]["probes"][0]["route"]
    assert "routed_recall" not in scores(without, ())
