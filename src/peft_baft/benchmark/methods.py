"""Editing methods by name: a name and some settings become an editor. A new method is an entry of the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model

from peft_baft.adapter import BaftConfig
from peft_baft.data.cases import Unrelated
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.baft import BaftEditor, Objective
from peft_baft.editing.presets import Preset
from peft_baft.editing.train import DescentConfig


@dataclass(frozen=True)
class Method:
    """How a benchmark edits.

    Args:
        name: as the user wrote it, settings included.
        config_class, config: the PEFT adapter, and the arguments it is made with.
        descent, batch_descent: how one fact, and a batch, is trained.
        objective: BaFT's regularisers; None for teacher forcing alone.
        unrelated: whether the method trains beside unrelated text where there is some.
    """

    name: str
    config_class: Callable[..., PeftConfig] = BaftConfig
    config: dict[str, Any] = field(default_factory=dict)
    descent: DescentConfig = field(default_factory=DescentConfig)
    batch_descent: DescentConfig = field(default_factory=lambda: DescentConfig(max_steps=70))
    objective: Objective | None = field(default_factory=Objective)
    unrelated: bool = True

    def start(
        self, base: Any, tokenizer: Any, unrelated: Sequence[Unrelated], seed: int, done: int = 0
    ) -> AdapterEditor:
        """An editor with a fresh adapter on `base`; `editor.model.unload()` takes it off again.

        Args:
            unrelated: the texts for this editor's edits, one each. seed: of the adapter's first weights.
            done: how many edits it has made before, if it goes on with a restored adapter.
        """
        torch.manual_seed(seed)
        model = get_peft_model(base, self.config_class(task_type="CAUSAL_LM", **self.config)).eval()
        if self.objective is None:
            return AdapterEditor(model, tokenizer, self.descent, self.batch_descent)
        texts = unrelated if self.unrelated else ()
        editor = BaftEditor(model, tokenizer, texts, self.objective, self.descent, self.batch_descent)
        editor.unrelated_used = done if texts else 0
        return editor

    def described(self) -> dict[str, Any]:
        """The settings, resolved, as they stand in a result line."""
        settings = {"config": {"peft_type": self.config_class.__name__.removesuffix("Config"), **self.config}}
        if self.config_class is BaftConfig:
            defaults = {f.name: f.default for f in fields(BaftConfig) if f.name in BAFT_SETTINGS}
            settings["config"] = defaults | settings["config"]
        if self.objective is not None:
            settings["objective"] = asdict(self.objective)
        return settings | {"descent": asdict(self.descent), "batch_descent": asdict(self.batch_descent)}


BAFT_SETTINGS = ("r", "prompt_positions", "weighting", "gate_norm", "gate_bias", "gate_offset", "layers_to_transform")
WITHOUT_GATES = {"weighting": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "reft": {"config": WITHOUT_GATES, "unrelated": False},
    "ss-w": {"config": {"weighting": "subspace"}, "unrelated": False},
    "ba-w": {"config": {"weighting": "basis"}, "unrelated": False},
    "ss-w-lr": {"config": {"weighting": "subspace"}},
    "baft": {"config": {"weighting": "basis"}},
    "lora": {"config_class": LoraConfig, "config": {"r": 8, "lora_alpha": 16}, "objective": None},
    "adalora": {
        "config_class": AdaLoraConfig,
        "config": {"r": 8, "init_r": 12, "lora_alpha": 32, "total_step": 1000},
        "objective": None,
    },
}
GROUPS = {"table4": ("reft", "ss-w", "ba-w", "ss-w-lr", "baft")}  # the paper's ablation
UNEDITED = "none"


def methods(names: str, preset: Preset) -> list[Method | None]:
    """The methods of a list like `baft,reft` or `table4`, each with settings if wanted: `baft:lr=0.001;r=4`.

    A setting is one of the adapter's config, of `Objective` or of `DescentConfig`. None stands for `none`: the unedited model.

    Raises:
        ValueError: a name or a setting is unknown.
    """
    wanted = [name for item in names.split(",") for name in GROUPS.get(item.strip(), (item.strip(),))]
    return [None if name == UNEDITED else method(name, preset) for name in dict.fromkeys(wanted)]


def method(variant: str, preset: Preset) -> Method:
    """One method of `METHODS` on top of a preset, with the settings after its colon."""
    name, _, rest = variant.partition(":")
    if name not in METHODS:
        known = ", ".join((UNEDITED, *METHODS, *GROUPS))
        raise ValueError(f"Unknown method {name!r}; known are {known}, each with settings as in baft:lr=0.001;r=4.")
    entry = METHODS[name]
    ours = entry.get("config_class", BaftConfig) is BaftConfig
    base = Method(variant, descent=preset.descent, batch_descent=preset.batch_descent, objective=preset.objective)
    base = replace(base, config=preset.config if ours else {})
    made = replace(base, **entry | {"config": base.config | entry.get("config", {})})
    for setting in filter(None, rest.split(";")):
        made = _with(made, *_setting(setting))
    return made


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"A setting reads name=value, as in lr=0.001, not {text!r}.")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value.strip()


def _with(made: Method, key: str, value: Any) -> Method:
    """The method with one more setting, wherever it belongs."""
    if key in {f.name for f in fields(DescentConfig)}:
        descents = {name: replace(getattr(made, name), **{key: value}) for name in ("descent", "batch_descent")}
        return replace(made, **descents)
    if made.objective is not None and key in {f.name for f in fields(Objective)}:
        return replace(made, objective=replace(made.objective, **{key: value}))
    config = {f.name for f in fields(made.config_class)}  # type: ignore[arg-type]
    if key in config:
        return replace(made, config=made.config | {key: value})
    own = {f.name for group in (DescentConfig, Objective) for f in fields(group)} | set(BAFT_SETTINGS)
    raise ValueError(f"{made.name}: unknown setting {key!r}; known are {', '.join(sorted(own))}.")
