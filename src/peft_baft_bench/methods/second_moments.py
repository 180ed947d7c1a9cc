"""Second moments E[k kᵀ] of the inputs of modules, over model-generated text, so that nothing is downloaded.

MEMIT and AlphaEdit weight an edit's update by them, so that directions in which inputs are rare may change
more. EasyEdit uses 100,000 Wikipedia articles; a small fraction suffices (arXiv 2506.04226).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.written_texts import sample_texts
from peft_baft.loading import fingerprint
from peft_baft.running import full_logits, input_device
from peft_baft_bench.methods.locating import capture


def second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    tokens: int,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Compute the uncentred second moments of the inputs of modules, over model-generated text.

    The first token of each text is left out, since its activations are of a different magnitude.

    Args:
        model: the unedited model.
        names: the modules' names.
        tokens: the minimum number of tokens.
        seed: for the sampling.
        folder: where moments are saved; saved moments for the same model, tokens and seed are reused.
        progress: whether to show a progress bar.

    Returns:
        By module, (f, f) float32.

    Raises:
        ValueError: tokens is below 1, or the model generates no text.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}.")
    if folder is None:
        return _computed(model, tokenizer, names, tokens, seed, progress)
    model_hash = fingerprint(model, samples=None)
    metadata = {"model": model_hash, "tokens": str(tokens), "seed": str(seed)}
    file = Path(folder) / f"moments-{model_hash}.safetensors"
    if file.exists():
        with safe_open(file, "pt") as saved:
            if saved.metadata() == metadata and set(names) <= set(saved.keys()):
                return {name: saved.get_tensor(name) for name in names}
    moments = _computed(model, tokenizer, names, tokens, seed, progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(moments, file, metadata=metadata)
    return moments


def _computed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    tokens: int,
    seed: int,
    progress: bool,
) -> dict[str, Tensor]:
    """Compute the moments over the package's texts, then over generated texts until there are enough tokens."""
    device = input_device(model)
    sums: dict[str, Tensor] = {}
    counted = 0
    bar = tqdm(
        total=tokens, desc="second moments", unit="token", disable=None if progress else True
    )
    cuda = [device] if device.type == "cuda" else []
    with bar, torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.manual_seed(seed)
        rows = [Tokens(tuple(ids), len(ids)) for ids in _package_texts(tokenizer)]
        while counted < tokens:
            new = 0
            for name, keys in _keys(model, tokenizer, names, rows).items():
                sums[name] = sums.get(name, 0) + keys.mT @ keys
                new = len(keys)
            if not new:
                raise ValueError(
                    f"{type(model).__name__} generates no text to compute second moments over: each one ends at once."
                )
            counted += new
            bar.update(min(new, tokens - bar.n))
            if counted < tokens:
                rows = sample_texts(model, tokenizer)
    return {name: (total / counted).cpu() for name, total in sums.items()}


def _keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    rows: Sequence[Tokens],
) -> dict[str, Tensor]:
    """Collect the input of each module at every token except the first of each text: (tokens, f) float32."""
    device = input_device(model)
    batch = collate(rows, padding_id(tokenizer))
    mask = batch["attention_mask"].bool()
    mask[:, 0] = False
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    with ExitStack() as stack:
        seen = {n: stack.enter_context(capture(model.get_submodule(n), len(rows))) for n in names}
        full_logits(model, **inputs)
    return {
        n: passes[0].input[mask.to(passes[0].input.device)].float() for n, passes in seen.items()
    }


def _package_texts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise the package's neutral texts."""
    texts = [tokenizer(f"{text.prompt} {text.answer}")["input_ids"] for text in GENERAL]
    return [ids for ids in texts if len(ids) > 1]
