"""What was killed, corrupted and counted: runs those tests, the slow ones too, and writes the table into docs/production.md.

    python scripts/safety.py            # or: make safety

Every count is one that a test has made and asserted; where a test fails, no table is written. A run that was killed and begun
again must end with the adapter of one that was not, byte for byte. A damaged folder or file must be refused in words, with the
model as it was, or load whole and to the letter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/editing/test_journal.py",
    "tests/bench/run/test_runner.py",
    "tests/adapter/test_corruption.py",
    "tests/data/test_fuzz_files.py",
    "tests/test_processes.py",
]
DOCUMENT = ROOT / "docs" / "production.md"
BEGIN, END = "<!-- safety -->\n", "<!-- end of safety -->\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *TESTS,
            "--junitxml",
            str(found),
            "-o",
            "junit_family=xunit1",
        ]
        failed = subprocess.run(command, cwd=ROOT).returncode
        if failed:
            return failed
        counts = tallied(found)
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(
        before + BEGIN + table(counts) + END + rest.partition(END)[2], encoding="utf-8"
    )
    return 0


def tallied(found: Path) -> dict[str, Counter[str] | dict[str, str]]:
    """Counts by what was done; words, such as a percentage, stand as the test gave them."""
    total: dict[str, dict] = {}
    for entry in ElementTree.parse(found).iter("property"):
        if entry.get("name") == "tally":
            what, counts = json.loads(entry.get("value", ""))
            row = total.setdefault(what, {})
            for name, count in counts.items():
                row[name] = count if isinstance(count, str) else row.get(name, 0) + count
    return total


def table(counts: dict) -> str:
    lines = ["| what | counted |\n|---|---|\n"]
    for what, row in counts.items():
        cells = ", ".join(
            f"{name} {count if isinstance(count, str) else f'{count:,}'}"
            for name, count in row.items()
        )
        lines.append(f"| {what} | {cells} |\n")
    return "".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
