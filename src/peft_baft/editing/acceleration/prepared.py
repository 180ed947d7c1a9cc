"""What is found out about one base model, and prepared from its weights, so that every edit need not do it again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peft_baft.adapter import find_context
from peft_baft.editing.acceleration.packed_linear import PackedWeight


@dataclass
class PreparedModel:
    """What edits of one base model share.

    The context of the model's BaFT adapters owns it, so that `unload()` frees the packed weights. Whoever makes several
    adapters on one base model in turn, as a benchmark does, makes one and hands it to each editor.

    Attributes:
        verified_length: up to how many tokens going on from a cache gave what a full forward gives; 0 if it was never tried.
        failed_length: from how many tokens on it did not; None if it always did.
        packed: packed copies of frozen weights, by layer.
        computed: what else methods computed with the unedited model, such as texts that it wrote, by all that it depends on.
    """

    verified_length: int = 0
    failed_length: int | None = None
    packed: dict[nn.Module, PackedWeight] = field(default_factory=dict)
    computed: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> PreparedModel:
        """Get what the context of the model's BaFT adapters owns."""
        context = find_context(model)
        assert context is not None, "a model with a BaFT adapter has a context"
        if context.prepared is None:
            context.prepared = cls()
        return context.prepared
