"""The report of `baft edit`: as data, and as text for a first-time reader."""

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
    ("generality", "of the new answers are predicted when the question is rephrased"),
    ("locality", "of the predictions for other questions are unchanged"),
)
LOW_LOCALITY = 0.9  # below this, the report says what can be done


def summary(report: Report, records: Sequence[EditRecord]) -> dict[str, Any]:
    """Return the outcome for each fact and for the model, in a form that JSON can represent.

    A fact is `learned` if its loss fell below the threshold when it was taught. It is `known` if the model's answer at the end
    begins with it: later edits may have overwritten it. `kept` is False if it was reverted.
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
    """Describe which facts ask in other words what earlier edits answer."""
    examples = [f"{one['prompt']!r:.60} (edit {one['edit']})" for one in found[:3]]
    if len(found) > len(examples):
        examples.append("…")
    numbers = ",".join(str(number) for number in sorted({one["edit"] for one in found}))
    return (
        f"{len(found)} of these facts ask in other words what the memory already answered: {', '.join(examples)}. Both stay, and "
        "a prompt is answered by the edit with the more similar wording; "
        f"`baft forget {folder} --edit {numbers}` removes the earlier ones."
    )


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report: the result of `summary`, with the additions of the command."""
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
        print(f"Facts whose questions were already in the memory replace its edits {numbers}.")
    if report.get("reworded"):
        print(_reworded(report["reworded"], report["adapter"]))
    print("\nShares of answer tokens:")
    for name, what in MEASURES:
        if report[name] is None:
            print(f"     –  {what} ({name}): not measured, since no record has such a prompt")
        else:
            print(f"  {report[name]:.2f}  {what} ({name})")
    if report["locality"] < LOW_LOCALITY and report.get("method") != "memory":
        print(
            "Some answers to other questions changed. --unrelated FILE trains with answers that should stay the same."
        )
    size, seconds = report["bytes"] / 1000, report["seconds"]
    if report.get("method") == "memory":
        what = f"a memory of {size:.0f} kB"
    else:
        what = f"an adapter of {size:.0f} kB, {report['steps']} steps, {seconds:.1f} s"
    print(f"\nSaved in {shown(report['adapter'])}: {what}.")
    print("The model's own weights are unchanged. Compare for yourself:\n")
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
        text += f", {report['taken_back']} reverted"
    return f"{text}."


def _problems(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for answer in answers:
        if answer["problem"] is not None:
            fact = f"{shortened(shown(answer['prompt']), 60)} -> {shortened(shown(answer['wanted']), 40)}"
            state = "kept" if answer["kept"] else "reverted"
            lines.append(f"  {fact}: {answer['problem']} ({state})")
    return lines


def _lost(report: Mapping[str, Any]) -> list[str]:
    """Return advice on facts that later edits have overwritten, as one line or none."""
    lost = sum(
        answer["learned"] and answer["kept"] and not answer["known"] for answer in report["answers"]
    )
    if not lost or report["batches"] == 1 or report.get("method") == "memory":
        return []
    return [
        "Successive edits in one adapter overwrite each other. Teach all facts at once (without --one-by-one and --batch-size), "
        "or use a memory (--method memory)."
    ]
