"""Which architectures of the installed transformers can be edited: `baft check` and a default edit of a tiny model of each.

Writes docs/architectures.md. A line for each architecture is kept in runs/, so that a survey that was stopped goes on;
`--again` asks all anew, `--only NAME ...` some of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for tiny_models and tiny_tokenizer

import torch
import transformers

import peft_baft
from peft_baft.tools.check.check import ATTACHED
from peft_baft.tools.check.findings import Finding
from peft_baft.tools.check.trials import CACHED, CAUSAL, FAST, LEFT, PLACES, RIGHT
from tiny_models import NOT_ALONE, model_types, tiny_model
from tiny_tokenizer import default_edit_lowers_its_loss

DECODER = " (is_decoder=True)"  # a second row for classes that are bidirectional by default
WHOLE, REFUSED, NOT_BUILT, FAILS = "whole", "refused", "not tried", "FAILS"
DEFAULT_EDIT = "an edit in its contexts, beside its contrast texts"
WHOLE_MEANS = """
**Whole** means: the last prompt tokens and the answer are edited and nothing else, cached generation gives what one full
forward gives, so does a padded batch, gradient reaches every edited block, an edit's loss falls, with the default settings too,
the adapter is the same after saving and loading, and taking it off leaves the model as it was. Where a note says that the
unedited model differs, the architecture itself gives a text other logits in a padded batch, say because it takes padding into
its state.
""".strip()
FAST_MEANS = """
**Fast edits**: tokens before the edited ones are computed once an edit instead of once a step. Where an architecture cannot do
that, edits fall back to the plain path: slower, with the same result.
""".strip()
NOTED = {  # findings that may not apply, and what the table says then
    LEFT: "left-padded batches",
    RIGHT: "right-padded batches",
    CACHED: "cached generation",
    CAUSAL: "causality",
    PLACES: "places of edits",
}


def survey(name: str) -> dict[str, Any]:
    """The line of one architecture."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    architecture = name.removesuffix(DECODER)
    line: dict[str, Any] = {"architecture": name, "class": model_types()[architecture]}
    if architecture in NOT_ALONE:
        return line | {"result": NOT_BUILT, "reason": NOT_ALONE[architecture]}
    try:
        model = tiny_model(architecture, **({"is_decoder": True} if name.endswith(DECODER) else {}))
        ids = torch.full((1, 9), 7)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:
        return line | {"result": NOT_BUILT, "reason": _first_line(error)}
    report = peft_baft.check(model)
    failed = [finding for finding in report.findings if finding.holds is False]
    if not failed:
        failed = _default_edit_failed(model)
    result = WHOLE
    if failed:
        result = REFUSED if failed[0].name == ATTACHED else FAILS
    reason = "; ".join(
        f"{finding.name}: {finding.detail or finding.difference}" for finding in failed
    )
    if result == REFUSED:
        reason = failed[0].detail.removeprefix("ValueError: ")
    return line | {"result": result, "reason": reason, "report": report.to_dict()}


def _default_edit_failed(model: Any) -> list[Finding]:
    """The finding that an edit with default settings does not work; none where it does."""
    try:
        falls = default_edit_lowers_its_loss(model)
    except Exception as error:
        return [Finding(DEFAULT_EDIT, False, detail=_first_line(error))]
    return [] if falls else [Finding(DEFAULT_EDIT, False, detail="The loss does not fall.")]


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


def _survey_to(pipe: Any, name: str) -> None:
    pipe.send(survey(name))


def survey_all(names: list[str], jobs: int, limit: float) -> Any:
    """Lines of architectures as they come, each from a process of its own that gets `limit` seconds."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_survey_to, args=(theirs, name), daemon=True)
            process.start()
            theirs.close()
            running[name] = (process, mine, time.monotonic())
        for name, (process, pipe, begun) in list(running.items()):
            late = time.monotonic() - begun > limit
            if not late and not pipe.poll(0.02):
                continue
            line = {
                "architecture": name,
                "class": model_types()[name.removesuffix(DECODER)],
                "result": FAILS,
            }
            try:
                line = (
                    {**line, "reason": f"not done after {limit:g} seconds"} if late else pipe.recv()
                )
            except EOFError:
                line = {**line, "reason": "the process died"}
            process.kill()
            process.join()
            del running[name]
            waiting += _variants(line)
            yield line | {"seconds": round(time.monotonic() - begun, 1)}


def _variants(line: dict[str, Any]) -> list[str]:
    """The name of an architecture that is refused as it is, but not as a decoder."""
    refused = line["result"] == REFUSED and "is_decoder" in line["reason"]
    return (
        [line["architecture"] + DECODER]
        if refused and not line["architecture"].endswith(DECODER)
        else []
    )


def table(lines: list[dict[str, Any]]) -> str:
    """docs/architectures.md."""
    counts = Counter(line["result"] for line in lines)
    rows = [_row(line) for line in sorted(lines, key=lambda line: line["architecture"].lower())]
    return "\n".join(
        [
            "# Which architectures can be edited",
            "",
            f"Every class of the causal-LM mapping of transformers {transformers.__version__}, as a tiny random model in "
            f"float32 on a CPU (torch {torch.__version__.partition('+')[0]}): `baft check` and an edit with the default "
            f"settings on each, by `make architectures`. "
            f"{counts[WHOLE]} are whole, {counts[REFUSED]} are refused when an adapter is attached, {counts[NOT_BUILT]} could "
            f"not be built here, {counts[FAILS]} fail.",
            "",
            WHOLE_MEANS,
            "",
            FAST_MEANS,
            "",
            "| architecture | class | result | fast edits | note |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _row(line: dict[str, Any]) -> str:
    fast, notes = "", []
    if line["result"] in (WHOLE, FAILS) and "report" in line:
        findings = {finding["name"]: finding for finding in line["report"]["findings"]}
        fast = _fast(findings.get(FAST))
        for name, short in NOTED.items():
            if name in findings and findings[name]["holds"] is None:
                notes.append(f"{short}: {_lower_first(findings[name]['detail'])}")
    if line["reason"]:
        notes.append(line["reason"])
    cells = [line["architecture"], line["class"], line["result"], fast, _clipped(" ".join(notes))]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _fast(finding: dict[str, Any] | None) -> str:
    if finding is None:
        return ""
    if finding["holds"]:
        return "yes"
    return "falls back: " + _clipped(
        finding["detail"].removeprefix("Edits use the plain path, which is slower: "), 110
    )


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _clipped(text: str, length: int = 260) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="architectures to ask, and to show in full"
    )
    parser.add_argument("--again", action="store_true", help="ask all anew")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=60, help="seconds for each architecture")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    kept = ROOT / "runs" / f"architectures-{transformers.__version__}.jsonl"
    if options.only:
        for name in options.only:
            line = survey(name)
            print(f"{name}: {line['result']} {line['reason']}")
            for finding in line.get("report", {}).get("findings", ()):
                print(
                    f"  {finding['name']}: {finding['holds']} {finding['difference']} {finding['detail']}"
                )
        return 0
    kept.parent.mkdir(exist_ok=True)
    if options.again:
        kept.unlink(missing_ok=True)
    lines = [json.loads(text) for text in kept.read_text().splitlines()] if kept.exists() else []
    done = {line["architecture"] for line in lines}
    names = [*model_types(), *(variant for line in lines for variant in _variants(line))]
    with kept.open("a") as file:
        for line in survey_all(
            [name for name in names if name not in done], options.jobs, options.limit
        ):
            print(
                f"{line['architecture']}: {line['result']} {_clipped(line['reason'])}", flush=True
            )
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
    options.output.write_text(table(lines), encoding="utf-8")
    return 1 if any(line["result"] == FAILS for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
