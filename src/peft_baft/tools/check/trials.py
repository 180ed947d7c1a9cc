"""What a check of a model tries: one function for each finding, in `place_trials` and `edit_trials`.

Most findings compare two ways to the same numbers. Where they differ, the unedited model is asked the same: a difference that it
has as well is its own, as of a recurrent model that takes padding into its state.
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
from peft_baft.tools.check.tools import in_words, largest_difference
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
    "findings_of",
]


def findings_of(tried: TriedModel) -> list[Finding]:
    """Try everything; what goes wrong within one trial is that finding's detail, and the next one is tried."""
    runs = _attempted(RUNS, place_trials.runs, tried)
    if not runs.holds:
        return [runs]
    one_prompt = partial(place_trials.generated_and_alone, tried.prompts[:1])
    all_prompts = partial(place_trials.generated_and_alone, tried.prompts)
    trials: dict[str, Callable[[TriedModel], Finding]] = {
        CONTROL: place_trials.control,
        PLACES: place_trials.places,
        CAUSAL: partial(_equal, CAUSAL, place_trials.with_and_without_later_tokens),
        CACHED: partial(_equal, CACHED, one_prompt),
        LEFT: partial(_equal, LEFT, all_prompts),
        RIGHT: partial(_equal, RIGHT, place_trials.padded_and_alone),
        REACHED: edit_trials.reached,
        FAST: edit_trials.fast,
        LEARNS: edit_trials.learns,
        RELOADS: edit_trials.reloads,
    }
    return [runs, *(_attempted(name, trial, tried) for name, trial in trials.items())]


def _attempted(name: str, trial: Callable[[TriedModel], Finding], tried: TriedModel) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trial(tried)
    except Exception as error:
        # Of code that nobody here has seen: it is what the user wants to know.
        return Finding(name, False, detail=in_words(error))


def _equal(name: str, pairs_of: Callable[[TriedModel], LogitPairs], tried: TriedModel) -> Finding:
    """Try whether two ways give the same logits; where they do not, whether they do in the unedited model."""
    error: Exception | None = None
    try:
        difference = largest_difference(pairs_of(tried))
    except Exception as raised:
        difference, error = math.inf, raised
    if difference <= tried.tolerance:
        return Finding(name, True, difference, tried.tolerance)
    shown = None if error else difference
    with without_adapters(tried.model):
        try:
            of_unedited = largest_difference(pairs_of(tried))
        except Exception as raised:
            return Finding(
                name, None, shown, tried.tolerance, UNEDITED_CANNOT.format(in_words(raised))
            )
    detail = in_words(error) if error else ""
    unedited_differs = f"The unedited model differs by {of_unedited:.2g}."
    # Ten times the unedited model's difference is more than its own weakness explains.
    if of_unedited > tried.tolerance and (error or difference < 10 * of_unedited):
        return Finding(name, None, shown, tried.tolerance, f"{unedited_differs} {detail}".strip())
    return Finding(name, False, shown, tried.tolerance, detail or unedited_differs)
