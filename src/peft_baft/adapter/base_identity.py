"""Which base model an adapter was made on, told by some values of its input embeddings.

They are kept in the adapter's config. What is compared is their direction: it stays what it is in another precision, quantised,
after a short fine-tuning and with more tokens, and has nothing in common with that of another model.
"""

from __future__ import annotations

import base64
import binascii
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

logger = logging.getLogger(__name__)
SAMPLE = 64  # values of a model's embeddings, by which it is told from other models
FIRST = 64  # tokens that nearly every model has, from which the sample in a config is taken
ALIKE = 0.7  # the least cosine of the samples of one model; those of two others have one of 0 ± 1/8
OTHER_BASE = (
    "This BaFT adapter was made on another base model (%s) than the one that it is put on now (%s): their input embeddings have "
    "nothing in common. Its edits mean nothing there. Load the model that it was made on, or edit again."
)


def embedding_sample(model: nn.Module, rows: int = 5 * SAMPLE) -> Tensor | None:
    """Take values of a model's input embeddings at fixed places, (64,) float32; None where they are not at hand.

    Args:
        rows: those of the first so many tokens.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model that does not say which they are
        return None
    # An adapter that trains the embeddings has a copy of them.
    weight: Any = getattr(getattr(embeddings, "original_module", embeddings), "weight", None)
    if type(weight) not in (Tensor, nn.Parameter):
        return None  # none, parted among processes, or quantised
    if weight.is_meta or weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        return None  # offloaded, parted among processes, or quantised
    tokens, width = weight.shape
    numbers = torch.arange(SAMPLE, device=weight.device)
    chosen = weight.detach()[5 * numbers % min(tokens, rows), 11 * numbers % width]
    return chosen.float().cpu()


def identify_base(model: nn.Module, config: BaftConfig) -> None:
    """Note in a new adapter's config which base model it is made on; warn where a saved one is put on another.

    Configs from before there was such a note, and models whose embeddings are not at hand, pass.

    Raises:
        ValueError: it is put on another one, and its kind of adapter can only be wrong there.
    """
    # The first tokens stay where they are when others are added.
    sample = embedding_sample(model, rows=FIRST)
    if sample is None or not sample.isfinite().all() or not sample.any():
        return
    if config.base_sample is None:
        if not config.comes_from_a_file:
            config.base_sample = to_text(sample)
        return
    if torch.cosine_similarity(to_sample(config.base_sample), sample, dim=0) < ALIKE:
        name = getattr(model, "name_or_path", None) or type(model).__name__
        names = config.base_model_name_or_path or "of unknown name", name
        if config.kind.needs_same_base:
            raise ValueError(OTHER_BASE % names)
        logger.warning(OTHER_BASE, *names)


def to_text(sample: Tensor) -> str:
    """Write a sample, scaled to a root mean square of one, as text for a config."""
    scaled = sample / sample.square().mean().sqrt()
    return base64.b64encode(scaled.half().numpy().tobytes()).decode()


def to_sample(text: str) -> Tensor:
    """Read what `to_text` wrote, (64,) float32.

    Raises:
        ValueError: it did not write this.
    """
    try:
        values = bytearray(base64.b64decode(text, validate=True))
        sample = torch.frombuffer(values, dtype=torch.float16).float()
    except (binascii.Error, ValueError):
        sample = torch.empty(0)
    if len(sample) != SAMPLE or not sample.isfinite().all() or not sample.any():
        raise ValueError(
            f"base_sample must hold {SAMPLE} finite numbers as text, as a saved adapter has it, not {text!r:.60}."
        )
    return sample
