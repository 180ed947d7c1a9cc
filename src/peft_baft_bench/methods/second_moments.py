"""Second moments E[k kᵀ] of what enters some modules, from text that the unedited model writes: no download.

MEMIT and AlphaEdit weigh an edit's change by them, so that what is seldom an input of a matrix may be moved more. EasyEdit takes
100,000 texts of Wikipedia; a small part of these suffices (arXiv 2506.04226).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.written_texts import sample_texts
from peft_baft.loading import fingerprint
from peft_baft.running import full_logits, input_device
from peft_baft_bench.methods.locating import captured


def second_moments(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    tokens: int,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Compute the uncentred second moments of what enters some modules, over text that the model writes.

    The first token of each text is left out, since its inputs are of another size than all others.

    Args:
        model: unedited. names: of the modules. tokens: over how many tokens at least. seed: of what is written.
        folder: where they are kept; moments that lie there for the same model, tokens and seed are taken instead.
        progress: whether a bar is shown.

    Returns:
        By module (f, f) float32.

    Raises:
        ValueError: tokens is below 1, or the model writes no text.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}.")
    # Without a folder nothing is looked up.
    of_model = "" if folder is None else fingerprint(model, samples=None)
    known = {"model": of_model, "tokens": str(tokens), "seed": str(seed)}
    file = None if folder is None else Path(folder) / f"moments-{known['model']}.safetensors"
    if file is not None and file.exists():
        with safe_open(file, "pt") as kept:
            if kept.metadata() == known and set(names) <= set(kept.keys()):
                return {name: kept.get_tensor(name) for name in names}
    moments = _computed(model, tokenizer, names, tokens, seed, progress)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(moments, file, metadata=known)
    return moments


def _computed(
    model: Any, tokenizer: Any, names: Sequence[str], tokens: int, seed: int, progress: bool
) -> dict[str, Tensor]:
    """Compute the moments over the package's texts, and over what the model writes until there are tokens enough."""
    device = input_device(model)
    sums: dict[str, Tensor] = {}
    counted = 0
    bar = tqdm(
        total=tokens, desc="second moments", unit="token", disable=None if progress else True
    )
    cuda = [device] if device.type == "cuda" else []
    with bar, torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.manual_seed(seed)
        rows = [Tokens(tuple(ids), len(ids)) for ids in _brought(tokenizer)]
        while counted < tokens:
            new = 0
            for name, keys in _keys(model, tokenizer, names, rows).items():
                sums[name] = sums.get(name, 0) + keys.mT @ keys
                new = len(keys)
            if not new:
                raise ValueError(
                    f"{type(model).__name__} writes no text to take second moments over: it ends each one at once."
                )
            counted += new
            bar.update(min(new, tokens - bar.n))
            if counted < tokens:
                rows = sample_texts(model, tokenizer)
    return {name: (total / counted).cpu() for name, total in sums.items()}


def _keys(
    model: Any, tokenizer: Any, names: Sequence[str], rows: Sequence[Tokens]
) -> dict[str, Tensor]:
    """Collect what enters each module at every token of some texts but the first: (tokens, f) float32."""
    device = input_device(model)
    batch = collate(rows, padding_id(tokenizer))
    taken = batch["attention_mask"].bool()
    taken[:, 0] = False
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    with ExitStack() as stack:
        seen = {n: stack.enter_context(captured(model.get_submodule(n), len(rows))) for n in names}
        full_logits(model, **inputs)
    return {
        n: passes[0].input[taken.to(passes[0].input.device)].float() for n, passes in seen.items()
    }


def _brought(tokenizer: Any) -> list[list[int]]:
    """Tokenise the package's neutral texts."""
    found = [tokenizer(f"{text.prompt} {text.answer}")["input_ids"] for text in GENERAL]
    return [ids for ids in found if len(ids) > 1]
