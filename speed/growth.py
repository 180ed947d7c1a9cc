"""How the time of a step, and memory, grow with rank, number of blocks, prompt length and T."""

from __future__ import annotations

import resource

import torch
from common import alternated, arguments, facts, load, machine, seconds, table
from peft import get_peft_model

import peft_baft

STEPS = 5


def step_seconds(base, tokenizer, edits, device, **config) -> float:
    torch.manual_seed(0)
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM", **config))
    settings = peft_baft.DescentConfig(max_steps=STEPS, stop_loss=0.0)
    edited = peft_baft.BaftEditor(
        model,
        tokenizer,
        peft_baft.GENERAL,
        descent=settings,
        template="raw",
        scope=peft_baft.NARROW,
    )
    try:
        return seconds(lambda: list(edited.edit_in_turn(edits)), device) / (
            len(edits) * (STEPS + 1)
        )
    finally:
        model.unload()


def peak_memory(device: str) -> float:
    """MB, of the process or of the GPU, so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    options = arguments(__doc__, edits=100)
    base, tokenizer = load(options)
    machine(options)
    some = facts(options, 0, 3)
    depth = base.config.num_hidden_layers
    text = tokenizer(" ".join(["It was a bright cold day in April."] * 100))["input_ids"]

    def run(edits=some, **config):
        return lambda: step_seconds(base, tokenizer, edits, options.device, **config)

    ranks = {f"r = {r}": run(r=r) for r in (4, 12, 48)}
    table("rank", "s a step", alternated(ranks, options.rounds), "r = 4")
    blocks = {
        f"{n} block(s)": run(layers_to_transform=list(range(depth - n, depth)))
        for n in (1, 4, depth // 2, depth)
    }
    table(
        "blocks, counted from the last",
        "s a step",
        alternated(blocks, options.rounds),
        "1 block(s)",
    )
    long = {n: [peft_baft.Edit(tokenizer.decode(text[:n]), "Lyon")] for n in (10, 100, 300)}
    prompts = {f"{n} tokens": run(edits) for n, edits in long.items()}
    table("prompt", "s a step", alternated(prompts, options.rounds), "10 tokens")

    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    edited = peft_baft.BaftEditor(
        model, tokenizer, peft_baft.GENERAL, template="raw", scope=peft_baft.NARROW
    )
    print(
        "\n**T edits in turn, one adapter**\n\n| edits | s an edit | steps an edit | peak memory, MB |\n|---|---|---|---|"
    )
    done, turn = 0, edited.edit_in_turn(facts(options, 0, options.edits))
    for upto in (1, 10, 50, 100, 500, 1000):
        if upto <= options.edits:
            outcomes = [next(turn) for _ in range(upto - done)]
            mean = [
                sum(getattr(o, name) for o in outcomes) / len(outcomes)
                for name in ("seconds", "steps")
            ]
            print(
                f"| {done + 1} to {upto} | {mean[0]:.2f} | {mean[1]:.1f} | {peak_memory(options.device):.0f} |",
                flush=True,
            )
            done = upto


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
