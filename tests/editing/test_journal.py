"""What was edited is on record, and an interrupted run goes on as if it had never stopped."""

# mypy: disable-error-code="attr-defined, func-returns-value, union-attr"
from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import facts
from facts import DESCENT, OBJECTIVE, FactModel, adapted, edits, meals
from peft_baft import NARROW, BaftConfig, BaftEditor, DescentConfig, Edit, editor_for
from peft_baft.adapter.state import adapter_state_dict
from peft_baft.editing.continual import EditRecord, edit_continually
from peft_baft.editing.journal import (
    LINES,
    SNAPSHOTS,
    EditLine,
    ForgetLine,
    Journal,
    JournalState,
    Line,
    ReturnLine,
    RunLine,
)
from peft_baft.evaluation.guard import canary_check

fact_model = facts.fact_model
CAPITALS = facts.CAPITALS
FACTS = edits(0, 3, 7, 11, 5)
DAMAGED = "a damaged line or snapshot of a journal"


def editor_of(fact_model: FactModel, **config: Any) -> BaftEditor:
    return BaftEditor(
        adapted(fact_model.base, **config),
        fact_model.tokenizer,
        meals(0, 12),
        OBJECTIVE,
        DESCENT,
        scope=NARROW,
    )


def state(editor: BaftEditor) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for name, tensor in adapter_state_dict(editor.model, "default").items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(
    fact_model: FactModel, folder: Path, many: int | None = None, **settings: Any
) -> tuple[BaftEditor, list[EditRecord]]:
    """A fresh editor that makes the facts, or stops for good after `many`."""
    editor, made = editor_of(fact_model), []
    every = settings.pop("every", 1)
    turn = edit_continually(
        editor, settings.pop("facts", FACTS), journal=Journal(folder, every), **settings
    )
    for batch in turn:
        made.append(batch)
        if len(made) == many:
            turn.close()
            break
    return editor, made


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    fact_model, tmp_path: Path, every: int
) -> None:
    whole, made = run(fact_model, tmp_path / "whole", every=every)
    for stop in (1, 4):
        run(fact_model, tmp_path / f"{stop}", stop, every=every)
        torch.rand(3)  # whatever else the next process does
        resumed, again = run(fact_model, tmp_path / f"{stop}", resume=True, every=every)
        assert same(state(resumed), state(whole)) and resumed.unrelated_used == whole.unrelated_used
        assert [m.result.steps for m in again] == [m.result.steps for m in made]
        lines = Journal(tmp_path / f"{stop}").state().edits
        assert [line.edit for line in lines] == [1, 2, 3, 4, 5]
        assert [line.facts for line in lines] == [[[fact.prompt, fact.target]] for fact in FACTS]


def test_what_was_made_is_not_made_again(
    fact_model: FactModel, tmp_path: Path, monkeypatch
) -> None:
    run(fact_model, tmp_path, 3)
    real, made = BaftEditor.edit, []
    monkeypatch.setattr(
        BaftEditor, "edit", lambda self, batch: made.append(batch[0]) or real(self, batch)
    )
    run(fact_model, tmp_path, resume=True)
    assert made == FACTS[3:]


def test_more_facts_may_follow_but_none_may_change(fact_model: FactModel, tmp_path: Path) -> None:
    run(fact_model, tmp_path, facts=FACTS[:2])
    _, made = run(fact_model, tmp_path, facts=FACTS[:3], resume=True)
    assert len(made) == 3
    before = (tmp_path / LINES).read_bytes()
    with pytest.raises(ValueError, match="Edit 2 of the run to resume"):
        run(fact_model, tmp_path, facts=[FACTS[0], FACTS[4]], resume=True)
    editor = editor_of(fact_model)
    editor.descent = DescentConfig(lr=1e-3)
    with pytest.raises(ValueError, match="descent was"):
        list(edit_continually(editor, FACTS, journal=Journal(tmp_path), resume=True))
    assert (tmp_path / LINES).read_bytes().startswith(before)


def test_a_return_to_an_edit_gives_the_adapter_of_that_moment(
    fact_model: FactModel, tmp_path: Path
) -> None:
    editor, states = editor_of(fact_model), []
    states.append(state(editor))
    for _ in edit_continually(editor, FACTS, journal=Journal(tmp_path)):
        states.append(state(editor))
    editor.model.save_pretrained(str(tmp_path))
    for number in (4, 1, 0):
        Journal(tmp_path).roll_back(number)
        assert same(load_file(tmp_path / "adapter_model.safetensors"), states[number])
        assert [line.edit for line in Journal(tmp_path).state().edits] == list(range(1, number + 1))
    assert not same(states[0], states[1])
    with pytest.raises(ValueError, match="edits 1 to 0"):
        Journal(tmp_path).roll_back(1)


def test_numbers_go_on_after_a_return(fact_model: FactModel, tmp_path: Path) -> None:
    editor, _ = run(fact_model, tmp_path, facts=FACTS[:3])
    Journal(tmp_path).roll_back(2)
    list(edit_continually(editor, FACTS[3:], journal=Journal(tmp_path)))
    assert [line.edit for line in Journal(tmp_path).state().edits] == [1, 2, 3, 4]
    assert Journal(tmp_path).snapshots() == [0, 1, 2, 3, 4]


def test_two_cannot_write_one_journal(fact_model: FactModel, tmp_path: Path) -> None:
    turn = edit_continually(editor_of(fact_model), FACTS, journal=Journal(tmp_path))
    next(turn)
    with pytest.raises(ValueError, match="Another process"):
        run(fact_model, tmp_path)
    turn.close()
    run(fact_model, tmp_path, resume=True)


def test_a_line_that_was_cut_short_is_passed_over(
    fact_model: FactModel, tmp_path: Path, tally
) -> None:
    whole, _ = run(fact_model, tmp_path / "whole")
    for cut in (1, 40):
        folder = tmp_path / str(cut)
        run(fact_model, folder, 3)
        written = (folder / LINES).read_bytes()
        (folder / LINES).write_bytes(written[:-cut])
        assert len(Journal(folder).state().edits) == (3 if cut == 1 else 2)
        resumed, _ = run(fact_model, folder, resume=True)
        assert same(state(resumed), state(whole)) and len(Journal(folder).state().edits) == 5
    lines = written.split(b"\n")
    (folder / LINES).write_bytes(b"\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Journal(folder).state()
    tally(DAMAGED, repaired=2, refused=1)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_snapshot_is_named_and_the_one_before_it_serves(
    fact_model, tmp_path, damage: str, tally
) -> None:
    whole, _ = run(fact_model, tmp_path / "whole")
    folder = tmp_path / "damaged"
    run(fact_model, folder, 3)
    file = folder / SNAPSHOTS / "000003.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes({"flip": bytes(data), "cut": bytes(data[:-100]), "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"000003.safetensors is damaged.*Delete it"):
        run(fact_model, folder, resume=True)
    file.unlink()
    resumed, _ = run(fact_model, folder, resume=True)
    assert same(state(resumed), state(whole))
    tally(DAMAGED, refused=1)


@pytest.mark.parametrize(
    "kind", [OSError(28, "No space left on device"), PermissionError(13, "Read-only")]
)
def test_a_disk_that_takes_nothing_stops_the_run_and_spoils_nothing(
    fact_model, tmp_path, monkeypatch, kind, tally
):
    whole, _ = run(fact_model, tmp_path / "whole")
    run(fact_model, tmp_path / "full", 2)
    kept = {file: file.read_bytes() for file in (tmp_path / "full" / SNAPSHOTS).iterdir()}

    def refuse(_: int) -> None:
        raise kind

    with monkeypatch.context() as patch, pytest.raises(OSError, match=kind.strerror):
        patch.setattr(os, "fsync", refuse)
        run(fact_model, tmp_path / "full", resume=True)
    assert all(file.read_bytes() == data for file, data in kept.items())
    resumed, _ = run(fact_model, tmp_path / "full", resume=True)
    assert same(state(resumed), state(whole))
    tally("a disk that is full or read-only during a run, then --resume", stopped=1)


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(),
    reason="reads from /proc what is written through to the disk",
)
def test_a_new_name_is_on_the_disk_before_the_journal_goes_on(
    fact_model, tmp_path: Path, monkeypatch
) -> None:
    said: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(opened: int) -> None:
        said.append(f"sync {os.readlink(f'/proc/self/fd/{opened}').rpartition('/')[2]}")
        real_sync(opened)

    def replace(old: Path, new: Path) -> None:
        said.append(f"name {new.name}")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    run(fact_model, tmp_path, facts=FACTS[:1])
    kept = [
        [f"sync {n}.safetensors.new", f"name {n}.safetensors", f"sync {SNAPSHOTS}"]
        for n in ("000000", "000001")
    ]
    assert said == [*kept[0], f"sync {LINES}", f"sync {tmp_path.name}", f"sync {LINES}", *kept[1]]


# guard rails


UNLEARNABLE = DescentConfig(lr=1e-9, max_steps=1)


@pytest.mark.parametrize("keep_only_good", [False, True])
def test_an_edit_that_does_harm_is_told_and_taken_back_if_wanted(
    fact_model, tmp_path, keep_only_good: bool
) -> None:
    editor, answers = editor_of(fact_model), iter([None, "harm", None, None, None])
    expected = editor_of(fact_model)
    list(
        expected.edit_in_turn(
            [fact for i, fact in enumerate(FACTS) if i != 1 or not keep_only_good]
        )
    )
    made = list(
        edit_continually(
            editor,
            FACTS,
            journal=Journal(tmp_path),
            check=lambda: next(answers),
            keep_only_good=keep_only_good,
        )
    )
    assert [m.problem for m in made] == [None, "harm", None, None, None]
    assert [m.kept for m in made] == [True, not keep_only_good, True, True, True]
    assert same(state(editor), state(expected)) and editor.unrelated_used == expected.unrelated_used
    assert [line.kept for line in Journal(tmp_path).state().edits] == [m.kept for m in made]


def test_an_edit_that_did_not_take_or_broke_off_is_left_out(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    before = state(editor)
    for descent, problem in (
        (UNLEARNABLE, "not learned"),
        (DescentConfig(lr=1e30, stop_loss=0.0), "became"),
    ):
        editor.descent = descent
        made = list(edit_continually(editor, FACTS[:2], keep_only_good=True))
        assert all(problem in m.problem and not m.kept for m in made) and same(
            state(editor), before
        )
    with pytest.raises(FloatingPointError):
        list(edit_continually(editor, FACTS[:1]))
    editor.descent = DESCENT
    assert [m.problem for m in edit_continually(editor, FACTS[:1], keep_only_good=True)] == [None]


def test_canaries_notice_what_an_edit_changed(fact_model: FactModel) -> None:
    model = adapted(fact_model.base, weighting="none")
    check = canary_check(model, fact_model.tokenizer, 0.9, meals(0, 12))
    assert check() is None
    BaftEditor(
        model,
        fact_model.tokenizer,
        (),
        OBJECTIVE,
        DescentConfig(lr=0.05, stop_loss=0.0),
        scope=NARROW,
    ).edit(FACTS[:1])
    assert "agree with the unedited model in 0." in check()
    with pytest.raises(ValueError, match="needs canaries"):
        canary_check(model, fact_model.tokenizer, 0.9, ())


# power cuts


def many_edits(fact_model: FactModel, folder: Path, count: int, memory: bool) -> None:
    """As many short edits as are missing, in a process of their own."""
    torch.set_num_threads(1)
    told = [CAPITALS[i % 24] for i in range(count)]
    facts_of = [
        Edit(f"{f.prompt} {'now ' * (i // 24)}", CAPITALS[(i + 8) % 24].answer)
        for i, f in enumerate(told)
    ]
    quick = DescentConfig(lr=1e-3, max_steps=1)
    base, tokenizer = fact_model.base, fact_model.tokenizer
    editor: Any
    if memory:
        settings = BaftConfig(memory={"key_dimensions": 16}, task_type="CAUSAL_LM")
        editor = editor_for(get_peft_model(base, settings), tokenizer)
    else:
        editor = BaftEditor(adapted(base), tokenizer, meals(0, 12), OBJECTIVE, quick, scope=NARROW)
    for _ in edit_continually(editor, facts_of, journal=Journal(folder, 3), resume=True):
        pass
    editor.model.save_pretrained(str(folder))


def begun(fact_model: FactModel, folder: Path, count: int, memory: bool) -> Any:
    process = multiprocessing.get_context("fork").Process(
        target=many_edits, args=(fact_model, folder, count, memory)
    )
    process.start()
    return process


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="processes that begin at once, since there are many"
)
@pytest.mark.parametrize(
    ("count", "kills", "memory"),
    [
        (40, 5, False),
        (40, 5, True),
        pytest.param(200, 50, False, marks=pytest.mark.slow),
        pytest.param(200, 50, True, marks=pytest.mark.slow),
    ],
)
def test_kills_lose_and_double_no_edit(
    fact_model: FactModel,
    tmp_path: Path,
    count: int,
    kills: int,
    memory: bool,
    tally: Any,
) -> None:
    if memory:
        pytest.importorskip("peft_baft.memory")
    whole, cut, generator, begin = (
        tmp_path / "whole",
        tmp_path / "cut",
        random.Random(0),
        time.time(),
    )
    begun(fact_model, whole, count, memory).join()
    took, on_record = time.time() - begin, []
    for number in range(kills):
        process = begun(fact_model, cut, count, memory)
        while process.exitcode is None and len(Journal(cut).state().edits) < (
            number + 1
        ) * count // (kills + 2):
            time.sleep(0.001)
        time.sleep(generator.random() * took / count)  # to the middle of whatever
        assert process.exitcode is None  # it was killed at work
        process.kill()
        process.join()
        on_record.append(len(Journal(cut).state().edits))
    assert 0 < max(on_record) < count
    begun(fact_model, cut, count, memory).join()
    lines = Journal(cut).state().edits
    assert [line.edit for line in lines] == list(range(1, count + 1))  # none lost, none doubled
    assert [line.facts for line in lines] == [line.facts for line in Journal(whole).state().edits]
    files = [folder / "adapter_model.safetensors" for folder in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = [line.edit for line in lines]
    counts = {"lost": count - len(set(found)), "doubled": len(found) - len(set(found))}
    tally(
        f"SIGKILL during `baft edit`'s loop{', of a memory' * memory}, then --resume",
        kills=len(on_record),
        edits=count,
        **counts,
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc"
)
def test_a_thousand_edits_need_no_more_memory_than_a_hundred(
    fact_model, tmp_path: Path, tally
) -> None:
    quick = DescentConfig(lr=1e-3, max_steps=1)
    editor = BaftEditor(
        adapted(fact_model.base), fact_model.tokenizer, meals(0, 12), OBJECTIVE, quick, scope=NARROW
    )
    facts_of = [
        Edit(f"{CAPITALS[i % 24].prompt} {'now ' * (i % 5)}", CAPITALS[i % 7].answer)
        for i in range(1000)
    ]
    resident = []
    for _ in edit_continually(editor, facts_of, journal=Journal(tmp_path, 100)):
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert resident[-1] <= 1.05 * resident[100]
    growth = f"{resident[-1] / resident[100] - 1:.1%}"
    tally(
        "1000 edits in one process: memory after the last against after the hundredth",
        edits=1000,
        grown=growth,
    )


def test_replaying_a_journal_gives_runs_edits_and_forgettings(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def edit(number: int) -> EditLine:
        return EditLine(number, [["Q", "A"]], 1, 0.0, 0.0, True, None, True)

    first, second = RunLine(0, {"run": 1}), RunLine(2, {"run": 2})
    assert journal.state() == JournalState((), (), (), {}) and journal.state().last_number == 0
    forget = {number: ForgetLine(number, "now") for number in (1, 3)}
    lines: list[Line] = [
        edit(1),
        first,
        edit(2),
        edit(3),
        forget[1],
        forget[3],
        ReturnLine(2),
        second,
        edit(3),
    ]
    for line in lines:
        journal.add(line)
    state = journal.state()
    assert state.runs == (first, second) and state.last_number == 3
    assert [line.edit for line in state.edits] == [1, 2, 3]
    assert state.edit_runs == (None, first, second)
    assert state.forgotten == {1: forget[1]}  # the other was of an edit that was rolled back
