"""Cache the measurements of a base model on this machine, so that further memories on it do not repeat them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_baft.loading import fingerprint
from peft_baft.memory.statistics import measurement_texts
from peft_baft.storage import load_with_header, save_with_header

logger = logging.getLogger(__name__)
FOLDER_VARIABLE = (
    "PEFT_BAFT_CACHE"  # the environment variable with the folder; if empty, nothing is cached
)
VERSION = 1  # of the way in which keys are computed


def cache_file(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dimensions: int,
    options: Mapping[str, Any] | None,
) -> Path | None:
    """Return the cache file for a base model, tokenizer and number of key dimensions; None if nothing is cached.

    Models whose weights cannot be read here, because they are offloaded or sharded among processes, are not cached.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = str(Path(home) / "peft_baft")
    weights = list(model.parameters())
    if not folder or any(w.is_meta or hasattr(w, "device_mesh") for w in weights):
        return None
    end = None
    if hasattr(model, "generation_config"):
        end = repr(getattr(model.generation_config, "eos_token_id", None))
    inputs = [
        VERSION,
        _digest("\n".join(measurement_texts())),
        fingerprint(model),
        _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True)),
        repr(getattr(tokenizer, "chat_template", None)),
        end,
        dimensions,
        repr(options),
    ]
    return Path(folder) / f"measured-{_digest(repr(inputs))[:32]}.safetensors"


def load_cached(file: Path | None) -> dict[str, Tensor] | None:
    """Load cached measurements; None if there are none, or the file is damaged."""
    if file is None or not file.exists():
        return None
    try:
        return load_with_header(file)[0]
    except (OSError, ValueError):
        return None


def save_cached(file: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Save measurements. If the folder cannot be written to, log it and continue."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_with_header(file, {n: t.cpu().contiguous() for n, t in tensors.items()}, {})
    except OSError as error:
        logger.info("The measurements of the model could not be cached: %s", error)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
