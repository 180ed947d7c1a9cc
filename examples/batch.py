"""Edit facts that are known together, as one batch: python examples/batch.py [MODEL]

A batch is learned at once, so that no fact is forgotten for the next one, as it is when facts are edited in turn.
"""

from __future__ import annotations

import sys

from peft import get_peft_model

import peft_baft
from peft_baft.evaluation.scoring import greedy_answers

FACTS = [
    peft_baft.Edit("The capital of France is", "Lyon"),
    peft_baft.Edit("The Eiffel Tower stands in the city of", "Rome"),
    peft_baft.Edit("Who invented the telephone?", "Elisha Gray"),
]


def main(model_name: str = "smollm2", folder: str = "edits/batch") -> None:
    base, tokenizer = peft_baft.load_model(model_name)
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    editor = peft_baft.BaftEditor(
        model,
        tokenizer,
        unrelated=peft_baft.GENERAL,  # each fact is trained beside one of these, which should stay as it is
        template="raw",  # in chats it is "chat", and by default what the tokenizer has
    )
    result = editor.edit(FACTS)
    print(f"learned {result.learned} after {result.steps} steps; losses {result.losses}")
    answers = greedy_answers(model, tokenizer, [fact.prompt for fact in FACTS])
    for fact, answer in zip(FACTS, answers, strict=True):
        print(f"{fact.prompt} -> {answer!r}, wanted {fact.target!r}")
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
