"""Result lines to tables and figures: hand-computed numbers, and what must not stand beside each other."""

from __future__ import annotations

import ast
import csv
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import peft_baft_bench.report.tables
from peft_baft_bench.report.comparable import group_comparable, score
from peft_baft_bench.report.tables import Table, tables
from peft_baft_bench.run.results import ResultLine, read_results

BAFT = {
    "config": {"r": 12},
    "objective": {"alpha": 0.05},
    "descent": {"lr": 2e-3},
    "batch_descent": {"lr": 1e-4},
}
FIXED = {"none": {}, "adapter": {"adapter": "runs/mine", "peft_type": "LORA", "sha256": "ab"}}


def line(
    method: str = "baft", edits: int = 1, seed: int = 0, rel: float | None = None, **other: Any
) -> ResultLine:
    """A result line as `baft bench` writes it; `rel` gives all of ZsRE's scores."""
    fixed, batch_size = method in FIXED, other.pop("batch_size", 1)
    name = (
        "none" if fixed else "batched" if batch_size > 1 else "continual" if edits > 1 else "single"
    )
    schedule = {
        "name": name,
        "edits": 0 if fixed else edits,
        "batch_size": 0 if fixed else batch_size,
    }
    zsre = (
        {}
        if rel is None
        else {
            "reliability": rel,
            "generality": rel / 2,
            "locality": 0.75,
            "average": rel / 2 + 0.25,
        }
    )
    values = {
        "format": 1,
        "benchmark": "zsre",
        "method": method,
        "settings": FIXED.get(method, BAFT),
        "schedule": schedule | {"when": "after_all"},
        "protocol": {"template": "raw", "also": []},
        "seed": seed,
        "model": {"name": "tiny", "dtype": "float32", "fingerprint": "f00", "tokenizer": "70c"},
        "data": {"file": "zsre_edit.json", "sha256": "5a", "rows": [0, 20]},
        "unrelated": {"file": "general"},
        "versions": {},
        "command": "baft bench",
        "scores": zsre,
        "cases": [],
    }
    return ResultLine.from_json(values | other)


def rows(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def figure(lines: list[ResultLine], name: str) -> Any:
    matplotlib = pytest.importorskip("matplotlib")
    from peft_baft_bench.report.plot_style import STYLE
    from peft_baft_bench.report.plots import figures

    with matplotlib.rc_context(STYLE):
        return dict(figures(lines))[name]


def curves(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Points of the drawn lines, by their colour."""
    return {
        drawn.get_color(): (list(drawn.get_xdata()), list(drawn.get_ydata()))
        for drawn in axes.get_lines()
    }


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds() -> None:
    (table,) = tables([line(seed=seed, rel=rel) for seed, rel in enumerate((0.5, 0.7, 0.9))])
    assert rows(table)["baft"]["Rel"] == ".700 ±.200"  # the population's would be .163
    assert rows(table)["baft"]["Loc"] == ".750 ±.000" and rows(table)["baft"]["Seeds"] == "3"


def test_one_seed_has_no_deviation() -> None:
    (table,) = tables([line(rel=1.0)])
    assert rows(table)["baft"]["Rel"] == "1.000" and "deviation" not in table.note


def test_one_seed_has_the_error_over_rows_and_several_have_none() -> None:
    def case(row: int, match: float) -> dict[str, Any]:
        kinds = ("reliability", "generality", "locality")
        return {"row": row, "probes": [{"kind": k, "topic": "", "match": match} for k in kinds]}

    cases = [case(row, match) for row, match in enumerate((0.0, 0.5, 1.0))]
    (table,) = tables([line(rel=0.5, cases=cases), line("none", rel=0.5)])
    assert rows(table)["baft"]["Avg s.e."] == ".289"  # .5 / √3
    assert rows(table)["unedited"]["Avg s.e."] == "–"  # no case of it is known
    seeds = [line(seed=seed, rel=0.5, cases=cases) for seed in range(2)]
    (table,) = tables(seeds)
    assert "Avg s.e." not in table.header and "±" in rows(table)["baft"]["Avg"]
    (table,) = tables([*seeds, line("reft", rel=0.5, cases=cases)])
    assert rows(table)["baft"]["Avg s.e."] == "–" and rows(table)["reft"]["Avg s.e."] == ".289"


def test_a_run_that_is_told_twice_counts_once_and_the_last_one_holds() -> None:
    (table,) = tables([line(rel=0.2), line(seed=1, rel=0.6), line(rel=0.4)])
    assert rows(table)["baft"]["Rel"] == ".500 ±.141" and rows(table)["baft"]["Seeds"] == "2"
    assert "Left out: 1" in table.note


def test_every_t_of_a_ladder_has_its_columns_and_single_editing_is_its_first() -> None:
    (table,) = tables([line(edits=10, rel=0.1), line(edits=10, rel=0.3, seed=1), line(rel=1.0)])
    assert table.header[2:] == tuple(
        f"T={t} {name}" for t in (1, 10) for name in ("Rel", "Gen", "Loc", "Avg")
    )
    row = rows(table)["baft"]
    assert (row["T=1 Rel"], row["T=10 Rel"], row["Seeds"]) == ("1.000", ".200 ±.141", "1/2")


def test_free_answers_stand_beside_the_teacher_forced_ones_or_in_rows_of_their_own() -> None:
    free = {
        "reliability": 1.0,
        "reliability_exact": 0.5,
        "reliability_prefix": 0.75,
        "steps": 12.25,
        "fluency": 5.5,
    }
    (single,) = tables([line(scores=free)])
    assert single.header[2:] == ("Rel", "Rel exact", "Rel prefix", "Steps", "fluency")
    assert single.rows[0][2:] == ("1.000", ".500", ".750", "12.2", "5.500")
    forced, rest = tables(
        [line(edits=t, scores=free) for t in (1, 10)]
        + [line("none", scores={"reliability_exact": 0.1})]
    )
    assert forced.header[2:] == ("T=1 Rel", "T=10 Rel")
    assert [row[:4] for row in rest.rows] == [
        ("baft", "1", "1", ".500"),
        ("baft", "10", "1", ".500"),
        ("unedited", "–", "1", ".100"),
    ]


def test_knowedit_shows_both_averaging_rules() -> None:
    scores = {
        "reliability": 1.0,
        "portability": 0.5,
        "portability_by_topic": 0.4,
        "locality": 0.9,
        "average": 0.8,
    }
    (table,) = tables([line(benchmark="wiki_recent", scores=scores)])
    assert table.header[2:] == ("Edit Succ", "Por", "Loc", "Avg", "Por by topic")
    assert "mean of Rel, Por, Loc" in table.note


@pytest.mark.parametrize(
    "other",
    [
        {"benchmark": "counterfact"},
        {"model": {"name": "tiny", "dtype": "float32", "fingerprint": "bad", "tokenizer": "70c"}},
        {"model": {"name": "tiny", "dtype": "float32", "fingerprint": "f00", "tokenizer": "bad"}},
        {"data": {"file": "zsre_edit.json", "sha256": "00", "rows": [0, 20]}},
        {"data": {"file": "zsre_edit.json", "sha256": "5a", "rows": [0, 19]}},
        {"protocol": {"template": "chat", "also": []}},
        {"unrelated": {"file": "none"}},
        {"batch_size": 5},
        {"schedule": {"name": "single", "edits": 1, "batch_size": 1, "when": "immediate"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_may_not_be_compared_stands_apart(other: dict[str, Any]) -> None:
    assert len(tables([line(rel=0.5), line("reft", rel=0.5, **other)])) == 2
    assert len(tables([line(rel=0.5), line("reft", rel=0.5)])) == 1


def test_a_smaller_T_on_fewer_of_the_first_rows_stands_beside_the_larger_one() -> None:
    def of_rows(edits: int, *span: int) -> ResultLine:
        data = {"file": "zsre_edit.json", "sha256": "5a", "rows": list(span)}
        return line(rel=edits / 10, edits=edits, data=data)

    (ladder,) = tables([of_rows(1, 0, 20), of_rows(5, 0, 50)])
    assert rows(ladder)["baft"]["T=1 Rel"] == ".100" and rows(ladder)["baft"]["T=5 Rel"] == ".500"
    assert "rows 0:20 at T=1, 0:50 at T=5" in ladder.note
    assert len(tables([of_rows(1, 0, 20), of_rows(5, 20, 50)])) == 2
    assert len(tables([of_rows(1, 0, 20), of_rows(5, 0, 50), of_rows(5, 0, 20)])) == 2


@pytest.mark.parametrize(
    "other",
    [
        {
            "model": {
                "name": "a/copy",
                "dtype": "float32",
                "fingerprint": "f00",
                "tokenizer": "70c",
                "device": "cuda",
            }
        },
        {"data": {"file": "copy.json", "sha256": "5a", "rows": [0, 20]}},
        {"protocol": {"template": "raw", "also": ["fluency"]}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_name_for_the_same_thing_keeps_nothing_apart(other: dict[str, Any]) -> None:
    assert len(tables([line(rel=0.5), line("reft", rel=0.5, **other)])) == 1


def test_a_model_that_is_not_edited_here_stands_in_every_table_of_its_question() -> None:
    fixed = [line("none", rel=0.2, unrelated={"file": "none"}), line("adapter", rel=0.9)]
    found = tables(
        [*fixed, line(rel=1.0), line(rel=1.0, batch_size=5), line(rel=1.0, benchmark="counterfact")]
    )
    labels = [list(rows(table)) for table in found]
    assert sorted(labels) == [
        ["baft"],
        ["unedited", "runs/mine", "baft"],
        ["unedited", "runs/mine", "baft"],
    ]
    (alone,) = tables(fixed)
    assert rows(alone)["unedited"]["Rel"] == ".200"


def test_other_settings_are_another_row_that_says_what_differs() -> None:
    other = BAFT | {"config": {"r": 4}, "descent": {"lr": 5e-4}}
    (table,) = tables([line(rel=0.2), line(rel=0.4, seed=1, settings=other), line("reft", rel=0.3)])
    assert list(rows(table)) == ["baft (r=12, lr=0.002)", "baft (r=4, lr=0.0005)", "reft"]
    assert rows(table)["baft (r=12, lr=0.002)"]["Rel"] == ".200"


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (5, 2)])
def test_a_descent_that_a_schedule_does_not_use_makes_no_difference(
    batch_size: int, count: int
) -> None:
    other = BAFT | {"batch_descent": {"lr": 9e-4}}
    lines = [
        line(rel=0.2, batch_size=batch_size),
        line(rel=0.4, seed=1, settings=other, batch_size=batch_size),
    ]
    assert len(tables(lines)[0].rows) == count


def test_missing_scores_are_dashes() -> None:
    lines = [
        line(rel=0.5),
        line("reft", scores={"reliability": 0.25, "locality": None, "average": float("nan")}),
        line("lora"),
    ]
    (table,) = tables(lines)
    assert rows(table)["reft"] == {
        "Method": "reft",
        "Seeds": "1",
        "Rel": ".250",
        "Gen": "–",
        "Loc": "–",
        "Avg": "–",
    }
    assert set(table.rows[2][2:]) == {"–"}
    assert tables([]) == [] and tables([line()])[0].header == ("Method", "Seeds")


def test_the_note_names_what_the_rows_share() -> None:
    (table,) = tables([line(edits=t, rel=0.5, batch_size=4) for t in (1, 3)])
    for shared in (
        "tiny",
        "f00",
        "float32",
        "zsre_edit.json",
        "5a",
        "0:20",
        "raw",
        "general",
        "after all edits",
        "batches of 4",
    ):
        assert shared in table.note
    # 5 blocks of 4 fill the rows, one of 12 does not
    assert "12 of 20 rows at T=3" in table.note and "T=1" not in table.note


def test_markdown_reads_as_plain_text() -> None:
    (table,) = tables([line(rel=0.5), line("a much longer name", rel=0.25)])
    title, grid, note = table.markdown().split("\n\n")
    assert title == "**zsre, tiny, single editing**" and max(map(len, note.split("\n"))) <= 120
    assert len({len(row) for row in grid.split("\n")}) == 1
    assert (
        len({tuple(i for i, sign in enumerate(row) if sign == "|") for row in grid.split("\n")})
        == 1
    )


HOSTILE = 'a|b,"c"\\|\nd'


def test_a_hostile_name_breaks_no_markdown() -> None:
    (table,) = tables([line(HOSTILE, rel=0.5)])
    row = table.markdown().split("\n\n")[1].split("\n")[2]
    unescaped = row.replace("\\\\", "").replace("\\|", "")
    assert (
        unescaped.count("|") == len(table.header) + 1
        and "c" in row
        and row.count("|") > unescaped.count("|")
    )


def test_csv_holds_every_cell() -> None:
    (table,) = tables([line(HOSTILE, rel=0.5), line(rel=0.25)])
    header, *cells = csv.reader(table.csv().splitlines(keepends=True))
    assert tuple(header) == table.header and tuple(map(tuple, cells)) == table.rows
    assert cells[0][0] == HOSTILE


def test_tables_of_files(tmp_path: Path) -> None:
    for name, rel in (("a.jsonl", 0.2), ("b.jsonl", 0.4)):
        (tmp_path / name).write_text(json.dumps(line(name[0], rel=rel).to_json()) + "\n")
    (table,) = tables(read_results([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    assert list(rows(table)) == ["a", "b"]


def test_tables_need_no_matplotlib_and_no_torch() -> None:
    for module in (
        peft_baft_bench.report.tables,
        sys.modules["peft_baft_bench.report.comparable"],
    ):
        tree = ast.parse(Path(module.__file__ or "").read_text())
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert names and not [
            name for name in names if name.split(".")[0] in ("matplotlib", "torch")
        ]


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_baft_bench.report.plots import draw_all

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-baft\[plot\]'"):
        draw_all([line(rel=0.5)], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


LADDER = [
    line(m, t, s, 1 / t + s / 10) for m in ("baft", "reft") for t in (2, 1, 4) for s in (0, 1)
]


def test_the_ladder_draws_the_means_and_their_bands() -> None:
    drawn = figure([*LADDER, line("none", rel=0.2)], "zsre-continual-scores")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [
        "Reliability",
        "Generality",
        "Locality",
        "Average",
    ]
    axes = drawn.axes[0]
    baft, reft, unedited = curves(axes).values()
    assert axes.get_xscale() == "log" and baft == reft == (
        [1, 2, 4],
        pytest.approx([1.05, 0.55, 0.3]),
    )
    assert unedited[1] == [0.2] * 3
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.3 - 0.005**0.5)  # sd of two values that are .1 apart
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [
        "baft",
        "reft",
        "unedited",
    ]


def test_the_router_s_rates_are_drawn_where_a_method_has_one() -> None:
    routed = [line(edits=t, rel=0.5) for t in (1, 2)]
    for number, one in enumerate(routed):
        one.scores.update(routed_recall=0.9 - number / 10, routed_locality=0.0)
    drawn = figure([*routed, *(line("reft", t, 0, 0.5) for t in (1, 2))], "zsre-continual-router")
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles == [
        "Rephrasings answered by their edit",
        "Unrelated questions answered by an edit",
    ]
    assert list(curves(drawn.axes[0]).values()) == [([1, 2], pytest.approx([0.9, 0.8]))]
    with pytest.raises(KeyError):  # the control: no line has a router
        figure(LADDER, "zsre-continual-router")


def test_one_seed_draws_no_band() -> None:
    assert (
        not figure([line(edits=t, rel=0.5) for t in (1, 2)], "zsre-continual-scores")
        .axes[0]
        .collections
    )


def test_the_tradeoff_draws_effect_against_locality() -> None:
    drawn = figure(LADDER, "zsre-continual-tradeoff")
    baft, *_ = (curve for curve in drawn.axes[0].get_lines() if len(curve.get_xdata()) == 3)
    assert list(baft.get_xdata()) == [0.75] * 3
    # Rel and rel / 2.
    assert list(baft.get_ydata()) == pytest.approx([1.05 * 0.75, 0.55 * 0.75, 0.3 * 0.75])
    assert drawn.axes[0].get_ylabel() == "(Reliability + Generality) / 2"


def test_knowedits_tradeoff_takes_portability() -> None:
    scores = {"reliability": 1.0, "portability": 0.5, "locality": 0.9}
    axes = figure(
        [line(benchmark="wiki_recent", scores=scores)], "wiki_recent-single-tradeoff"
    ).axes[0]
    assert axes.get_ylabel() == "(Reliability + Portability) / 2" and list(
        axes.get_lines()[0].get_ydata()
    ) == [0.75]


def test_half_an_effect_is_no_point_of_the_tradeoff() -> None:
    lines = [line(rel=0.5), line("reft", scores={"reliability": 1.0, "locality": 1.0})]
    axes = figure(lines, "zsre-single-tradeoff").axes[0]
    assert {place for curve in axes.get_lines() for place in curve.get_ydata()} == {0.375}


def test_bars_are_as_long_as_the_means() -> None:
    lines = [
        line("none", rel=0.2),
        line(rel=0.5),
        line(rel=0.7, seed=1),
        line("reft", scores={"locality": 0.5}),
    ]
    drawn = figure(lines, "zsre-single-scores")
    lengths = [[bar.get_width() for bar in axes.patches] for axes in drawn.axes]
    assert lengths == [
        [0.2, pytest.approx(0.6)],
        [0.1, pytest.approx(0.3)],
        [0.75, 0.75, 0.5],
        [0.35, pytest.approx(0.55)],
    ]
    assert [text.get_text() for text in drawn.axes[0].get_yticklabels()] == [
        "unedited",
        "baft",
        "reft",
    ]
    assert drawn.axes[0].yaxis_inverted()  # the first row on top


def test_redundancy_draws_a_curve_for_each_data_set() -> None:
    as_dict = {"0": 1.0, "2": 0.0, "1": 0.5, "10": 0.1} | {str(m): 0.0 for m in range(3, 10)}
    lines = [line("reft", kept=as_dict), line("reft", benchmark="wikibio", kept=[1.0, 0.75, 0.25])]
    lines += [
        line("reft", benchmark="wikibio", seed=1, kept=[0.5, 0.75, 0.25]),
        line("none", rel=0.2),
    ]
    axes = figure(lines, "redundancy").axes[0]
    zsre, wikibio = curves(axes).values()
    assert zsre == (list(range(11)), [1.0, 0.5, *[0.0] * 8, 0.1])
    assert wikibio == ([0, 1, 2], [0.75, 0.75, 0.25])
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["zsre", "wikibio"]


def test_redundancy_curves_of_one_data_set_say_what_differs() -> None:
    lines = [
        line("reft", kept=[1.0, 0.0]),
        line("baft", kept=[1.0, 0.5]),
        line("baft", edits=10, kept=[0.5, 0.0]),
    ]
    texts = [text.get_text() for text in figure(lines, "redundancy").legends[0].get_texts()]
    assert texts == [
        "zsre (method=reft, T=1)",
        "zsre (method=baft, T=1)",
        "zsre (method=baft, T=10)",
    ]


def test_gates_are_drawn_block_by_block_on_one_scale() -> None:
    gates = {
        "blocks": ["model.layers.3", "head"],
        "edit": [[0.1, 0.8], [0.3, 0.4]],
        "locality": [[0, 0], [0, 0.1]],
    }
    edit, unrelated, *_ = figure([line(gates=gates)], "zsre-single-gates").axes
    assert edit.images[0].get_array().tolist() == gates["edit"]
    assert unrelated.images[0].get_array().tolist() == gates["locality"]
    assert edit.images[0].get_clim() == unrelated.images[0].get_clim() == (0, 0.8)
    assert [text.get_text() for text in edit.get_yticklabels()] == ["3", "head"]


def test_a_method_looks_the_same_in_every_figure_and_like_no_other() -> None:
    methods = [f"m{i}" for i in range(12)]
    lines = [line(method, rel=0.5) for method in methods] + [
        line("m11", rel=0.5, edits=t, batch_size=2) for t in (1, 2)
    ]
    pytest.importorskip("matplotlib")
    from peft_baft_bench.report.plot_style import look

    looks = [look(i) for i in range(12)]
    assert (
        len({(each["color"], each["linestyle"]) for each in looks})
        == len({each["marker"] for each in looks})
        == 12
    )
    assert looks[11]["color"] in curves(figure(lines, "zsre-batched-scores").axes[0])


def test_every_kind_is_written_and_names_do_not_clash(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from peft_baft_bench.report.plots import draw_all

    gates = {"blocks": ["model.layers.3"], "edit": [[0.1, 0.8]]}
    lines = [line(edits=t, rel=0.5, kept=[1.0, 0.5], gates=gates) for t in (1, 2)]
    lines += [
        line("_$x_{$", rel=0.5, benchmark="facts"),
        line(rel=0.5, data={"file": "b", "sha256": "b", "rows": [0, 2]}),
    ]
    lines += [
        line("none", scores={"accuracy": 0.7}, benchmark="piqa"),
        line("lora", benchmark="convsent"),
    ]
    files = draw_all(lines, tmp_path / "figures")
    assert [file.name for file in files] == [
        "zsre-continual-scores.png",
        "zsre-continual-tradeoff.png",
        "zsre-continual-gates.png",
        "zsre-continual-gates-2.png",
        "facts-single-scores.png",
        "facts-single-tradeoff.png",
        "zsre-single-scores.png",
        "zsre-single-tradeoff.png",
        "piqa-none-scores.png",
        "redundancy.png",
    ]
    assert (
        all(file.read_bytes().startswith(b"\x89PNG") for file in files)
        and draw_all([], tmp_path) == []
    )


def test_a_summary_skips_lines_without_the_value() -> None:
    (group,) = group_comparable([line(rel=0.5), line(seed=1), line(seed=2, rel=0.75)])
    found = group.summarise("baft", 1, score("reliability"))
    assert found is not None and found.mean == mean((0.5, 0.75)) and found.seeds == 2
    assert group.summarise("baft", 1, score("fluency")) is None


# what is asked further

FRAMES = {"in_context": {"frames": ["quiz"], "sha256": "aa"}}
NEAR = {"neighbour": {"subject": 4, "relation": 2}}
FURTHER = {"in_context_contains": 0.9, "in_context_lowest": 0.8, "neighbour_subject_spared": 0.7}


def asking_further(scores: dict[str, float], **protocol: Any) -> ResultLine:
    return line(
        rel=0.5, seed=int(protocol.pop("seed", 0)), scores=scores, protocol=PROTOCOL | protocol
    )


PROTOCOL: dict[str, Any] = {"template": "raw", "also": []}


def test_contexts_and_neighbours_have_columns_where_they_were_asked() -> None:
    (table,) = tables([asking_further(FURTHER, probes=FRAMES | NEAR)])
    cells = rows(table)["baft"]
    assert cells["Ctx contains"] == ".900" and cells["Ctx lowest"] == ".800"
    assert cells["Nb spared"] == ".700" and "other subjects" in table.note
    (plain,) = tables([line(rel=0.5)])
    assert not [name for name in plain.header if name.startswith(("Ctx", "Nb"))]
    assert "other subjects" not in plain.note


def test_a_line_that_asks_nothing_further_stands_beside_one_that_does() -> None:
    older = line("none", rel=0.5)
    (table,) = tables([older, asking_further(FURTHER, probes=FRAMES)])
    assert rows(table)["unedited"]["Ctx contains"] == "–"
    assert rows(table)["unedited"]["Rel"] == ".500"


def test_lines_that_ask_the_same_kind_in_different_ways_are_not_averaged() -> None:
    other = {"in_context": FRAMES["in_context"] | {"sha256": "bb"}}
    first = asking_further({"in_context_contains": 0.9}, probes=FRAMES)
    second = asking_further({"in_context_contains": 0.1}, probes=other, seed=1)
    apart = tables([first, second])
    assert [rows(table)["baft"]["Ctx contains"] for table in apart] == [".900", ".100"]
    # The control: asked alike they are seeds of one row, whatever else only one of them asks.
    alike = asking_further({"in_context_contains": 0.1}, probes=FRAMES | NEAR, seed=1)
    (together,) = tables([first, alike])
    assert rows(together)["baft"]["Ctx contains"] == ".500 ±.566"
