"""`baft push`."""

from __future__ import annotations

from pathlib import Path

from peft_baft.integrations.hub import push as push_folder
from peft_baft_bench.run.plan import ADAPTER
from peft_baft_bench.run.results import ResultLine, read_results
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import PushCommand
from peft_baft_cli.screen import doing, shown
from peft_baft_cli.work.common import require_file

RESULT_FILE = "a file of result lines from `baft bench --adapter`"


def push(options: PushCommand) -> int:
    """Upload the adapter in a folder to the Hub; return the exit code."""
    if not options.folder.is_dir():
        raise ValueError(
            f"There is no folder {options.folder}. baft push takes a folder made by `baft edit --output`."
        )
    results = _results(options.results)
    with doing(f"uploading to {options.repository}"):
        address = push_folder(
            options.folder,
            options.repository,
            private=options.private or None,
            revision=options.revision,
            facts=not options.no_facts,
            base_model=options.base_model,
            base_revision=options.base_revision,
            results=results,
        )
    print(f"{shown(str(options.folder))} is now {options.repository}: {address}")
    at = "" if options.revision is None else f" --adapter-revision {options.revision}"
    print(f'Try it elsewhere: baft ask --adapter {options.repository}{at} "..."')
    return DONE


def _results(file: Path | None) -> list[ResultLine]:
    """Return the result lines of adapters in a file."""
    if file is None:
        return []
    lines = read_results([require_file(file, "--results", RESULT_FILE)])
    lines = [line for line in lines if line.method == ADAPTER]
    if not lines:
        raise ValueError(
            f"--results {file} has no result of an adapter. The option takes {RESULT_FILE}."
        )
    return lines
