"""Keep what was measured of a base model on this machine, so that the next memory on it need not measure anew."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_baft.loading import fingerprint
from peft_baft.memory.statistics import texts_read
from peft_baft.storage import load_with_header, save_with_header

logger = logging.getLogger(__name__)
FOLDER = "PEFT_BAFT_CACHE"  # an environment variable: where to keep it; empty to keep nothing
VERSION = 1  # of how keys are made of what is read


def kept_file(
    model: nn.Module, tokenizer: Any, dimensions: int, options: Mapping[str, Any] | None
) -> Path | None:
    """Return the file for a base model, tokenizer and size of keys; None where nothing is kept.

    A model whose weights are not at hand, offloaded or parted among processes, is measured each time.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = str(Path(home) / "peft_baft")
    weights = list(model.parameters())
    if not folder or any(w.is_meta or hasattr(w, "device_mesh") for w in weights):
        return None
    known = [
        VERSION,
        sha256("\n".join(texts_read()).encode()).hexdigest(),
        fingerprint(model),
        sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
        repr(getattr(tokenizer, "chat_template", None)),
        repr(getattr(model.generation_config, "eos_token_id", None))
        if hasattr(model, "generation_config")
        else None,
        dimensions,
        repr(options),
    ]
    digest = sha256(repr(known).encode()).hexdigest()[:32]
    return Path(folder) / f"measured-{digest}.safetensors"


def load_kept(file: Path | None) -> dict[str, Tensor] | None:
    """Read what was kept; None where there is nothing, or it is damaged."""
    if file is None or not file.exists():
        return None
    try:
        return load_with_header(file)[0]
    except (OSError, ValueError):
        return None


def keep(file: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Write what was measured; a folder that cannot be written to is no error."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_with_header(file, {n: t.cpu().contiguous() for n, t in tensors.items()}, {})
    except OSError as error:
        logger.info("What was measured of the model is not kept: %s", error)
