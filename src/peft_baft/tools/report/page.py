"""Render a report as a self-contained HTML page without scripts. All texts come from users and models, so all are escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peft_baft.data.cases import Prompt, as_messages
from peft_baft.evaluation.scoring import STATEMENT_TOKENS
from peft_baft.tools.pages import html_environment, read_asset
from peft_baft.tools.report.report import AdapterReport, Comparison, FactReport
from peft_baft.tools.report.taught import TaughtFact

NOTHING = "(nothing)"
MOVED_SHOWN = 20  # number of changed neighbours to show; the others are folded
JUMPS_SHOWN = 40  # number of links to facts that do not hold
ABSENT_SHOWN = 200  # number of facts to show that are not in the adapter
FORM_NAMES = {"raw": "raw text", "chat": "chat"}
SOURCES = {
    "fact": "the subject of another fact",
    "name": "a well-known name",
    "file": "from the edit file",
}


def page(report: AdapterReport, root: str = "") -> str:
    """Return the page that shows a report.

    Args:
        root: relative path from the page's folder to the adapter's folder, for links to pictures; "" if they are the same.
    """
    folder = Path(__file__).parent
    environment = html_environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "counted": counted,
        "first_words": first_words,
        "later_words": later_words,
        "messages": messages,
        "answer_text": answer_text,
        "address": lambda path: address(root, path),
        "setting": setting,
        "costs": costs,
        "reason": absent_reason,
    }
    return environment.from_string(read_asset(folder, "page.html")).render(
        style=read_asset(folder, "page.css"),
        report=report,
        counts=report.counts,
        summary=summary(report),
        holding=holding_table(report),
        failing=[fact for fact in report.facts if not fact.holds],
        moved=report.moved,
        form_names=FORM_NAMES,
        sources=SOURCES,
        moved_shown=MOVED_SHOWN,
        jumps_shown=JUMPS_SHOWN,
        absent_shown=ABSENT_SHOWN,
        tokens=STATEMENT_TOKENS,
    )


def summary(report: AdapterReport) -> str:
    """Summarise the facts, the neighbours and the canaries in a few sentences."""
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


def holding_table(report: AdapterReport) -> list[tuple[str, list[str]]]:
    """Return a row per kind of question with the numbers of answers that hold, such as `3 of 4`, one for each format."""
    rows = []
    for kind, name in (
        ("answers", "the question itself"),
        ("rephrasings", "in other words"),
        ("contexts", "in contexts"),
    ):
        cells = [report.count_holding(kind, form) for form in report.forms]
        rows.append((name, [f"{holding} of {asked}" if asked else "–" for holding, asked in cells]))
    return rows


def counted(number: int, one: str, several: str | None = None) -> str:
    """Format a number with its noun: `1 fact`, `2 facts`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def answer_text(text: str) -> str:
    """Return an answer, or a note that it is empty."""
    return text or NOTHING


def first_words(comparison: Comparison) -> str:
    """Return the common prefix of both answers."""
    return " ".join(comparison.after.split()[: comparison.shared_words])


def later_words(comparison: Comparison) -> str:
    """Return the edited model's answer after the common prefix."""
    return " ".join(comparison.after.split()[comparison.shared_words :])


def messages(prompt: Prompt) -> list[tuple[str, str]]:
    """Return the roles and texts of a prompt's messages; the role of a plain text is ""."""
    if isinstance(prompt, str):
        return [("", prompt.strip())]
    return [(message.role, message.content) for message in as_messages(prompt)]


def address(root: str, path: str) -> str:
    """Return the URL of a file in the adapter's folder, relative to the page."""
    return quote(f"{root.rstrip('/')}/{path}" if root else path)


def setting(value: Any) -> str:
    """Format the value of a setting."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def absent_reason(fact: TaughtFact) -> str:
    """Return why a fact is not in the adapter."""
    if fact.replaced_by is not None:
        return f"replaced by edit {fact.replaced_by}"
    return f"undone: {fact.problem or 'rejected'}"


def costs(fact: FactReport) -> Sequence[str]:
    """Describe how a fact was trained: steps, time, loss, batch and formats."""
    taught = fact.fact
    words = []
    if taught.steps is not None:
        words.append(counted(taught.steps, "step"))
    if taught.seconds is not None:
        words.append(f"{taught.seconds:.1f} s")
    if taught.loss is not None:
        words.append(f"loss {taught.loss:.3g}")
    if taught.batch > 1:
        words.append(f"trained together with {counted(taught.batch - 1, 'other fact')}")
    if taught.forms:
        words.append(f"trained as {' and '.join(FORM_NAMES[form] for form in taught.forms)}")
    if taught.learned is False:
        words.append("not learned when it was made")
    return words
