"""What each of several processes does in a test: `torchrun process_worker.py FOLDER CASE...` leaves what it found in
FOLDER/CASE.RANK.pt. The same functions, given `Processes()`, are the one-process runs that tests compare with."""

# mypy: disable-error-code="arg-type, assignment, method-assign, union-attr"
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peft_baft_cli as cli
from facts import ADAPTER, CAPITALS, DESCENT, MEALS, OBJECTIVE, FactModel, adapted, edits, meals
from peft_baft import (
    NARROW,
    AdapterEditor,
    BaftEditor,
    Case,
    DescentConfig,
    Edit,
    Journal,
    Probe,
    Scope,
    load_model,
)
from peft_baft.adapter.state import adapter_tensors
from peft_baft.editing import continual
from peft_baft.processes import Processes
from peft_baft_bench.methods.adapters import AdapterMethod
from peft_baft_bench.methods.methods import Method
from peft_baft_bench.run import plan
from peft_baft_bench.run.runner import Runner
from peft_baft_bench.run.schedule import Schedule

Found = dict[str, Any]


def tensors(model: PeftModel) -> list[torch.Tensor]:
    """Parameters and statistics of the adapters."""
    found = [tensor.detach() for tensor in adapter_tensors(model)]
    return [
        tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone() for tensor in found
    ]


def edited(editor: AdapterEditor, *batches: list[Edit]) -> Found:
    """What the edits of some batches come to."""
    outcomes = [editor.edit(batch) for batch in batches]
    steps, losses = [one.steps for one in outcomes], [one.losses for one in outcomes]
    return {"steps": steps, "losses": losses, "tensors": tensors(editor.model)}


def baft(
    toy: FactModel,
    processes: Processes,
    descent: DescentConfig = DESCENT,
    scope: Scope = NARROW,
    **config: Any,
) -> BaftEditor:
    """A BaFT editor whose adapter begins differently in each process."""
    model = adapted(toy.base, processes.rank, **config)
    editor = BaftEditor(
        model,
        toy.tokenizer,
        meals(0, 12),
        OBJECTIVE,
        descent,
        descent,
        unrelated_per_edit=2,
        scope=scope,
    )
    editor.processes = processes
    return editor


def batches(toy: FactModel, processes: Processes, _: Path) -> Found:
    """Batches of five facts, of one, of two with the statistics of the first."""
    return edited(baft(toy, processes), edits(0, 3, 7, 11, 5), edits(9), edits(1, 2))


def without_gates(toy: FactModel, processes: Processes, _: Path) -> Found:
    return edited(baft(toy, processes, weighting="none"), edits(0, 3, 7))


def in_contexts(toy: FactModel, processes: Processes, _: Path) -> Found:
    """A few steps with contexts and contrast texts: many would make rounding errors large."""
    editor = baft(toy, processes, replace(DESCENT, max_steps=5), Scope())
    return edited(editor, edits(0, 3, 7), edits(9))


def lora(toy: FactModel, processes: Processes, _: Path) -> Found:
    torch.manual_seed(processes.rank)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    editor = AdapterEditor(
        get_peft_model(toy.base, config), toy.tokenizer, DESCENT, replace(DESCENT, clip_norm=1.0)
    )
    editor.processes = processes
    try:
        return edited(editor, edits(0, 3, 7))
    finally:
        editor.model.unload()


def ordered(toy: FactModel, processes: Processes, _: Path) -> Found:
    shares = processes.all_gather(lambda: processes.shard(range(7)))
    found: Found = {"shares": shares, "on_main": processes.on_main(lambda: processes.rank)}
    found["few"] = processes.all_gather(lambda: processes.shard("a"))
    return found


def told(work: Callable[[], Any]) -> str:
    """The error that `work` ends with."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failing(toy: FactModel, processes: Processes, _: Path) -> Found:
    """A row that breaks the last process alone, at the third look; another that it cannot even send; then a good edit."""
    editor = baft(toy, processes)
    before, looks, found = tensors(editor.model), [0], Found()
    open_forward = editor._open

    def breaking(error: Exception) -> Callable[..., Any]:
        def opened(*given: Any) -> Any:
            session = open_forward(*given)
            losses = session.losses

            def broken() -> torch.Tensor:
                looks[0] += 1
                if processes.rank == processes.world_size - 1 and looks[0] == 3:
                    raise error
                return losses()

            vars(session)["losses"] = broken  # of this one alone, which is frozen
            return session

        return opened

    for name, error in {"row": ValueError("row 2 is broken"), "odd": Unsendable(1, 2)}.items():
        looks[0], editor._open = 0, breaking(error)  # type: ignore[method-assign]
        found[name] = told(lambda: editor.edit(edits(0, 3, 7)))
    editor._open = open_forward  # type: ignore[method-assign]
    found["as it was"] = all(map(torch.equal, before, tensors(editor.model)))
    found["other edits"] = told(lambda: editor.edit(edits(processes.rank)))
    found["learned"] = editor.edit(edits(0, 3, 7)).learned
    return found


class Unsendable(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def stopped(toy: FactModel, processes: Processes, _: Path) -> Found:
    """Independent work of which the last process's share fails at once: the others need not go on to their ends."""
    ended: list[int] = []

    def work() -> None:
        if processes.rank == processes.world_size - 1:
            raise KeyError("a share is broken")
        for _ in range(3000):
            processes.raise_if_peer_failed()
            time.sleep(0.01)
        ended.append(processes.rank)

    # The second is not stopped by the first's alarm.
    errors = [told(lambda: processes.all_gather(work)) for _ in range(2)]
    return {"errors": errors, "ended": ended}


def bench(toy: FactModel, processes: Processes, **changes: Any) -> Runner:
    """Seven rows: an odd number, so that shares are uneven."""
    cases = []
    for n in range(7):
        old, new, food = CAPITALS[n], CAPITALS[(n + 8) % 24].answer, MEALS[12 + n]
        near = Probe("generality", old.rephrase, new), Probe("locality", food.prompt, food.answer)
        cases.append(Case(Edit(old.prompt, new), near))
    rows = Runner(toy.base, toy.tokenizer, cases, 0, 7, meals(0, 12))
    return replace(rows, processes=processes, **changes)


METHOD = Method(
    "baft",
    AdapterMethod(config=ADAPTER, descent=DESCENT, batch_descent=DESCENT, objective=OBJECTIVE),
)
SCHEDULES = {
    "single": Schedule(),
    "continual": Schedule(2),
    "batched": Schedule(1, batch_size=3),
    "immediate": Schedule(2, 3, when="immediate"),
}


# What all lines of a command share; nothing of it matters here.
COMMON: dict[str, Any] = {
    "benchmark": "toy",
    "model": {},
    "data": {},
    "protocol": {},
    "versions": {},
}


def line(rows: Runner, schedule: Schedule | None, output: Path) -> Found:
    """What the line of one run says but for the seconds; it is kept in a file."""
    run = plan.plan_runs(COMMON, [METHOD if schedule else None], [schedule or Schedule()], [0])[0]
    found = plan.perform_run(rows, run, ("reliability",), output, "")
    parts = {"cases": found.cases, "blocks": found.blocks or [], "scores": [found.scores]}
    return {
        name: [one | {"seconds": 0, "edit_seconds": 0, "peak_bytes": 0} for one in part]
        for name, part in parts.items()
    }


def lines(toy: FactModel, processes: Processes, folder: Path) -> Found:
    """Every schedule with its blocks split; the batched ones also with their facts split; the unedited model."""
    blocks, facts = (bench(toy, processes, split=split) for split in ("blocks", "facts"))
    output = folder / f"{processes.world_size}.jsonl"
    found = {name: line(blocks, schedule, output) for name, schedule in SCHEDULES.items()}
    found |= {
        f"{name} facts": line(facts, SCHEDULES[name], output) for name in ("batched", "immediate")
    }
    return found | {"none": line(blocks, None, output)}


def interrupted(toy: FactModel, processes: Processes, folder: Path) -> Found:
    """A run that fails in the first process after it has finished one block of two rows, and half of its next."""
    ticks: list[int] = []

    def tick(rows: int) -> None:
        ticks.append(rows)
        if processes.is_main and sum(ticks) == 3:
            raise ValueError("no more")

    rows = bench(toy, processes, tick=tick)
    return {"error": told(lambda: line(rows, SCHEDULES["continual"], folder / "interrupted.jsonl"))}


def command(toy: FactModel, processes: Processes, folder: Path) -> Found:
    """`baft bench` as it is called: with as many processes as meant, with fewer, and with a file that only one can read."""
    data = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "facts.jsonl"),
        "--unrelated",
        "none",
    ]
    more = [
        "--lr",
        "0.02",
        "--max-steps",
        "40",
        "--schedule",
        "batched",
        "--batch-size",
        "3",
        "--edits",
        "1",
    ]
    begin = [
        "bench",
        "facts",
        *data,
        *more,
        "--output",
        str(folder / "c.jsonl"),
        "--split",
        "facts",
        "--processes",
    ]
    found: Found = {
        "good": cli.main([*begin, str(processes.world_size)]),
        "fewer": cli.main([*begin, "4"]),
    }
    begin[3] = str(folder / ("model" if processes.is_main else "nothing"))
    found["unreadable"] = cli.main([*begin, str(processes.world_size), "--seeds", "2"])
    return found


def editing(toy: FactModel, processes: Processes, folder: Path) -> Found:
    """`baft edit` in batches of three: cut short after the first, then resumed; and one batch that is taken back."""
    data = [
        "--model",
        str(folder / "model"),
        "--edits",
        str(folder / "facts.jsonl"),
        "--unrelated",
        "none",
    ]
    begin = [
        "edit",
        *data,
        "--preset",
        "plain",
        "--lr",
        "0.02",
        "--batch-size",
        "3",
        "--processes",
        str(processes.world_size),
        "--output",
    ]
    output, write = str(folder / f"edit{processes.world_size}"), continual._write

    def cut(journal: Any, editor: Any, number: int, *more: Any) -> None:
        if number == 2:
            raise OSError("the disk is full")
        write(journal, editor, number, *more)

    continual._write = cut
    found: Found = {"cut": cli.main([*begin, output])}
    continual._write = write
    found["resumed"] = cli.main([*begin, output, "--resume"])
    found["tensors"] = list(load_file(Path(output) / "adapter_model.safetensors").values())
    found["log"] = [line.kept for line in Journal(output).state().edits]
    strict = [
        "--min-agreement",
        "1",
        "--canaries",
        str(folder / "stay.jsonl"),
        "--keep-only-good",
        "--overwrite",
    ]
    found["strict"] = cli.main([*begin, output, *strict])
    found["strict log"] = [line.kept for line in Journal(output).state().edits]
    return found


def sharded(toy: FactModel, processes: Processes, _: Path) -> Found:
    """One model over all processes, its adapter injected before."""
    editor = baft(toy, Processes())
    if processes.world_size > 1:
        base = editor.model.get_base_model()
        for block in base.model.layers:
            fully_shard(block)
        fully_shard(base)
    return edited(editor, edits(0, 3), edits(7))


def main(folder: Path, names: list[str]) -> None:
    """Run cases one after another."""
    dist.init_process_group("gloo")
    toy = FactModel(*load_model(str(folder / "model")))
    toy.base.generation_config.eos_token_id = None
    for name in names:
        with Processes.started() as processes:
            found = globals()[name](toy, processes, folder)
        torch.save(found, folder / f"{name}.{processes.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]), sys.argv[2:])
