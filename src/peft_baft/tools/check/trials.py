"""Run all trials of a check. Each finding has one function, in `place_trials` or `edit_trials`.

Most trials compare two ways to compute the same numbers. If these differ, the comparison is repeated with the unedited model: if
it differs as well, the adapter is not the reason. For example, a recurrent model may not mask padding in its state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

from peft_baft.adapter.state import without_adapters
from peft_baft.tools.check import edit_trials, place_trials
from peft_baft.tools.check.edit_trials import FAST, LEARNS, REACHED, RELOADS
from peft_baft.tools.check.findings import Finding
from peft_baft.tools.check.place_trials import CONTROL, PLACES, RUNS, UNEDITED_CANNOT, LogitPairs
from peft_baft.tools.check.tools import describe, largest_difference
from peft_baft.tools.check.tried_model import TriedModel

CAUSAL = "later tokens change nothing before them"
CACHED = "cached generation = one full forward"
LEFT = "generating from a left-padded batch = each row alone"
RIGHT = "a right-padded batch = each row alone"

__all__ = [
    "CACHED",
    "CAUSAL",
    "CONTROL",
    "FAST",
    "LEARNS",
    "LEFT",
    "PLACES",
    "REACHED",
    "RELOADS",
    "RIGHT",
    "RUNS",
    "run_trials",
]


def run_trials(tried: TriedModel) -> list[Finding]:
    """Run all trials. An error in one of them becomes the detail of its finding, and the next trial runs."""
    runs = _run_trial(RUNS, place_trials.runs, tried)
    if not runs.holds:
        return [runs]
    one_prompt = partial(place_trials.generated_and_single, tried.prompts[:1])
    all_prompts = partial(place_trials.generated_and_single, tried.prompts)
    trials: dict[str, Callable[[TriedModel], Finding]] = {
        CONTROL: place_trials.control,
        PLACES: place_trials.places,
        CAUSAL: partial(_equal, CAUSAL, place_trials.with_and_without_later_tokens),
        CACHED: partial(_equal, CACHED, one_prompt),
        LEFT: partial(_equal, LEFT, all_prompts),
        RIGHT: partial(_equal, RIGHT, place_trials.padded_and_single),
        REACHED: edit_trials.gradients_reach_blocks,
        FAST: edit_trials.fast_path_is_equal,
        LEARNS: edit_trials.loss_falls,
        RELOADS: edit_trials.reloads,
    }
    return [runs, *(_run_trial(name, trial, tried) for name, trial in trials.items())]


def _run_trial(name: str, trial: Callable[[TriedModel], Finding], tried: TriedModel) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trial(tried)
    except Exception as error:
        # Models may run arbitrary code, so any error is possible, and is a result.
        return Finding(name, False, detail=describe(error))


def _equal(name: str, compute: Callable[[TriedModel], LogitPairs], tried: TriedModel) -> Finding:
    """Test whether two ways compute the same logits, and if not, whether they do in the unedited model."""
    error: Exception | None = None
    try:
        difference = largest_difference(compute(tried))
    except Exception as raised:
        difference, error = math.inf, raised
    if difference <= tried.tolerance:
        return Finding(name, True, difference, tried.tolerance)
    shown = None if error else difference
    with without_adapters(tried.model):
        try:
            unedited = largest_difference(compute(tried))
        except Exception as raised:
            return Finding(
                name, None, shown, tried.tolerance, UNEDITED_CANNOT.format(describe(raised))
            )
    detail = describe(error) if error else ""
    unedited_differs = f"The unedited model differs by {unedited:.2g}."
    # A difference ten times as large as the unedited model's is not explained by that model.
    if unedited > tried.tolerance and (error or difference < 10 * unedited):
        return Finding(name, None, shown, tried.tolerance, f"{unedited_differs} {detail}".strip())
    return Finding(name, False, shown, tried.tolerance, detail or unedited_differs)
