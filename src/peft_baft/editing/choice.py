"""The editor that fits an adapter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peft import PeftModel

from peft_baft.adapter import BaftConfig
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.attached import AttachedEditor


def editor_for(model: PeftModel, tokenizer: Any, *args: Any, **settings: Any) -> AttachedEditor:
    """Make the editor that fits the active adapter of a model: of plain BaFT, of another kind, or of another PEFT method.

    Args:
        model: a PeftModel with one active adapter. tokenizer: the model's own, a fast one.
        args, settings: further arguments of `BaftEditor`, `MemoryEditor` or `AdapterEditor`.

    Raises:
        TypeError, ValueError: as the editor; or nothing edits adapters of this kind.
    """
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    config = model.peft_config[active[0]] if active else None
    if not isinstance(config, BaftConfig):
        return AdapterEditor(model, tokenizer, *args, **settings)
    kind = config.kind
    if kind.editor is None:
        raise ValueError(f"Nothing edits adapters of the kind {kind.name!r}.")
    module, _, name = kind.editor.partition(":")
    editor: AttachedEditor = getattr(import_module(module), name)(
        model, tokenizer, *args, **settings
    )
    return editor
