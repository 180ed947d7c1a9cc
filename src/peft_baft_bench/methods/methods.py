"""Editing methods by name: resolve a name and settings to an object that creates editors.

A new method is one file in `methods/` with its `MethodSettings` and its `Editor`, and one entry in `METHODS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from peft import AdaLoraConfig, LoraConfig

from peft_baft.editing.presets import Preset
from peft_baft.editing.train import DescentConfig
from peft_baft_bench.methods.adapters import baft, other_adapter
from peft_baft_bench.methods.ft_m import FineTuning
from peft_baft_bench.methods.grace import Grace
from peft_baft_bench.methods.horen import Horen
from peft_baft_bench.methods.in_context import InContext
from peft_baft_bench.methods.melo import Melo
from peft_baft_bench.methods.memit import ALPHA_EDIT, Memit
from peft_baft_bench.methods.memoir import Memoir
from peft_baft_bench.methods.method import MethodSettings
from peft_baft_bench.methods.rome import Rome
from peft_baft_bench.methods.wise import Wise


@dataclass(frozen=True)
class Method:
    """A method as the user wrote it, such as `baft:lr=0.001`, and its settings."""

    name: str
    settings: MethodSettings


METHODS: dict[str, Callable[[Preset], MethodSettings]] = {
    "reft": partial(baft, weighting="none", unrelated=False),
    "ss-w": partial(baft, weighting="subspace", unrelated=False),
    "ba-w": partial(baft, weighting="basis", unrelated=False),
    "ss-w-lr": partial(baft, weighting="subspace"),
    "baft": partial(baft, weighting="basis"),
    "lora": partial(other_adapter, config_class=LoraConfig, r=8, lora_alpha=16),
    # EasyEdit's settings, used in the paper with a stop at a loss of 0.01 and 200 steps for a batch. Ranks are never pruned
    # there; PEFT only requires that `total_step` is set.
    "adalora": partial(
        other_adapter,
        config_class=AdaLoraConfig,
        r=8,
        init_r=12,
        lora_alpha=32,
        total_step=1000,
        target_modules=["q_proj", "v_proj"],
        descent=DescentConfig(lr=5e-3, max_steps=70, weight_decay=0.0),
        batch_descent=DescentConfig(lr=5e-3, max_steps=200, weight_decay=0.0),
    ),
    "ft-m": lambda preset: FineTuning(),
    "ft-l": lambda preset: FineTuning(objective="last_prompt_token"),
    "grace": lambda preset: Grace(),
    "rome": lambda preset: Rome(),
    "r-rome": lambda preset: Rome(mean_key=True),
    "memit": lambda preset: Memit(),
    "alphaedit": lambda preset: ALPHA_EDIT,
    "melo": lambda preset: Melo(),
    "wise": lambda preset: Wise(),
    "wise-light": lambda preset: Wise(subset=1 / 8),
    "memoir": lambda preset: Memoir(),
    "horen": lambda preset: Horen(),
    "in-context": lambda preset: InContext(),
}
GROUPS = {
    "table4": ("reft", "ss-w", "ba-w", "ss-w-lr", "baft"),  # the paper's ablation
    # the methods of the paper's comparison
    "paper": (
        "adalora",
        "ft-l",
        "rome",
        "memit",
        "grace",
        "melo",
        "wise",
        "wise-light",
        "reft",
        "baft",
    ),
    # the best methods since then, and simple baselines
    "leaders": ("memoir", "horen", "alphaedit", "ft-m", "lora", "in-context", "baft"),
}
GROUPS["all"] = tuple(dict.fromkeys((*GROUPS["paper"], *GROUPS["leaders"], "r-rome")))
if find_spec("peft_baft.memory"):  # peft_baft works without this folder
    from peft_baft_bench.methods.memory import Memory

    METHODS["memory"] = lambda preset: Memory()
    GROUPS["all"] += ("memory",)
UNEDITED = "none"


def parse_methods(
    names: str, preset: Preset, overrides: Mapping[str, Any] | None = None
) -> list[Method | None]:
    """Parse a list of methods like `baft,reft` or `table4`, each with optional settings: `baft:lr=0.001;r=4`.

    Args:
        preset: the initial settings of methods that have presets.
        overrides: settings of every method; those after a method's colon take precedence.

    Returns:
        The methods without duplicates; None stands for `none`, the unedited model.

    Raises:
        ValueError: a name or a setting is unknown.
    """
    expanded: list[str] = []
    for item in names.split(","):
        expanded += GROUPS.get(item.strip(), (item.strip(),))
    unique = dict.fromkeys(expanded)
    return [None if name == UNEDITED else parse_method(name, preset, overrides) for name in unique]


def parse_method(
    variant: str, preset: Preset, overrides: Mapping[str, Any] | None = None
) -> Method:
    """Parse one method and the settings after its colon."""
    name, _, rest = variant.partition(":")
    if name not in METHODS:
        known = ", ".join((UNEDITED, *METHODS, *GROUPS))
        raise ValueError(
            f"Unknown method {name!r}; known are {known}, each with settings as in baft:lr=0.001;r=4."
        )
    settings = METHODS[name](preset)
    chosen = dict(overrides or {}) | dict(_setting(text) for text in rest.split(";") if text)
    for key, value in chosen.items():
        try:
            settings = settings.with_setting(key, value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{variant}: {error}") from error
    return Method(variant, settings)


def _setting(text: str) -> tuple[str, Any]:
    """Parse `name=value`, where the value is JSON or plain text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"A setting must have the form name=value, as in lr=0.001, not {text!r}.")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value.strip()
