"""Judge edits of your own facts: did they take, do rephrasings follow, what else changed? python examples/judge_own_facts.py

With a model: python examples/judge_own_facts.py MODEL. `baft bench facts --data my_facts.jsonl` does this for whole files,
methods and schedules.
"""

from __future__ import annotations

import sys

from peft import get_peft_model

import peft_baft
from peft_baft.evaluation.before_after import watch

# The edit in other words.
CASES = [
    peft_baft.Case(
        peft_baft.Edit("The capital of France is", "Lyon"),
        (
            peft_baft.Probe("generality", "France's capital city is", "Lyon"),
            peft_baft.Probe("locality", "The capital of Italy is", "Rome"),  # what should stay
        ),
    ),
    peft_baft.Case(
        peft_baft.Edit("The Eiffel Tower stands in the city of", "Rome"),
        (peft_baft.Probe("locality", "The Statue of Liberty stands in", "New York"),),
    ),
]


def main(model_name: str = "smollm2") -> None:
    base, tokenizer = peft_baft.load_model(model_name)
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    editor = peft_baft.BaftEditor(model, tokenizer, unrelated=peft_baft.GENERAL, template="raw")

    compare = watch(model, tokenizer, CASES)  # asks before the edits
    editor.edit([case.edit for case in CASES])
    report = compare()  # asks again

    for answered in report.answers:
        print(
            f"{answered.prompt} -> {answered.after!r}; before {answered.before!r}, wanted {answered.wanted!r}"
        )
    print(
        f"reliability {report.reliability:.2f}: share of the targets' tokens that the model predicts"
    )
    print(f"generality {report.generality or 0:.2f}: the same, asked in other words")
    print(f"locality {report.locality:.2f}: share of the other answers' tokens that stayed")


if __name__ == "__main__":
    main(*sys.argv[1:])
