"""What a call of the causal language model states about prompts: labels, prompt lengths, and how rows are packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor, nn

from peft_baft.adapter import model_call
from peft_baft.adapter.packing import Packing


@dataclass(frozen=True)
class ModelArguments:
    """What one call of the base model states about its prompts.

    Attributes:
        labels: (rows, tokens) long, -100 before each answer; None if there are none, or if they do not show where prompts end.
        prompt_lengths: as passed. wants_last_logits: whether the caller wants the logits of the last token only.
        packing: how sequences are packed into rows, apart from position ids.
        input_ids: (rows, tokens), since the stack of blocks may receive embeddings only; None if there are none.
    """

    labels: Tensor | None = None
    prompt_lengths: Any = None
    wants_last_logits: bool = False
    packing: Packing = field(default_factory=Packing)
    input_ids: Tensor | None = None


class ModelCallReader:
    """Reads the calls of one base model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.names = tuple(signature(model.forward).parameters)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelArguments:
        """Read a call."""
        given = model_call.bind(self.names, args, kwargs)
        ids = given.get("input_ids")
        labels = model_call.answer_labels(given)
        if labels is not None and not labels_are_tokens(self._model):
            labels = None
        return ModelArguments(
            labels=labels,
            prompt_lengths=given.get("prompt_lengths"),
            wants_last_logits=model_call.wants_last_logits(self.names, args, kwargs),
            packing=model_call.packing_arguments(given),
            input_ids=ids if isinstance(ids, Tensor) else None,
        )


def labels_are_tokens(model: Any) -> bool:
    """Return whether a model's labels are next tokens, as for a causal language model, and not classes of tokens.

    For a model that is not from transformers, the task type of its adapters decides.
    """
    if hasattr(model, "can_generate"):
        return bool(model.can_generate())
    return any(
        getattr(config, "task_type", None) == "CAUSAL_LM"
        for module in model.modules()
        for config in getattr(module, "configs", {}).values()
    )
