"""Recognise the base model that an adapter was created on by some values of its input embeddings.

The values are stored in the adapter's config, and their direction is compared: it survives another precision, quantisation, a
short fine-tuning and additional tokens, but is unrelated to that of another model.
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
SAMPLE = 64  # the number of values
FIRST = 64  # the number of first tokens that the sample in a config is taken from; nearly every model has them
ALIKE = 0.7  # the lowest cosine for samples of one model; for two unrelated models it is 0 ± 1/8
OTHER_BASE = (
    "This BaFT adapter was made on another base model (%s) than the one it is being loaded on (%s): their input embeddings are "
    "unrelated. Its edits are meaningless there. Load the model that it was made on, or edit again."
)


def embedding_sample(model: nn.Module, rows: int = 5 * SAMPLE) -> Tensor | None:
    """Return values of a model's input embeddings at fixed places, (64,) float32; None if they are not available.

    Args:
        rows: the number of first tokens to take them from.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # the model does not declare them
        return None
    # An adapter that trains the embeddings wraps them.
    weight: Any = getattr(getattr(embeddings, "original_module", embeddings), "weight", None)
    if type(weight) not in (Tensor, nn.Parameter):
        return None  # missing, sharded over processes, or quantised
    if weight.is_meta or weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        return None  # offloaded, sharded over processes, or quantised
    tokens, width = weight.shape
    numbers = torch.arange(SAMPLE, device=weight.device)
    chosen: Tensor = weight.detach()[5 * numbers % min(tokens, rows), 11 * numbers % width]
    return chosen.float().cpu()


def identify_base(model: nn.Module, config: BaftConfig) -> None:
    """Record the base model in a new adapter's config; warn if a saved adapter is loaded on another model.

    Configs without a sample and models whose embeddings are not available are accepted.

    Raises:
        ValueError: it is loaded on another model, and its kind of adapter requires the same one.
    """
    # The first tokens keep their rows when others are added.
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
    """Encode a sample, scaled to unit root mean square, as text for a config."""
    scaled = sample / sample.square().mean().sqrt()
    return base64.b64encode(scaled.half().numpy().tobytes()).decode()


def to_sample(text: str) -> Tensor:
    """Decode what `to_text` returned, (64,) float32.

    Raises:
        ValueError: the text is something else.
    """
    try:
        values = bytearray(base64.b64decode(text, validate=True))
        sample = torch.frombuffer(values, dtype=torch.float16).float()
    except (binascii.Error, ValueError):
        sample = torch.empty(0)
    if len(sample) != SAMPLE or not sample.isfinite().all() or not sample.any():
        raise ValueError(
            f"base_sample must hold {SAMPLE} finite numbers, encoded as in a saved adapter, not {text!r:.60}."
        )
    return sample
