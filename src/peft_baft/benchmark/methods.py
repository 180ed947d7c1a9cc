"""Editing methods by name: a name and some settings become what starts editors.

A new method is one file, in `baselines/`, with a frozen dataclass of its settings, and one entry of `METHODS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol

from peft import AdaLoraConfig, LoraConfig

from peft_baft.baselines.adapters import BAFT_SETTINGS, AdapterMethod, baft, other_adapter
from peft_baft.baselines.ft_m import FineTuning
from peft_baft.data.cases import Unrelated
from peft_baft.editing.acceleration.prepared import PreparedModel
from peft_baft.editing.editor import Editor
from peft_baft.editing.presets import Preset
from peft_baft.processes import Processes


class MethodSettings(Protocol):
    """Settings of an editing method: a frozen dataclass whose fields, also nested ones, the user may set by name."""

    def start(
        self,
        base: Any,
        tokenizer: Any,
        unrelated: Sequence[Unrelated] = (),
        *,
        seed: int = 0,
        processes: Processes | None = None,
        prepared: PreparedModel | None = None,
    ) -> Editor:
        """Make an editor of `base`, which has no edit yet; `editor.remove()` gives `base` back.

        Args:
            unrelated: the texts for this editor's edits, one each.
            seed: of the first weights, where they are random.
            processes: those that share the facts of each batch.
            prepared: what editors of this base model share.
        """
        ...

    def described(self) -> dict[str, Any]:
        """Give the settings, resolved, as they stand in a result line."""
        ...


@dataclass(frozen=True)
class Method:
    """A method as the user wrote it, `baft:lr=0.001`, and its settings."""

    name: str
    settings: MethodSettings

    @property
    def side_by_side(self) -> bool:
        """Whether its editors can make independent single edits in the same forwards."""
        return bool(getattr(self.settings, "side_by_side", False))


METHODS: dict[str, Callable[[Preset], MethodSettings]] = {
    "reft": partial(baft, weighting="none", unrelated=False),
    "ss-w": partial(baft, weighting="subspace", unrelated=False),
    "ba-w": partial(baft, weighting="basis", unrelated=False),
    "ss-w-lr": partial(baft, weighting="subspace"),
    "baft": partial(baft, weighting="basis"),
    "lora": partial(other_adapter, config_class=LoraConfig, r=8, lora_alpha=16),
    "adalora": partial(
        other_adapter, config_class=AdaLoraConfig, r=8, init_r=12, lora_alpha=32, total_step=1000
    ),
    "ft-m": lambda preset: FineTuning(),
}
GROUPS = {"table4": ("reft", "ss-w", "ba-w", "ss-w-lr", "baft")}  # the paper's ablation
UNEDITED = "none"


def methods(
    names: str, preset: Preset, overrides: Mapping[str, Any] | None = None
) -> list[Method | None]:
    """Read a list of methods like `baft,reft` or `table4`, each with settings if wanted: `baft:lr=0.001;r=4`.

    Args:
        preset: what methods that have presets begin with.
        overrides: settings of every method, which those behind a colon override.

    Returns:
        The methods, each once; None stands for `none`, the unedited model.

    Raises:
        ValueError: a name or a setting is unknown.
    """
    wanted: list[str] = []
    for item in names.split(","):
        wanted += GROUPS.get(item.strip(), (item.strip(),))
    unique = dict.fromkeys(wanted)
    return [None if name == UNEDITED else method(name, preset, overrides) for name in unique]


def method(variant: str, preset: Preset, overrides: Mapping[str, Any] | None = None) -> Method:
    """Read one method, with the settings after its colon."""
    name, _, rest = variant.partition(":")
    if name not in METHODS:
        known = ", ".join((UNEDITED, *METHODS, *GROUPS))
        raise ValueError(
            f"Unknown method {name!r}; known are {known}, each with settings as in baft:lr=0.001;r=4."
        )
    settings = METHODS[name](preset)
    chosen = dict(overrides or {}) | dict(_setting(text) for text in rest.split(";") if text)
    for key, value in chosen.items():
        changed = with_setting(settings, key, value)
        if changed is None:
            known = ", ".join(sorted(_setting_names(settings)))
            raise ValueError(f"{variant}: unknown setting {key!r}; known are {known}.")
        settings = changed
    return Method(variant, settings)


def _setting(text: str) -> tuple[str, Any]:
    """Read `name=value`, whose value is JSON or a text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"A setting reads name=value, as in lr=0.001, not {text!r}.")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value.strip()


def with_setting(settings: Any, key: str, value: Any) -> Any:
    """Set one setting wherever it belongs: in the dataclass, in each one nested in it, or in an adapter's config.

    Returns:
        The changed settings, or None where none has that name.
    """
    own, nested = _own_and_nested(settings)
    if key in own:
        return replace(settings, **{key: value})
    changes = {}
    for name in nested:
        part = getattr(settings, name)
        if key in {f.name for f in fields(part)}:
            changes[name] = replace(part, **{key: value})
    if changes:
        return replace(settings, **changes)
    if isinstance(settings, AdapterMethod) and key in settings.config_fields():
        return replace(settings, config=settings.config | {key: value})
    return None


def _own_and_nested(settings: Any) -> tuple[list[str], list[str]]:
    """List the fields that a user may set, and those that hold settings of their own.

    The fields of an AdapterMethod itself say what the method is, and none of them is for the user.
    """
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    nested = [
        name
        for name, value in values.items()
        if is_dataclass(value) and not isinstance(value, type)
    ]
    if isinstance(settings, AdapterMethod):
        return [], nested
    return [name for name in values if name not in nested], nested


def _setting_names(settings: Any) -> set[str]:
    """List the names that `with_setting` knows; of an adapter's config, those of BaFT."""
    own, nested = _own_and_nested(settings)
    names = set(own)
    for name in nested:
        names |= {f.name for f in fields(getattr(settings, name))}
    return names | (set(BAFT_SETTINGS) if isinstance(settings, AdapterMethod) else set())
