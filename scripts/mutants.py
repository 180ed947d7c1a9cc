"""Change the source in small ways, one at a time, and count how many of these mutants the tests notice: `make mutants`.

The mutants are made by cosmic-ray, in copies of the working tree under build/mutants: the checkout itself is never changed.
Each mutant is tried against the tests of its file, and is noticed when one of them fails or outlasts the time limit. A run
that was stopped goes on where it was; a file is tried anew when it, or one of its tests, has changed.

The result is docs/mutants.md. What is to be said about a survivor is written into docs/mutants.json, by hand, under the
text of the changed line: there it outlives any number of runs. `--write-unexplained` adds the survivors that have no entry
yet to that file, each with an empty explanation to be filled in.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from cosmic_ray.commands import init
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TESTS, BUILD = Path("src/peft_baft"), Path("tests"), ROOT / "build" / "mutants"
REPORT, EXPLANATIONS = ROOT / "docs" / "mutants.md", ROOT / "docs" / "mutants.json"

# Which files are changed, and the tests that should notice, the quickest and nearest first. Paths below src/peft_baft and
# below tests.
FILES: dict[str, list[str]] = {
    "intervention.py": ["test_intervention.py"],
    "losses.py": ["test_losses.py"],
    "span.py": ["test_prompt_lengths.py", "test_span.py", "adapter/test_positions.py"],
    "adapter/context.py": [
        "adapter/test_positions.py",
        "adapter/test_adapter.py",
        "adapter/test_model_call.py",
    ],
    "adapter/layer.py": [
        "adapter/test_adapter.py",
        "adapter/test_blocks.py",
        "adapter/test_balance.py",
    ],
    "adapter/parameters.py": [
        "adapter/test_gate_kinds.py",
        "adapter/test_adapter.py",
        "test_intervention.py",
    ],
    "adapter/weights.py": [
        "adapter/test_saved_format.py",
        "adapter/test_saving.py",
        "adapter/test_corruption.py",
    ],
    "adapter/blocks.py": ["adapter/test_blocks.py", "adapter/test_adapter.py"],
    "adapter/state.py": ["editing/test_editing.py", "adapter/test_beside_lora.py"],
    "editing/answers.py": ["editing/test_lanes.py", "editing/acceleration/test_cached_prefix.py"],
    "editing/train.py": ["editing/test_train.py", "editing/test_editing.py"],
    "editing/lanes.py": ["editing/test_lanes.py", "editing/test_editing.py"],
    "editing/objective.py": [
        "test_losses.py",
        "editing/test_objective.py",
        "editing/test_presets.py",
        "editing/test_editing.py",
    ],
    "editing/baft.py": [
        "editing/test_editing.py",
        "editing/test_lanes.py",
        "bench/run/test_parallel.py",
    ],
    "editing/adapter_editor.py": [
        "editing/test_presets.py",
        "editing/test_editing.py",
        "editing/test_journal.py",
    ],
}
# What all of them are tried with: a change here makes every earlier result void.
SHARED = ["conftest.py", "adapters.py", "facts.py"]

# cosmic-ray knows eleven replacements of every operator. Most end in an exception at once (a shift of a matrix) and would
# only flatter the score; of each operator the one or two that compute something else are tried.
REPLACEMENTS = {
    "BinaryOperator": "Add_Sub Sub_Add Mul_Div Mul_Add Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitOr_BitAnd BitAnd_BitOr",
    "ComparisonOperator": (
        "Eq_NotEq Eq_GtE Eq_LtE NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
    ),
}
OPERATORS = {
    f"core/Replace{kind}_{pair}" for kind, pairs in REPLACEMENTS.items() for pair in pairs.split()
}
REPLACES_OPERATOR = re.compile(r"core/Replace(Binary|Comparison)Operator_")


@dataclass(frozen=True)
class Mutant:
    """One mutant that was tried.

    Attributes:
        file: below src/peft_baft. line: its number. function: where it lies. before, after: the changed line.
        noticed: a test failed. too_long: it was noticed by the time limit alone.
    """

    file: str
    line: int
    function: str
    before: str
    after: str
    noticed: bool
    too_long: bool

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What an explanation is found by: it holds no line number, so that it outlives changes elsewhere."""
        return self.file, self.function, self.before, self.after


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield every type annotation: they are never evaluated, so no test can notice a change of one."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if isinstance(annotation, ast.expr):
                yield annotation


def unused_positions(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return where a change does nothing at run time: the begin and end, line and column, of every annotation."""
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in annotations(ast.parse(text))
    ]


def wanted(
    mutation: MutationSpec, unused: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> bool:
    """Whether a mutation is worth a run."""
    if REPLACES_OPERATOR.match(mutation.operator_name) and mutation.operator_name not in OPERATORS:
        return False
    return not any(begin <= mutation.start_pos and mutation.end_pos <= end for begin, end in unused)


def all_work(file: str, session: Path) -> list[WorkItem]:
    """Return every mutant of a file that is worth a run, in the order of the text."""
    path = SOURCE / file
    unused = unused_positions((ROOT / path).read_text(encoding="utf-8"))
    with use_db(str(session), WorkDB.Mode.create) as database:
        init([path], database, {})
        work = [item for item in database.work_items if wanted(item.mutations[0], unused)]
        database.clear()
    return sorted(
        work,
        key=lambda item: (
            item.mutations[0].start_pos,
            item.mutations[0].operator_name,
            item.job_id,
        ),
    )


Place = tuple[str, tuple[int, int], str, int]


def place(item: WorkItem) -> Place:
    """Return what tells a mutant from the others: cosmic-ray's own job ids are random."""
    (mutation,) = item.mutations
    return (
        str(mutation.module_path),
        mutation.start_pos,
        mutation.operator_name,
        mutation.occurrence,
    )


def session_of(file: str) -> Path:
    """Return the database of what is to be tried and what came out: another one when the file or one of its tests changes."""
    content = hashlib.sha256(f"{FILES[file]} {sorted(OPERATORS)}".encode())
    for path in [SOURCE / file, *(TESTS / name for name in [*SHARED, *FILES[file]])]:
        content.update((ROOT / path).read_bytes())
    stem = file.replace("/", "-").removesuffix(".py")
    return BUILD / "sessions" / f"{stem}-{content.hexdigest()[:12]}.sqlite"


@dataclass(frozen=True)
class Session:
    """The mutants of one file: the database that cosmic-ray works through, and which of its entries this run is about."""

    database: Path
    places: frozenset[Place]


def prepare_session(file: str, work: Sequence[WorkItem], count: int, seed: int) -> Session:
    """Draw `count` mutants of a file, and leave those of them without a result in the database.

    They are the first of an order that depends on the file and the seed alone, so that a larger sample holds every smaller
    one, and results of an earlier run are never lost.
    """
    # By place first: cosmic-ray lists its work in the order of random job ids.
    order = sorted(work, key=place)
    random.Random(f"{seed} {file}").shuffle(order)
    chosen = {place(item): item for item in order[:count]}
    session = session_of(file)
    with use_db(str(session), WorkDB.Mode.create) as database:
        completed = {place(item): (item, result) for item, result in database.completed_work_items}
        items = {
            key: completed[key][0] if key in completed else item for key, item in chosen.items()
        }
        database.clear()
        database.add_work_items(
            (items | {key: item for key, (item, _) in completed.items()}).values()
        )
        for item, result in completed.values():
            database.set_result(item.job_id, result)
    print(
        f"{file}: {len(chosen)} of {len(work)} mutants, {len(chosen.keys() - completed.keys())} to try",
        flush=True,
    )
    return Session(session, frozenset(chosen))


def prepare_sessions(files: Sequence[str], sample: int, seed: int) -> dict[str, Session]:
    """Draw about `sample` mutants, of each file the same share; all of them for 0."""
    (BUILD / "sessions").mkdir(parents=True, exist_ok=True)
    work = {file: all_work(file, BUILD / "sessions" / "scratch.sqlite") for file in files}
    share = sample / sum(map(len, work.values())) if sample else 1.0
    return {
        file: prepare_session(file, items, ceil(share * len(items)), seed)
        for file, items in work.items()
    }


def make_copy(number: int) -> Path:
    """Make a copy of the working tree, what is not committed included, and return its folder."""
    # What a killed run left running must not write into this one's copy.
    copy = BUILD / f"copy-{os.getpid()}-{number}"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def environment(copy: Path) -> dict[str, str]:
    """Return the variables with which Python takes the package from the copy."""
    own = {
        "PYTHONPATH": str(copy / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return os.environ | own


def require_copy_in_use(python: str, copy: Path) -> None:
    """Raise RuntimeError unless the tests import the copy: a mutant that nobody imports would survive."""
    command = [python, "-c", "import peft_baft; print(peft_baft.__file__)"]
    done = subprocess.run(
        command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=True
    )
    if not done.stdout.strip().startswith(str(copy)):
        raise RuntimeError(
            f"The tests would import {done.stdout.strip()} instead of the copy {copy}."
        )


def try_mutants(file: str, session: Session, copy: Path, python: str) -> None:
    """Try the mutants of one file that have no result yet, after a run of its tests without any change.

    Raises:
        RuntimeError: the tests fail as it is.
    """
    with use_db(str(session.database), WorkDB.Mode.open) as database:
        pending = database.num_work_items - database.num_results
    if not pending:
        return
    names = [str(TESTS / name) for name in FILES[file]]
    command = [
        python,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        *names,
    ]
    # A run that was killed may have left a mutant here.
    shutil.copy2(ROOT / SOURCE / file, copy / SOURCE / file)
    begin = time.monotonic()
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The tests of {file} fail without any change:\n{done.stdout[-3000:]}")
    seconds = time.monotonic() - begin
    config = copy / "mutants.toml"
    config.write_text(
        "[cosmic-ray]\n"
        f'module-path = "{SOURCE / file}"\n'
        f"timeout = {3 * seconds + 20:.0f}\n"  # a mutant that runs for ever, not one on a busy machine
        f"test-command = {json.dumps(' '.join(map(quoted, command)))}\n"
        '[cosmic-ray.distributor]\nname = "local"\n',
        encoding="utf-8",
    )
    program = Path(sys.executable).with_name("cosmic-ray")
    begin = time.monotonic()
    subprocess.run(
        [program, "exec", config, session.database], cwd=copy, env=environment(copy), check=True
    )
    spent = time.monotonic() - begin
    print(f"{file}: {pending} mutants in {spent:.0f} s; its tests take {seconds:.0f} s", flush=True)


def quoted(argument: str) -> str:
    return f"'{argument}'" if " " in argument else argument


def try_all(sessions: dict[str, Session], python: str, jobs: int) -> list[str]:
    """Try the mutants of all files, `jobs` files at a time, each in a copy of its own; return what went wrong."""
    for left_over in BUILD.glob("copy-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    waiting: Queue[str] = Queue()
    for file in sorted(sessions, key=lambda file: -len(sessions[file].places)):
        waiting.put(file)
    problems: list[str] = []

    def work(number: int) -> None:
        copy = make_copy(number)
        require_copy_in_use(python, copy)
        while True:
            try:
                file = waiting.get_nowait()
            except Empty:
                return
            try:
                try_mutants(file, sessions[file], copy, python)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                problems.append(f"{file}: {error}")
                print(problems[-1], file=sys.stderr, flush=True)

    threads = [Thread(target=work, args=(number,)) for number in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


def changed_line(diff: str) -> tuple[str, str]:
    """Return the line before and after, of a unified diff; several lines are joined."""
    lines = diff.splitlines()[3:]  # after the names and the position
    before = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    after = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return before, after


def results(file: str, session: Session) -> list[Mutant]:
    """Return the mutants of a file that were tried, in the order of the text."""
    mutants = []
    with use_db(str(session.database), WorkDB.Mode.open) as database:
        for item, result in database.completed_work_items:
            if place(item) not in session.places:
                continue
            (mutation,) = item.mutations
            before, after = changed_line(result.diff or "")
            noticed = result.test_outcome is not TestOutcome.SURVIVED
            too_long = noticed and (result.output or "").strip() == "timeout"
            function = mutation.definition_name or "the file itself"
            mutants.append(
                Mutant(file, mutation.start_pos[0], function, before, after, noticed, too_long)
            )
    return sorted(mutants, key=lambda mutant: (mutant.line, mutant.after))


def read_explanations() -> dict[tuple[str, str, str, str], str]:
    """Return what has been said about survivors, by `Mutant.key`."""
    if not EXPLANATIONS.exists():
        return {}
    entries: list[dict[str, Any]] = json.loads(EXPLANATIONS.read_text(encoding="utf-8"))
    return {
        (e["file"], e["function"], e["before"], e["after"]): e["why"] for e in entries if e["why"]
    }


def write_unexplained(survivors: Sequence[Mutant]) -> None:
    """Add each survivor without an entry to the file of explanations, with an empty one."""
    text = EXPLANATIONS.read_text(encoding="utf-8") if EXPLANATIONS.exists() else "[]"
    entries: list[dict[str, Any]] = json.loads(text)
    present = {(e["file"], e["function"], e["before"], e["after"]) for e in entries}
    for mutant in survivors:
        if mutant.key not in present:
            present.add(mutant.key)
            entries.append(
                dict(zip(("file", "function", "before", "after"), mutant.key, strict=True))
                | {"why": ""}
            )
    EXPLANATIONS.write_text(
        json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def report(mutants: dict[str, list[Mutant]], sample: int, seed: int) -> str:
    """Return docs/mutants.md."""
    explanations = read_explanations()
    command = f"make mutants SAMPLE={sample} SEED={seed}" if sample else "make mutants SAMPLE=0"
    if len(mutants) < len(FILES):
        command = f"scripts/mutants.py --sample {sample} --seed {seed} --files {' '.join(mutants)}"
    extent = (
        f"About {sample} of them are drawn at random (seed {seed})"
        if sample
        else "All of them are tried"
    )
    everything = [mutant for of_file in mutants.values() for mutant in of_file]
    survivors = [mutant for mutant in everything if not mutant.noticed]
    unexplained = sum(mutant.key not in explanations for mutant in survivors)
    lines = [
        "# Mutants: what the tests notice",
        "",
        f"`{command}` changes the source in one small way at a time (another operator, another number, a condition reversed,",
        "a decorator gone, a loop that does nothing), and runs the tests that belong to the file. A mutant that no test notices",
        "is either a gap in the tests, or a change that makes no difference; each of those below says which it is.",
        f"{extent}. The mutants are [cosmic-ray](https://github.com/sixty-north/cosmic-ray)'s,",
        "without the replacements that end in an exception at once and without changes of type annotations. Which tests belong",
        "to which file stands on top of [scripts/mutants.py](../scripts/mutants.py); the explanations are written by hand, in",
        "[mutants.json](mutants.json).",
        "",
        f"{len(everything)} mutants, {len(everything) - len(survivors)} noticed ({score(everything)}), "
        f"{len(survivors)} survived, {unexplained} of them unexplained.",
        "",
        "| file | tried | noticed | of these by the time limit | survived | score |",
        "|---|---|---|---|---|---|",
    ]
    for file, of_file in mutants.items():
        noticed, too_long = sum(m.noticed for m in of_file), sum(m.too_long for m in of_file)
        numbers = [len(of_file), noticed, too_long, len(of_file) - noticed, score(of_file)]
        lines.append(f"| {file} | {' | '.join(map(str, numbers))} |")
    for file in {mutant.file: None for mutant in survivors}:
        lines += ["", f"## Survivors in {file}", ""]
        for mutant in (mutant for mutant in survivors if mutant.file == file):
            why = explanations.get(mutant.key, "**Unexplained.**")
            lines.append(
                f"- Line {mutant.line}, `{mutant.function}`: `{mutant.before}` → `{mutant.after}`. {why}"
            )
    return "\n".join(lines) + "\n"


def score(mutants: Sequence[Mutant]) -> str:
    return (
        f"{100 * sum(mutant.noticed for mutant in mutants) / len(mutants):.0f} %"
        if mutants
        else "–"
    )


def main() -> int:
    """Try mutants and write the report; return 1 if the tests of a file could not be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=200,
        help="how many mutants, drawn at random; 0 for all (default: 200)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="how many files at a time, each in a copy (default: 2)"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter that has what the tests need"
    )
    parser.add_argument(
        "--files", nargs="+", default=list(FILES), choices=list(FILES), metavar="FILE"
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=REPORT,
        help="where the page is written (default: docs/mutants.md)",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the page from what has been tried so far"
    )
    parser.add_argument(
        "--write-unexplained", action="store_true", help="add new survivors to docs/mutants.json"
    )
    options = parser.parse_args()
    os.chdir(ROOT)  # cosmic-ray names files as they are given
    sessions = prepare_sessions(options.files, options.sample, options.seed)
    # Not resolved: a link into an environment must stay there.
    python = str(Path(options.python).absolute())
    problems = [] if options.report_only else try_all(sessions, python, options.jobs)
    mutants = {file: results(file, session) for file, session in sessions.items()}
    if options.write_unexplained:
        write_unexplained([m for of_file in mutants.values() for m in of_file if not m.noticed])
    options.report.write_text(report(mutants, options.sample, options.seed), encoding="utf-8")
    survived = sum(not m.noticed for of_file in mutants.values() for m in of_file)
    print(f"{options.report}: {sum(map(len, mutants.values()))} mutants, {survived} survived")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
