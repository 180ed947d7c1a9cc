"""What a memory of edits costs in use, by how many edits it holds: prefill of 20 tokens, decoding, load time, bytes an edit."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from common import alternated, arguments, facts, load, machine, seconds, table
from peft import PeftModel, get_peft_model

import peft_baft
from peft_baft.adapter.matching import Question
from peft_baft.adapter.weights import FILE

SIZES = (1, 100, 1000, 10_000, 100_000)
NEW = 32  # tokens that are decoded


def filled(editor: Any, prompts: list[str], count: int) -> None:
    """Put made-up edits into a memory: questions of real words, of which three were drawn anew, with keys that were drawn."""
    generator = torch.Generator().manual_seed(count)
    tokens = [torch.tensor(editor.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    questions = []
    for number in range(count):
        ids = tokens[number % len(tokens)].clone()
        if number >= len(tokens):
            places = torch.randperm(len(ids), generator=generator)[:3]
            size = len(editor.tokenizer)
            ids[places] = torch.randint(size // 8, size, (len(places),), generator=generator)
        keys = torch.nn.functional.normalize(
            torch.randn(len(ids) - 1, 64, generator=generator), dim=1
        )
        questions.append(Question(ids.int(), (keys * 127).round().to(torch.int8)))
    editor.router.take(editor.router.with_questions(range(1, count + 1), questions))
    for part in editor._codes().values():
        part.take(part.with_codes(torch.randn(count, part.rank, generator=generator)))


def main() -> None:
    options = arguments(__doc__)
    bare, tokenizer = load(options)
    machine(options)
    prompts = [str(fact.prompt) for fact in facts(options, 0, 1000)]
    asked = next(p for p in prompts if len(tokenizer(p)["input_ids"]) == 20)
    ids = torch.tensor([tokenizer(asked)["input_ids"]], device=options.device)
    config = peft_baft.BaftConfig(memory=True, task_type="CAUSAL_LM")
    empty = get_peft_model(deepcopy(bare), config).eval()
    editor: Any = peft_baft.BaftEditor(empty, tokenizer, template="raw")
    nothing = editor.snapshot()
    models = {"bare": bare}
    with tempfile.TemporaryDirectory() as folder:
        for count in SIZES:
            nothing()
            filled(editor, prompts, count)
            place = Path(folder) / str(count)
            empty.save_pretrained(str(place))
            copy = deepcopy(bare)
            begin = seconds(
                lambda place=place, copy=copy: PeftModel.from_pretrained(copy, str(place))
            )
            model = PeftModel.from_pretrained(deepcopy(bare), str(place)).eval()
            models[f"T = {count}"] = model
            with torch.no_grad():
                first = seconds(lambda model=model: model(ids, logits_to_keep=1), options.device)
            size = (place / FILE).stat().st_size
            print(
                f"T = {count}: {size / count:.0f} bytes an edit, loaded in {begin:.2f} s, first prompt {first:.2f} s"
            )

    def prefill(model: Any) -> float:
        with torch.no_grad():
            return seconds(lambda: [model(ids, logits_to_keep=1) for _ in range(5)], options.device)

    def decode(model: Any) -> float:
        settings = {
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 0,
        }
        mask = torch.ones_like(ids)
        return seconds(
            lambda: model.generate(input_ids=ids, attention_mask=mask, **settings), options.device
        )

    for name, run in (
        ("prefill of 20 tokens, five times", prefill),
        (f"prefill and {NEW} tokens", decode),
    ):
        works = {kind: lambda model=model, run=run: run(model) for kind, model in models.items()}
        table(name, "s", alternated(works, options.rounds), "bare")


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
