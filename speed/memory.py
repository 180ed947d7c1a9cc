"""What a memory of edits costs: teaching an edit, load time and bytes by the number of edits, prefill and decoding."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import alternated, arguments, facts, load, machine, seconds, table
from peft import PeftModel, get_peft_model

import peft_baft
from peft_baft.adapter.weights import FILE
from peft_baft.memory.tensors import StoredEdit, stored_edits

SIZES = (1, 100, 1000, 10_000)
TAUGHT = 200  # facts that are taught one after another
NEW = 32  # tokens that are decoded


def more_edits(taught: list[StoredEdit], count: int, vocabulary: int) -> list[StoredEdit]:
    """Make edits of others, with three tokens of their questions drawn anew."""
    generator, made = torch.Generator().manual_seed(count), []
    for number in range(count):
        edit = taught[number % len(taught)]
        question = torch.tensor(edit.question)
        if number >= len(taught):
            places = torch.randint(1, len(question), (3,), generator=generator)
            drawn = torch.randint(vocabulary // 8, vocabulary, (3,), generator=generator)
            question[places] = drawn
        made.append(replace(edit, number=number + 1, question=tuple(question.tolist())))
    return made


def main() -> None:
    options = arguments(__doc__)
    bare, tokenizer = load(options)
    machine(options)
    edits = facts(options, 0, TAUGHT)
    config = peft_baft.BaftConfig(memory=True, task_type="CAUSAL_LM")
    model = get_peft_model(deepcopy(bare), config).eval()
    editor: Any = None

    def measure() -> None:
        nonlocal editor
        editor = peft_baft.editor_for(model, tokenizer, template="raw")

    print(f"measuring the model, once for all memories on it: {seconds(measure):.1f} s")
    whole = seconds(lambda: [editor.edit([fact]) for fact in edits]) / len(edits)
    # Taught again: what says the tokens is known, and the questions' keys are made anew.
    again = seconds(lambda: [editor.edit([fact]) for fact in edits]) / len(edits)
    questions = [editor._question(fact.prompt) for fact in edits]
    keys = seconds(lambda: editor.part.make_keys(questions)) / len(edits)
    print(f"an edit: {1000 * whole:.1f} ms, of which keys {1000 * keys:.1f} ms")
    print(f"the same when its answer's tokens are known: {1000 * again:.1f} ms")

    taught = stored_edits(editor.part.tensors())
    prompts = [str(fact.prompt) for fact in edits]
    asked = min(prompts, key=lambda p: abs(len(tokenizer(p)["input_ids"]) - 20))
    ids = torch.tensor([tokenizer(asked)["input_ids"]], device=options.device)
    models = {"bare": bare}
    with tempfile.TemporaryDirectory() as folder:
        for count in SIZES:
            editor.part.keep_only([])
            editor.part.add(more_edits(taught, count, len(tokenizer)))
            place = Path(folder) / str(count)
            model.save_pretrained(str(place))
            copy = deepcopy(bare)
            begin = seconds(
                lambda place=place, copy=copy: PeftModel.from_pretrained(copy, str(place))
            )
            loaded = PeftModel.from_pretrained(deepcopy(bare), str(place)).eval()
            models[f"T = {count}"] = loaded
            with torch.no_grad():
                first = seconds(lambda m=loaded: m(ids, logits_to_keep=1), options.device)
            size = (place / FILE).stat().st_size
            print(f"T = {count}: {size} bytes, loaded in {begin:.2f} s, first prompt {first:.2f} s")

    def prefill(model: Any) -> float:
        with torch.no_grad():
            return seconds(lambda: [model(ids, logits_to_keep=1) for _ in range(5)], options.device)

    def decode(model: Any) -> float:
        lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
        mask = torch.ones_like(ids)
        return seconds(
            lambda: model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths
            ),
            options.device,
        )

    for name, run in (
        ("prefill of a prompt, five times", prefill),
        (f"prefill and {NEW} tokens", decode),
    ):
        works = {kind: lambda model=model, run=run: run(model) for kind, model in models.items()}
        table(name, "s", alternated(works, options.rounds), "bare")


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
