"""What an adapter costs when the model is used: greedy decoding and prefill, against the bare model."""

from __future__ import annotations

from copy import deepcopy

import torch
from common import alternated, arguments, editor, load, machine, seconds, table


def drawn(model, batch: int, width: int, device: str) -> torch.Tensor:
    """Token ids (batch, width), always the same ones."""
    size, generator = model.config.vocab_size, torch.Generator().manual_seed(0)
    return torch.randint(min(100, size // 2), size, (batch, width), generator=generator).to(device)


def decode(model, batch: int, device: str) -> float:
    """Seconds for 32 new tokens after a prompt of 12."""
    ids = drawn(model, batch, 12, device)
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    return seconds(
        lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings),
        device,
    )


def prefill(model, batch: int, device: str) -> float:
    """Seconds for one forward over 256 tokens."""
    ids = drawn(model, batch, 256, device)
    with torch.no_grad():
        return seconds(lambda: model(input_ids=ids, logits_to_keep=1), device)


def main() -> None:
    options = arguments(__doc__)
    bare, tokenizer = load(options)
    machine(options)
    models = {"bare": bare}
    for method in ("reft", "baft"):
        edited = editor(deepcopy(bare), tokenizer, method).model
        models[method] = edited.requires_grad_(False)
    for name, run, batches in (("greedy decoding", decode, (1, 8)), ("prefill", prefill, (1, 4))):
        for batch in batches:
            works = {
                kind: lambda model=model, run=run, batch=batch: run(model, batch, options.device)
                for kind, model in models.items()
            }
            table(f"{name}, batch {batch}", "s", alternated(works, options.rounds), "bare")


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
