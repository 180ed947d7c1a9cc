"""A report as one HTML page: no network, no script, no other files. Every text in it is foreign, so all of them are escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from peft_baft.data.cases import Prompt, as_messages
from peft_baft.evaluation.scoring import STATEMENT_TOKENS
from peft_baft.tools.report.report import AdapterReport, Comparison, FactReport
from peft_baft.tools.report.taught import TaughtFact

NOTHING = "(nothing)"
MOVED_SHOWN = 20  # neighbours that moved; the others stand folded below them
JUMPS_SHOWN = 40  # links to facts that do not hold
ABSENT_SHOWN = 200  # facts that are not in the adapter
FORM_NAMES = {"raw": "raw text", "chat": "chat"}
SOURCES = {
    "fact": "the subject of another fact",
    "name": "a well-known name",
    "file": "of the edit file",
}


def page(report: AdapterReport, root: str = "") -> str:
    """Make the page that shows a report.

    Args:
        root: the way from the page's folder to the adapter's, for links to pictures; empty where they are the same.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "counted": counted,
        "first_words": first_words,
        "later_words": later_words,
        "messages": messages,
        "spoken": spoken,
        "address": lambda path: address(root, path),
        "setting": setting,
        "costs": costs,
        "reason": absent_reason,
    }
    return environment.from_string(_file("page.html")).render(
        style=_file("page.css"),
        report=report,
        counts=report.counts,
        summary=summary(report),
        held=held_table(report),
        failing=[fact for fact in report.facts if not fact.holds],
        moved=report.moved,
        form_names=FORM_NAMES,
        sources=SOURCES,
        moved_shown=MOVED_SHOWN,
        jumps_shown=JUMPS_SHOWN,
        absent_shown=ABSENT_SHOWN,
        tokens=STATEMENT_TOKENS,
    )


def _file(name: str) -> str:
    """Read one of the files that make up the page, which lie beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def summary(report: AdapterReport) -> str:
    """Say in a sentence what became of the facts, the neighbours and the canaries."""
    counts = report.counts
    facts = f"{counts['hold']} of {counted(counts['facts'], 'fact')} hold"
    if report.left_out:
        facts += f" ({report.left_out} more not asked)"
    neighbours = (
        f"{counts['neighbours_moved']} of {counted(counts['neighbours'], 'neighbour')} moved, "
        f"{counts['neighbours_say_new']} of them to the fact's new answer"
    )
    canaries = f"{counts['canaries_moved']} of {counted(counts['canaries'], 'canary', 'canaries')}"
    return f"{facts}. {neighbours}. {canaries} moved."


def held_table(report: AdapterReport) -> list[tuple[str, list[str]]]:
    """List what holds: for each kind of asking, in the order of the report's forms, `3 of 4`, or a dash where none was asked."""
    rows = []
    for kind, name in (
        ("answers", "the question itself"),
        ("rephrasings", "in other words"),
        ("contexts", "in contexts"),
    ):
        cells = [report.held_in(kind, form) for form in report.forms]
        rows.append((name, [f"{held} of {asked}" if asked else "–" for held, asked in cells]))
    return rows


def counted(number: int, one: str, several: str | None = None) -> str:
    """Write a number with its noun: `1 fact`, `2 facts`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def spoken(text: str) -> str:
    """Give an answer as it is shown, also where it is empty."""
    return text or NOTHING


def first_words(comparison: Comparison) -> str:
    """Give the words with which both answers begin."""
    return " ".join(comparison.after.split()[: comparison.shared_words])


def later_words(comparison: Comparison) -> str:
    """Give the edited model's words from where they differ on."""
    return " ".join(comparison.after.split()[comparison.shared_words :])


def messages(prompt: Prompt) -> list[tuple[str, str]]:
    """Give a prompt's messages as speakers and texts; a text has no speaker."""
    if isinstance(prompt, str):
        return [("", prompt.strip())]
    return [(message.role, message.content) for message in as_messages(prompt)]


def address(root: str, path: str) -> str:
    """Give the address of a file in the adapter's folder, from the page."""
    return quote(f"{root.rstrip('/')}/{path}" if root else path)


def setting(value: Any) -> str:
    """Write the value of a setting."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def absent_reason(fact: TaughtFact) -> str:
    """Say why a fact is not in the adapter."""
    if fact.replaced_by is not None:
        return f"replaced by edit {fact.replaced_by}"
    return f"taken back: {fact.problem or 'not good'}"


def costs(fact: FactReport) -> Sequence[str]:
    """Say how a fact was learned: when, at what cost, in which form."""
    taught = fact.fact
    words = []
    if taught.steps is not None:
        words.append(counted(taught.steps, "step"))
    if taught.seconds is not None:
        words.append(f"{taught.seconds:.1f} s")
    if taught.loss is not None:
        words.append(f"loss {taught.loss:.3g}")
    if taught.batch > 1:
        words.append(f"learned at once with {counted(taught.batch - 1, 'other fact')}")
    if taught.forms:
        words.append(f"taught as {' and '.join(FORM_NAMES[form] for form in taught.forms)}")
    if taught.learned is False:
        words.append("not learned when it was made")
    return words
