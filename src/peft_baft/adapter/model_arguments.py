"""What a call of the causal language model tells about prompts: labels, prompt lengths, and how rows are packed."""

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
    """What one call of the base model tells about its prompts.

    Attributes:
        labels: (rows, tokens) long, -100 before each answer; None where there are none that tell where a prompt ends.
        prompt_lengths: as passed. wants_last_logits: whether the caller wants the logits of the last token only.
        packing: what tells how sequences are packed into rows, besides position ids.
        input_ids: (rows, tokens), where the stack of blocks may get embeddings made of them; None where there are none.
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

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> ModelArguments:
        """Read a call."""
        given = model_call.bind(self.names, args, kwargs)
        labels = model_call.answer_labels(given)
        if labels is not None and not labels_tell_answers(self._model):
            labels = None
        return ModelArguments(
            labels=labels,
            prompt_lengths=given.get("prompt_lengths"),
            wants_last_logits=model_call.wants_last_logits(self.names, args, kwargs),
            packing=model_call.packing_arguments(given),
            input_ids=ids if isinstance(ids := given.get("input_ids"), Tensor) else None,
        )


def labels_tell_answers(model: Any) -> bool:
    """Return whether the labels of a model are next tokens, as a causal language model's are, and not classes of tokens.

    Of a model that is not one of transformers', the task type of its adapters tells.
    """
    if hasattr(model, "can_generate"):
        return bool(model.can_generate())
    configs = [c for m in model.modules() for c in getattr(m, "configs", {}).values()]
    return any(getattr(config, "task_type", None) == "CAUSAL_LM" for config in configs)
