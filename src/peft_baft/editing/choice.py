"""The choice of the editor for an adapter."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from peft_baft.adapter import BaftConfig
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.attached import AttachedEditor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def editor_for(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, *args: Any, **settings: Any
) -> AttachedEditor:
    """Create the editor for the active adapter of a model: a BaFT adapter of any kind, or one of another PEFT method.

    Args:
        model: a PeftModel with one active adapter. tokenizer: the model's fast tokenizer.
        args, settings: further arguments of `BaftEditor`, `MemoryEditor` or `AdapterEditor`.

    Raises:
        TypeError, ValueError: as the editor; or adapters of this kind have no editor.
    """
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    config = model.peft_config[active[0]] if active else None
    if not isinstance(config, BaftConfig):
        return AdapterEditor(model, tokenizer, *args, **settings)
    kind = config.kind
    if kind.editor is None:
        raise ValueError(f"Adapters of the kind {kind.name!r} have no editor.")
    module, _, name = kind.editor.partition(":")
    editor: AttachedEditor = getattr(import_module(module), name)(
        model, tokenizer, *args, **settings
    )
    return editor
