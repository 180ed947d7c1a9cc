"""Editing with a PEFT adapter: BaFT, its ablations (Table 4), ReFT, and adapters of other types such as LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter import BaftConfig
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.baft import BaftEditor
from peft_baft.editing.objective import Objective
from peft_baft.editing.presets import Preset
from peft_baft.editing.scope import NARROW, Scope
from peft_baft.editing.train import DescentConfig
from peft_baft_bench.methods.method import EditorSetup, MethodSettings

# Settings of a BaFT config that are always written to result lines, including defaults.
BAFT_SETTINGS = (
    "r",
    "prompt_positions",
    "answer_positions",
    "weighting",
    "gate_norm",
    "gate_bias",
    "gate_offset",
    "layers_to_transform",
)


@dataclass(frozen=True)
class AdapterMethod(MethodSettings):
    """Settings of a method that trains a PEFT adapter.

    Args:
        config_class, config: the class of the adapter's config, and its arguments.
        descent, batch_descent: how one fact, and a batch of facts, is trained.
        objective: BaFT's regularisers; None for teacher forcing only.
        scope: the contexts in which facts are taught and, for BaFT and ReFT, the contrast texts.
        unrelated: whether unrelated text is used in training, where there is some.
    """

    config_class: Callable[..., PeftConfig] = BaftConfig
    config: dict[str, Any] = field(default_factory=dict)
    descent: DescentConfig = field(default_factory=DescentConfig)
    batch_descent: DescentConfig = field(default_factory=lambda: DescentConfig(max_steps=70))
    objective: Objective | None = field(default_factory=Objective)
    unrelated: bool = True
    scope: Scope = NARROW

    @property
    def side_by_side(self) -> bool:
        """Whether independent single edits can share forwards."""
        return self.objective is not None

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> AdapterEditor:
        """Attach a fresh adapter to `base` and create its editor."""
        setup = setup or EditorSetup()
        torch.manual_seed(setup.seed)
        model = get_peft_model(base, self.config_class(task_type="CAUSAL_LM", **self.config)).eval()
        if self.objective is None:
            return AdapterEditor(
                model,
                tokenizer,
                self.descent,
                self.batch_descent,
                processes=setup.processes,
                template=setup.template,
                scope=replace(self.scope, subjects=0, questions=0),
            )
        return BaftEditor(
            model,
            tokenizer,
            setup.unrelated if self.unrelated else (),
            self.objective,
            self.descent,
            self.batch_descent,
            processes=setup.processes,
            prepared=setup.prepared,
            template=setup.template,
            scope=self.scope,
        )

    def setting_names(self) -> set[str]:
        """List the settings that can be set by name, including the main ones of a BaFT config."""
        return super().setting_names() | set(BAFT_SETTINGS)

    def with_setting(self, name: str, value: Any) -> MethodSettings:
        """Return a copy with one setting changed: of the training or the objective, otherwise of the adapter's config."""
        config_names = {f.name for f in fields(self.config_class)}  # type: ignore[arg-type]
        if name in super().setting_names() or name not in config_names:
            return super().with_setting(name, value)
        return replace(self, config=self.config | {name: value})

    def _own_settings(self) -> list[str]:
        """Return an empty list: the fields of this class define the method and cannot be set by name."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return the resolved settings for a result line."""
        config = {"peft_type": self.config_class.__name__.removesuffix("Config"), **self.config}
        if self.config_class is BaftConfig:
            defaults = {name: getattr(BaftConfig(), name) for name in BAFT_SETTINGS}
            config = defaults | config
        settings: dict[str, Any] = {"config": config}
        if self.objective is not None:
            settings["objective"] = asdict(self.objective)
        if self.scope != NARROW:
            settings["scope"] = self.scope.described()
        return settings | {
            "descent": asdict(self.descent),
            "batch_descent": asdict(self.batch_descent),
        }


def baft(preset: Preset, *, unrelated: bool = True, **config: Any) -> AdapterMethod:
    """Create BaFT, or an ablation of it, with a preset's settings."""
    return AdapterMethod(
        config={**preset.config, **config},
        descent=preset.descent,
        batch_descent=preset.batch_descent,
        objective=preset.objective,
        unrelated=unrelated,
        scope=preset.scope,
    )


def other_adapter(
    preset: Preset,
    *,
    config_class: Callable[..., PeftConfig],
    descent: DescentConfig | None = None,
    batch_descent: DescentConfig | None = None,
    **config: Any,
) -> AdapterMethod:
    """Create a method for another PEFT type, trained by teacher forcing with the preset's descents unless given."""
    return AdapterMethod(
        config_class=config_class,
        config=config,
        descent=descent or preset.descent,
        batch_descent=batch_descent or preset.batch_descent,
        objective=None,
        unrelated=False,
        scope=preset.scope,
    )
