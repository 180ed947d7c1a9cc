"""One edit: CPU seconds a step, against the plain path, PEFT LoRA, and the machine's limit; short and long prompts."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from common import (
    alternated,
    arguments,
    bandwidth,
    bound,
    editor,
    facts,
    load,
    machine,
    plain_path,
    products,
    seconds,
    table,
)

import peft_baft
from peft_baft.editing.editor import encode_edits
from peft_baft.editing.fast_paths import open_forward

STEPS = 10


def step_seconds(base, tokenizer, edits, device, method, unrelated, plain) -> float:
    """Seconds a step, the session's opening included: so many steps of each edit, whatever its loss."""
    with plain_path() if plain else nullcontext():
        edited = editor(base, tokenizer, method, unrelated, max_steps=STEPS, stop_loss=0.0)
        try:
            return seconds(lambda: list(edited.edit_in_turn(edits)), device) / (
                len(edits) * (STEPS + 1)
            )
        finally:
            edited.model.unload()


def limits(base, tokenizer, edits, device, packing) -> float:
    """Seconds that a step's products with weights take alone, mean over the edits; prints the bytes they read."""
    edited, found = editor(base, tokenizer, "reft"), []
    try:
        for edit in edits:
            (rows,) = encode_edits(edited.model, edited.tokenizer, [edit])
            session = open_forward(edited.model, rows, [0], 0, 3)
            session.losses()
            found.append(bound(products(edited.model, session.losses), device, packing))
    finally:
        edited.model.unload()
    mean = sum(read for _, read in found) / len(found)
    print(
        f"\nweights read a step: {mean / 1e6:.0f} MB, at memory speed {mean / 1e9 / bandwidth(device):.4f} s"
    )
    return sum(spent for spent, _ in found) / len(found)


def main() -> None:
    options = arguments(__doc__, rows=10)
    base, tokenizer = load(options)
    machine(options)
    edits = facts(options, 0, options.rows)
    run = partial(step_seconds, base, tokenizer)
    works = {
        "reft": lambda: run(edits, options.device, "reft", (), False),
        "its products with weights alone": lambda: limits(
            base, tokenizer, edits, options.device, False
        ),
        "the same, weights packed": lambda: limits(base, tokenizer, edits, options.device, True),
        "reft, plain path": lambda: run(edits, options.device, "reft", (), True),
        "baft": lambda: run(edits, options.device, "baft", (), False),
        "baft, one unrelated text": lambda: run(
            edits, options.device, "baft", peft_baft.GENERAL, False
        ),
        "baft, one unrelated text, plain path": lambda: run(
            edits, options.device, "baft", peft_baft.GENERAL, True
        ),
        "PEFT LoRA r=8": lambda: run(edits, options.device, "lora", (), False),
    }
    table(f"ZsRE rows 0-{options.rows - 1}", "s a step", alternated(works, options.rounds), "reft")
    for length in (100, 200, 500):
        text = " ".join(
            ["It was a bright cold day in April, and the clocks were striking thirteen."] * 50
        )
        context = tokenizer.decode(tokenizer(text)["input_ids"][: length - 6])
        long = [peft_baft.Edit(f"{context} The capital of France is", "Lyon in the south")]
        works = {
            "reft": lambda long=long: run(long, options.device, "reft", (), False),
            "reft, plain path": lambda long=long: run(long, options.device, "reft", (), True),
            "PEFT LoRA r=8": lambda long=long: run(long, options.device, "lora", (), False),
        }
        table(f"a prompt of {length} tokens", "s a step", alternated(works, options.rounds), "reft")


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
