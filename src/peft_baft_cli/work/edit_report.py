"""The report of `baft edit`: as data, and as text for somebody who sees it for the first time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peft_baft.editing.continual import EditRecord
from peft_baft.evaluation.before_after import Report
from peft_baft_cli.screen import print_table, shortened, shown

NOTHING = "(nothing)"
MEASURES = (
    ("reliability", "of the new answers are predicted"),
    ("generality", "of the new answers are predicted where the question is put in other words"),
    ("locality", "of what the model predicted for other questions is unchanged"),
)
MOVED = 0.9  # a locality below which the report says what can be done


def summary(report: Report, records: Sequence[EditRecord]) -> dict[str, Any]:
    """Return what became of each fact and of the model, in a form that JSON keeps.

    A fact is `learned` if its loss fell below the stop when it was made, and `known` if the model's own answer begins with
    it at the end: later edits may have overwritten it. `kept` is False for one that was taken back.
    """
    batches = [batch for batch in records for _ in batch.edits]
    answers = [
        asdict(answer)
        | {
            "learned": batch.result is not None and batch.result.learned,
            "known": answer.learned,
            "kept": batch.kept,
            "problem": batch.problem,
        }
        for answer, batch in zip(report.answers, batches, strict=True)
    ]
    results = [batch.result for batch in records if batch.result is not None]
    return {
        "facts": len(answers),
        "batches": len(records),
        "learned": sum(answer["learned"] for answer in answers),
        "known": sum(answer["known"] for answer in answers),
        "taken_back": sum(not answer["kept"] for answer in answers),
        **{name: getattr(report, name) for name, _ in MEASURES},
        "steps": sum(result.steps for result in results),
        "seconds": sum(result.seconds for result in results),
        "answers": answers,
    }


def _reworded(found: Sequence[Mapping[str, Any]], folder: str) -> str:
    """Say which facts ask in other words what earlier edits answer."""
    shown_first = ", ".join(f"{one['prompt']!r:.60} (edit {one['edit']})" for one in found[:3])
    numbers = ",".join(str(number) for number in sorted({one["edit"] for one in found}))
    return (
        f"{len(found)} of these facts ask in other words what the memory answered already: {shown_first}"
        f"{', …' if len(found) > 3 else ''}. Both stay, and a prompt is answered by the nearer wording; "
        f"`baft forget {folder} --edit {numbers}` takes the earlier ones out."
    )


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report: what `summary` returned, with what the command added."""
    count = report["facts"]
    print(f"{count} {'fact' if count == 1 else 'facts'} taught to {shown(report['model'])}:")
    print_table(
        ("prompt", "before", "after", "wanted", "known"),
        [
            (
                a["prompt"],
                a["before"] or NOTHING,
                a["after"] or NOTHING,
                a["wanted"],
                "yes" if a["known"] else "NO",
            )
            for a in report["answers"]
        ],
        cut_first=("before", "after"),
    )
    print(_outcome(report))
    for line in (*_problems(report["answers"]), *_lost(report)):
        print(line)
    if report.get("replaced"):
        numbers = ", ".join(map(str, report["replaced"]))
        print(f"Facts with questions that were in the memory replace its edits {numbers}.")
    if report.get("reworded"):
        print(_reworded(report["reworded"], report["adapter"]))
    print("\nMeasured on the tokens of answers, as shares:")
    for name, what in MEASURES:
        if report[name] is None:
            print(f"     –  {what} ({name}): not asked, since no record has such a prompt")
        else:
            print(f"  {report[name]:.2f}  {what} ({name})")
    if report["locality"] < MOVED and report.get("method") != "memory":
        print(
            "Answers close to an edited fact move with it. --unrelated FILE trains beside answers that should stay."
        )
    size, seconds = report["bytes"] / 1000, report["seconds"]
    if report.get("method") == "memory":
        what = f"a memory of {size:.0f} kB"
    else:
        what = f"an adapter of {size:.0f} kB, {report['steps']} steps, {seconds:.1f} s"
    print(f"\nSaved in {shown(report['adapter'])}: {what}.")
    print("The model's own weights are as they were. Compare for yourself:\n")
    question = report["answers"][0]["prompt"]
    words = ["baft", "ask", "--model", report["model"], "--adapter", report["adapter"]]
    words.append(question)
    print(f"    {shown(shlex.join(words))}\n")


def _outcome(report: Mapping[str, Any]) -> str:
    """Return a sentence like `8 of 8 learned when made, 4 still known at the end.`"""
    known = "all known" if report["known"] == report["facts"] else f"{report['known']} known"
    if report["known"] < report["learned"]:
        known = f"{report['known']} still known"
    text = f"{report['learned']} of {report['facts']} learned when made, {known} at the end"
    if report["taken_back"]:
        text += f", {report['taken_back']} taken back"
    return f"{text}."


def _problems(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for answer in answers:
        if answer["problem"] is not None:
            fact = f"{shortened(shown(answer['prompt']), 60)} -> {shortened(shown(answer['wanted']), 40)}"
            state = "kept" if answer["kept"] else "taken back"
            lines.append(f"  {fact}: {answer['problem']} ({state})")
    return lines


def _lost(report: Mapping[str, Any]) -> list[str]:
    """Return what to do about facts that later edits have overwritten, as a line or none."""
    lost = sum(
        answer["learned"] and answer["kept"] and not answer["known"] for answer in report["answers"]
    )
    if not lost or report["batches"] == 1 or report.get("method") == "memory":
        return []
    return [
        "Edits that follow each other in one adapter overwrite each other. Learn facts that are known together at once "
        "(without --one-by-one and --batch-size), or keep them in a memory (--method memory)."
    ]
