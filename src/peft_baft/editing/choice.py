"""The editor that fits an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel

from peft_baft.adapter import BaftConfig
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.attached import AttachedEditor
from peft_baft.editing.baft import BaftEditor

# By the name of a kind of adapter, what makes its editor.
EDITORS: dict[str, Callable[..., AttachedEditor]] = {"baft": BaftEditor}


def editor_for(model: PeftModel, tokenizer: Any, *args: Any, **settings: Any) -> AttachedEditor:
    """Make the editor that fits the active adapter of a model: of plain BaFT, of another kind, or of another PEFT method.

    Args:
        model: a PeftModel with one active adapter. tokenizer: the model's own, a fast one.
        args, settings: further arguments of `BaftEditor`, `MemoryEditor` or `AdapterEditor`.

    Raises:
        TypeError, ValueError: as the editor.
    """
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    config = model.peft_config[active[0]] if active else None
    if isinstance(config, BaftConfig):
        return EDITORS[config.kind.name](model, tokenizer, *args, **settings)
    return AdapterEditor(model, tokenizer, *args, **settings)
