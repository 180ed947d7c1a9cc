"""Say which packages of this environment have other versions than tested.txt; exit with 0 if there are some, else with 1.

    python requirements/newer.py requirements/tested.txt        # `make test-newest` calls it

Only packages whose versions can change what an adapter does count.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

WATCHED = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "tokenizers",
    "numpy",
    "typer",
    "rich",
)


def tested_versions(file: Path) -> dict[str, str]:
    """Read the versions that a file of constraints names for this interpreter."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


def main(file: str) -> int:
    """Print the packages that differ; return the exit code."""
    tested = tested_versions(Path(file))
    others = []
    for name in WATCHED:
        installed = version(name).partition("+")[0]  # without "+cpu"
        if installed != tested.get(name):
            others.append(f"{name} {installed} (tested: {tested.get(name, 'not')})")
    print("newer than tested: " + ", ".join(others) if others else "Nothing is newer than tested.txt.")
    return 0 if others else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
