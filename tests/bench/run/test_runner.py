"""The judge on a toy model that knows facts: any method, any schedule, and no result twice."""

# mypy: disable-error-code="attr-defined, func-returns-value"
from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import facts
from facts import ADAPTER, CAPITALS, DESCENT, MEALS, OBJECTIVE, FactModel, meals
from peft_baft import Case, Edit, Probe
from peft_baft.data.templates import CHAT, RAW
from peft_baft.editing.editor import EditResult
from peft_baft.editing.lanes import LaneBatch
from peft_baft.editing.presets import PRESETS
from peft_baft.evaluation.frames import RAW_FRAMES
from peft_baft.storage import append_line
from peft_baft_bench.methods.adapters import AdapterMethod
from peft_baft_bench.methods.methods import Method, parse_method, parse_methods
from peft_baft_bench.questions import asking, probing
from peft_baft_bench.questions.asking import UneditedReplies, ask, data_questions
from peft_baft_bench.questions.probing import Probing
from peft_baft_bench.run import plan, runner
from peft_baft_bench.run.progress import Progress
from peft_baft_bench.run.results import ResultLine, RunHead, describe_model, read_results
from peft_baft_bench.run.runner import Runner
from peft_baft_bench.run.schedule import Schedule

fact_model = facts.fact_model
AVERAGED = ("reliability", "generality", "locality")


def cases(count: int) -> list[Case]:
    """Countries that move their capital, with a rephrasing and a fact about food."""
    found = []
    for n in range(count):
        old, new, food = CAPITALS[n % 24], CAPITALS[(n + 8) % 24].answer, MEALS[12 + n % 12]
        near = Probe("generality", old.rephrase, new), Probe("locality", food.prompt, food.answer)
        found.append(Case(Edit(old.prompt, new), near))
    return found


def toy_method(name: str = "baft", **changes: Any) -> Method:
    config = ADAPTER | ({"weighting": "none"} if name == "reft" else {})
    settings = AdapterMethod(
        config=config, descent=DESCENT, batch_descent=DESCENT, objective=OBJECTIVE
    )
    return Method(name, replace(settings, **changes))


@pytest.fixture
def bench(fact_model: FactModel) -> Runner:
    return Runner(deepcopy(fact_model.base), fact_model.tokenizer, cases(12), 0, 12, meals(0, 12))


COMMON: dict[str, Any] = {
    "benchmark": "facts",
    "model": {},
    "data": {},
    "protocol": {},
    "versions": {},
}


def head(schedule: Schedule, seed: int = 0) -> RunHead:
    """How a run is made, as far as it matters here."""
    return RunHead(**COMMON, method="m", settings={}, schedule=schedule.describe(), seed=seed)


def judged(
    bench: Runner, method: Method | None, schedule: Schedule, progress: Progress | None = None
) -> ResultLine:
    if method is None:
        return plan.result_line(head(schedule), bench.ask_model(bench.base), AVERAGED, "")
    return plan.result_line(
        head(schedule),
        bench.edit_and_ask(method, schedule, 0, progress or Progress(None)),
        AVERAGED,
        "",
    )


def without_seconds(line: ResultLine) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in case.items() if key not in ("seconds", "peak_bytes")}
        for case in line.cases
    ]


# what is measured


def test_the_unedited_model_knows_the_old_facts_and_keeps_its_locality(bench: Runner) -> None:
    found = judged(bench, None, Schedule()).scores
    assert found["locality"] == found["locality_text"] == 1
    assert found["reliability"] < 0.2 and found["reliability_exact"] == 0


def test_single_edits_are_learned_and_taken_back(bench: Runner) -> None:
    before = {name: tensor.clone() for name, tensor in bench.base.state_dict().items()}
    line = judged(replace(bench, last=4), toy_method(), Schedule())
    assert line.scores["reliability"] == 1 and line.scores["locality"] >= 0.75
    assert line.scores["reliability_prefix"] > 0.9
    assert [case["block"] for case in line.cases] == list(range(4)) and line.blocks is None
    after = bench.base.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


@pytest.mark.parametrize("name", ["baft", "reft"])
def test_single_edits_that_share_forwards_give_what_each_gives_alone(
    bench: Runner, name: str
) -> None:
    bench = replace(bench, last=5)
    alone = judged(replace(bench, parallel=1), toy_method(name), Schedule())
    assert without_seconds(
        judged(replace(bench, parallel=3), toy_method(name), Schedule())
    ) == without_seconds(alone)


def test_asking_after_all_edits_is_harder_than_right_after_each(bench: Runner) -> None:
    bench = replace(bench, last=8)
    after_all = judged(bench, toy_method("reft"), Schedule(4))
    immediate = judged(bench, toy_method("reft"), Schedule(4, when="immediate"))
    assert immediate.scores["reliability"] > after_all.scores["reliability"]
    assert [block["first"] for block in after_all.blocks or ()] == [0, 4]
    assert [case["steps"] for case in after_all.cases] == [
        case["steps"] for case in immediate.cases
    ]


def test_blocks_start_anew(bench: Runner) -> None:
    both = judged(replace(bench, last=4), toy_method(), Schedule(2))
    alone = judged(replace(bench, first=2, last=4), toy_method(), Schedule(2))
    assert [case | {"block": 1} for case in without_seconds(alone)] == without_seconds(both)[2:]


def test_a_batch_is_one_edit(bench: Runner) -> None:
    line = judged(replace(bench, last=6), toy_method(), Schedule(1, batch_size=3))
    assert [case["block"] for case in line.cases] == [0, 0, 0, 1, 1, 1]
    assert [case["steps"] for case in line.cases][:3] == [line.cases[0]["steps"]] * 3
    assert line.scores["reliability"] == 1


@pytest.mark.parametrize("name", facts.LEARNING)
def test_every_method_edits(bench: Runner, name: str) -> None:
    made = parse_method(facts.quick(name), PRESETS["plain"])
    # Two facts that also hold where the toy model's other tokens are moved with the subject's.
    numbers = (0, 4)
    named = [
        replace(bench.cases[number], edit=edit)
        for number, edit in zip(numbers, facts.edits_with_subjects(*numbers), strict=True)
    ]
    short = Runner(bench.base, bench.tokenizer, named, 0, 2, bench.unrelated)
    assert judged(short, made, Schedule()).scores["reliability"] == 1


def test_an_edit_that_diverges_is_counted_as_not_learned(bench: Runner, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise FloatingPointError("became nan")

    monkeypatch.setattr("peft_baft.editing.baft.BaftEditor.edit", broken)
    line = judged(bench, toy_method(), Schedule(2))
    assert line.scores["learned"] == 0 and line.cases[0]["failed"] == "became nan"


def test_someone_elses_adapter_is_judged_against_the_model_without_it(bench: Runner) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        bench.base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    found = plan.result_line(
        head(Schedule()), bench.ask_model(model, model.disable_adapter), AVERAGED, ""
    )
    assert found.scores["locality"] < 0.9  # random weights do harm, and that is seen
    model.unload()
    assert judged(bench, None, Schedule()).scores["locality"] == 1


def test_the_chat_template_is_for_every_question_locality_included(bench: Runner) -> None:
    tokenizer = deepcopy(bench.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        + MEALS[0].prompt
        + "{% else %} {{ m['content'] }}{% endif %}{% endfor %}"
    )
    questions = data_questions(0, bench.cases[0])
    raw, chat = (ask(bench.base, tokenizer, questions, template) for template in (RAW, CHAT))
    assert len({reply.text for reply in chat}) == 1  # the template asks the same, whatever is asked
    assert [a.text == b.text for a, b in zip(raw, chat, strict=True)] == [False, False, False]


def test_a_run_in_the_chat_template_teaches_and_asks_in_it(bench: Runner) -> None:
    tokenizer = deepcopy(bench.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s> {{ m['content'] }}"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    seen: list[str] = []
    settings = parse_method("baft", PRESETS["plain"], {"learn_end": True, "max_steps": 1})
    chat = replace(bench, tokenizer=tokenizer, template=CHAT, first=0, last=1)
    with pytest.MonkeyPatch.context() as patch:
        look = LaneBatch.__init__

        def remember(batch: Any, lanes: Any, *args: Any, **kwargs: Any) -> None:
            seen.extend(str(tokenizer.decode(list(row.ids))) for lane in lanes for row in lane.rows)
            look(batch, lanes, *args, **kwargs)

        patch.setattr(LaneBatch, "__init__", remember)
        judged(chat, settings, Schedule())
        raw = replace(chat, template=RAW)
        judged(raw, settings, Schedule())
    edit, text = bench.cases[0].edit, bench.unrelated[0]
    assert seen == [
        f"<s> {edit.prompt} {edit.target}</s>",
        f"<s> {text.prompt} {text.answer}",
        f"{edit.prompt} {edit.target}\n",  # the control: the same in raw text
        f"{text.prompt} {text.answer}",
    ]


def test_the_unedited_model_is_asked_once(bench: Runner, monkeypatch) -> None:
    known, questions = UneditedReplies(bench.tokenizer), data_questions(0, bench.cases[0])
    known.ask(bench.base, questions)
    monkeypatch.setattr(
        "peft_baft_bench.questions.asking.predicted_in_rows", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        known.ask(bench.base, data_questions(1, bench.cases[1]))


def test_what_several_rows_ask_alike_is_asked_once(bench: Runner, monkeypatch) -> None:
    questions = [
        question for row in (0, 1, 0) for question in data_questions(row, bench.cases[row])
    ]
    each = [ask(bench.base, bench.tokenizer, [question])[0] for question in questions]
    asked: list[int] = []
    real = asking.predicted_in_rows
    monkeypatch.setattr(
        asking,
        "predicted_in_rows",
        lambda m, t, rows, **more: asked.append(len(rows)) or real(m, t, rows, **more),
    )
    together = ask(bench.base, bench.tokenizer, questions)
    assert sum(asked) == 6 and [reply.text for reply in together] == [reply.text for reply in each]
    assert all(torch.equal(a.predicted, b.predicted) for a, b in zip(together, each, strict=True))


def test_text_that_is_asked_is_not_trained_on(bench: Runner) -> None:
    with pytest.raises(ValueError, match="which the benchmark asks"):
        Runner(bench.base, bench.tokenizer, bench.cases, 0, 12, meals(12, 14))
    with pytest.raises(ValueError, match="must lie within 0:12"):
        Runner(bench.base, bench.tokenizer, bench.cases, 0, 13)


# methods by name


def test_settings_find_their_place() -> None:
    made = parse_method("baft:lr=0.001;r=4;gamma=0.5;gate_norm=none", PRESETS["plain"]).settings
    assert made.descent.lr == made.batch_descent.lr == 0.001
    assert (
        made.config["r"] == 4 and made.config["gate_norm"] == "none" and made.objective.gamma == 0.5
    )  # type: ignore[union-attr]
    assert made.describe()["config"]["weighting"] == "basis"
    assert [m and m.name for m in parse_methods("none,table4,baft", PRESETS["plain"])] == [
        None,
        "reft",
        "ss-w",
        "ba-w",
        "ss-w-lr",
        "baft",
    ]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("rule", "Unknown method 'rule'"),
        ("baft:lr", "name=value"),
        ("baft:rank=3", "unknown setting 'rank'"),
        ("lora:alpha=1", "unknown"),
    ],
)
def test_an_unknown_method_or_setting_is_named(given: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_methods(given, PRESETS["plain"])


# result lines


def common_of(fact_model: FactModel) -> dict[str, Any]:
    return COMMON | {"model": describe_model("toy", *fact_model)}


def test_runs_are_named_before_they_are_made_and_made_once(
    fact_model: FactModel, tmp_path: Path
) -> None:
    common, ladder = common_of(fact_model), [Schedule(1), Schedule(2)]
    runs = plan.plan_runs(common, [None, toy_method()], ladder, range(3))
    # The unedited model once.
    assert len(runs) == 1 + 2 * 3 and len({run.head.key for run in runs}) == 7
    line = plan.result_line(runs[2].head, [], (), "baft bench")
    append_line(tmp_path / "r.jsonl", line.to_json())
    assert line.key == runs[2].head.key
    lines, left = plan.split_off_finished(runs, tmp_path / "r.jsonl")
    assert lines == [line] and [run.head.key for run in left] == [
        run.head.key for run in runs if run is not runs[2]
    ]


def test_a_torn_last_line_is_cut_off_and_not_built_upon(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    first, second = (plan.result_line(head(Schedule(), seed), [], (), "") for seed in (1, 2))
    append_line(file, first.to_json())
    file.write_bytes(file.read_bytes() + b'{"format": 1, "n": ')
    assert plan.split_off_finished([], file) == ([], [])
    append_line(file, second.to_json())
    assert read_results([file]) == [first, second]
    file.write_text('{"some": "json"}\n')
    with pytest.raises(ValueError, match=r"r.jsonl:1: expected a result line"):
        read_results([file])
    file.write_text(json.dumps({**first.to_json(), "colour": "red"}) + "\n")
    with pytest.raises(ValueError, match=r"r.jsonl:1: its fields are not those .*colour"):
        read_results([file])


def test_a_model_is_known_by_its_weights_and_not_by_its_name(fact_model: FactModel) -> None:
    other = deepcopy(fact_model.base)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    mine, changed = (
        describe_model("toy", m, fact_model.tokenizer) for m in (fact_model.base, other)
    )
    assert (
        mine["fingerprint"] != changed["fingerprint"] and mine["tokenizer"] == changed["tokenizer"]
    )
    assert mine == describe_model("toy", deepcopy(fact_model.base), fact_model.tokenizer)


# being killed


def killed_at_random(make: Any, file: Path, kills: int) -> Iterator[int]:
    """Run `make` in a process of its own; kill -9 it after it has written some more; yields the number of edits kept."""
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            make()
            os._exit(0)
        kept, deadline = len(outcomes(file)), time.monotonic() + 60
        while len(outcomes(file)) < kept + 1 + kill and time.monotonic() < deadline:
            time.sleep(0.003)
        time.sleep(0.007 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        yield len(outcomes(file))


def outcomes(file: Path) -> list[dict[str, Any]]:
    done = Progress.load(file)
    return done.cases + done.outcomes


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_that_is_killed_goes_on_where_it_was_and_repeats_no_edit(
    bench: Runner, tmp_path: Path
) -> None:
    schedule, file, log = (
        Schedule(4, when="immediate"),
        tmp_path / "p.safetensors",
        tmp_path / "log",
    )

    def tick(rows: int) -> None:
        with log.open("a") as out:
            print(rows, file=out)

    bench = replace(bench, last=8, tick=tick)
    whole = judged(bench, toy_method(), schedule)
    log.unlink()
    kept = list(
        killed_at_random(
            lambda: judged(bench, toy_method(), schedule, Progress.load(file)), file, kills=3
        )
    )
    assert all(a < b for a, b in pairwise([0, *kept])) and kept[-1] < 8
    # A process first ticks for all that was done before it.
    made = log.read_text().split().count("1") - kept.count(1)
    resumed = judged(bench, toy_method(), schedule, Progress.load(file))
    assert without_seconds(resumed) == without_seconds(whole)
    # An edit that is being made when the process is killed has not taken place.
    assert made <= kept[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_thousand_edits_survive_many_kills(bench: Runner, tmp_path: Path, tally) -> None:
    schedule, file = Schedule(1000), tmp_path / "p.safetensors"
    quick = toy_method(descent=replace(DESCENT, max_steps=2))
    bench = replace(bench, cases=cases(1000), last=1000)
    whole = judged(bench, quick, schedule)
    kept = list(
        killed_at_random(
            lambda: judged(bench, quick, schedule, Progress.load(file)), file, kills=12
        )
    )
    assert all(a < b for a, b in pairwise([0, *kept]))
    resumed = judged(bench, quick, schedule, Progress.load(file))
    assert without_seconds(resumed) == without_seconds(whole)
    rows = [case["row"] for case in resumed.cases]
    counts = {
        "kills": len(kept),
        "edits": 1000,
        "lost": 1000 - len(set(rows)),
        "doubled": len(rows) - len(set(rows)),
    }
    tally("SIGKILL during `baft bench`'s loop, then the same command again", **counts)


def test_a_run_that_lost_its_adapter_would_not_give_the_same(
    bench: Runner, tmp_path: Path, monkeypatch
) -> None:
    file, schedule = tmp_path / "p.safetensors", Schedule(4)
    bench = replace(bench, last=4)
    whole = judged(bench, toy_method(), schedule)

    def stop(_: int) -> None:
        if len(outcomes(file)) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(replace(bench, tick=stop), toy_method(), schedule, Progress.load(file))
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "restore", lambda *_: None)
        lost = judged(bench, toy_method(), schedule, replace(Progress.load(file), file=None))
    good = judged(bench, toy_method(), schedule, Progress.load(file))
    assert without_seconds(good) == without_seconds(whole) != without_seconds(lost)


def test_damaged_progress_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    for damage in (b"", b"nonsense", json.dumps({}).encode()):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"is damaged .* Delete it"):
            Progress.load(file)


# asked further: contexts and neighbours


def with_subjects(bench: Runner) -> Runner:
    """The rows with their countries as subjects, and the capitals that the model knows as old answers."""
    known = [
        replace(
            case,
            edit=replace(case.edit, subject=facts.COUNTRIES[row]),
            old_answer=CAPITALS[row].answer,
        )
        for row, case in enumerate(bench.cases)
    ]
    further = Probing.for_kinds(("in_context", "neighbour"), known, bench.tokenizer)
    return replace(bench, cases=known, probing=further, last=4)


def test_the_unedited_model_spares_its_neighbours_and_says_the_old_answers(bench: Runner) -> None:
    line = judged(with_subjects(bench), None, Schedule())
    found = line.scores
    assert found["neighbour_subject"] == found["neighbour_subject_unchanged"] == 1
    assert found["neighbour_subject_spared"] == 1
    assert found["reliability_contains"] == 0
    kinds = [(probe["kind"], probe["topic"]) for probe in line.cases[0]["probes"]]
    assert kinds.count(("neighbour", "subject")) == 4
    assert [topic for kind, topic in kinds if kind == "in_context"] == list(RAW_FRAMES)


def test_an_edit_that_moves_its_neighbours_is_seen(bench: Runner) -> None:
    asked = with_subjects(bench)
    # Without gates the edit of one country says its new capital of them all.
    moved = judged(asked, toy_method("reft"), Schedule()).scores
    assert moved["reliability_contains"] == 1
    assert moved["neighbour_subject_spared"] < 0.5
    assert moved["neighbour_subject_unchanged"] < 0.5
    spared = judged(asked, toy_method("baft"), Schedule()).scores
    assert spared["reliability_contains"] == 1
    assert spared["neighbour_subject_spared"] > moved["neighbour_subject_spared"]


def test_contexts_are_put_around_the_edit(bench: Runner, monkeypatch) -> None:
    asked = with_subjects(bench)
    inside = judged(asked, toy_method("reft"), Schedule()).scores
    assert inside["in_context_lowest"] <= inside["in_context_contains"] <= 1
    # The control: frames that are not applied ask for the edit itself.
    monkeypatch.setattr(probing, "framed", lambda prompt, _, names: dict.fromkeys(names, prompt))
    bare = judged(asked, toy_method("reft"), Schedule()).scores
    assert bare["in_context"] == bare["in_context_contains"] == 1


def test_further_questions_change_no_score_of_the_others(bench: Runner) -> None:
    asked = with_subjects(bench)
    more = judged(asked, toy_method(), Schedule()).scores
    fewer = judged(replace(asked, probing=None), toy_method(), Schedule()).scores
    timed = {"edit_seconds", "peak_bytes"}
    assert set(fewer) < set(more)
    assert {name: more[name] for name in set(fewer) - timed} == {
        name: fewer[name] for name in set(fewer) - timed
    }


def test_a_block_tells_what_its_edits_take_and_what_is_asked_after_the_last(bench: Runner) -> None:
    asked = replace(bench, after_block=lambda model, _: {"answered": float(model is not None)})
    line = judged(asked, toy_method(), Schedule(edits=3))
    # Four blocks of an adapter of one size; r 4, d 64, gates and offsets on 4 blocks: R, A and W of (4, 64), b, and gate biases.
    assert {case["stored_bytes"] for case in line.cases} == {line.scores["stored_bytes"]}
    assert 4 * 4 * (3 * 4 * 64) <= line.scores["stored_bytes"] <= 4 * 4 * (3 * 4 * 64 + 4 * 4)
    assert line.scores["peak_bytes"] > line.scores["stored_bytes"]
    assert [case.get("answered") for case in line.cases] == [None, None, 1.0] * 4
    assert line.scores["answered"] == 1.0


def test_independent_edits_are_made_together_and_come_out_as_in_turn(
    bench: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    MemoryEditor = pytest.importorskip("peft_baft.memory").MemoryEditor
    memory = parse_method(facts.quick("memory"), PRESETS["plain"])
    sizes: list[int] = []
    edit_independently = MemoryEditor.edit_independently

    def counted(editor: Any, edits: list[Edit]) -> list[EditResult]:
        sizes.append(len(edits))
        return edit_independently(editor, edits)

    monkeypatch.setattr(MemoryEditor, "edit_independently", counted)
    together = judged(bench, memory, Schedule(edits=6))
    assert sizes == [6, 6]
    monkeypatch.setattr(runner, "EDITS_PER_GROUP", 1)
    in_turn = judged(bench, memory, Schedule(edits=6))
    assert sizes[2:] == [1] * 12
    reliability = in_turn.scores["reliability"]
    assert together.scores["reliability"] == reliability == 1.0
    sizes.clear()

    def broken(editor: Any, edits: list[Edit]) -> list[EditResult]:
        if len(edits) > 1:
            raise FloatingPointError("became nan")
        return counted(editor, edits)

    # Where one diverges they are made one by one: it must not take the others with it.
    monkeypatch.setattr(runner, "EDITS_PER_GROUP", 64)
    monkeypatch.setattr(MemoryEditor, "edit_independently", broken)
    again = judged(bench, memory, Schedule(edits=6))
    assert again.scores["reliability"] == reliability
    assert sizes == [1] * 12


def test_more_edits_in_a_codebook_take_more_bytes(bench: Runner) -> None:
    grace = parse_method(facts.quick("grace"), PRESETS["plain"])
    few, many = (
        judged(bench, grace, Schedule(edits=edits)).scores["stored_bytes"] for edits in (2, 6)
    )
    assert 2.5 * few < many < 3.5 * few


def test_side_by_side_and_alone_neighbours_are_judged_alike(bench: Runner) -> None:
    asked = with_subjects(bench)
    together, alone = (
        judged(replace(asked, parallel=count), toy_method(), Schedule()).cases for count in (4, 1)
    )

    def further(case: dict[str, Any]) -> list[dict[str, Any]]:
        return [p for p in case["probes"] if p["kind"] in ("in_context", "neighbour")]

    assert [further(case) for case in together] == [further(case) for case in alone]
    answers = {probe["before"] for case in alone for probe in further(case) if "before" in probe}
    assert len(answers) > 4  # the control: they are different questions


def test_what_a_block_teaches_is_no_neighbour_in_it(bench: Runner) -> None:
    asked = with_subjects(bench)
    counts = []
    for schedule in (Schedule(), Schedule(4)):
        cases_of_run = judged(asked, toy_method(), schedule).cases
        near = [p["asked"] for p in cases_of_run[0]["probes"] if p["kind"] == "neighbour"]
        taught = {asked.cases[row].edit.prompt for row in range(4)}
        counts.append((len(near), len(taught & set(near))))
    assert counts == [(4, 3), (1, 0)]


def test_questions_in_another_form_than_the_runners_are_refused(bench: Runner) -> None:
    with pytest.raises(ValueError, match="uses the template chat, but its probing uses raw"):
        replace(with_subjects(bench), template=CHAT)
