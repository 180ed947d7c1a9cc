"""Edit facts in turn with a journal, go on after an interruption, and roll back: python examples/continual_with_journal.py

With a model: python examples/continual_with_journal.py MODEL. `baft edit --resume` and `baft rollback` do the same.
"""

from __future__ import annotations

import sys
from itertools import islice

from peft import PeftModel, get_peft_model

import peft_baft

FACTS = [
    peft_baft.Edit("The capital of France is", "Lyon"),
    peft_baft.Edit("The Eiffel Tower stands in the city of", "Rome"),
    peft_baft.Edit("Who invented the telephone?", "Elisha Gray"),
]


def fresh_editor(model_name: str) -> peft_baft.BaftEditor:
    """Load the model as a new process does."""
    base, tokenizer = peft_baft.load_model(model_name)
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    return peft_baft.BaftEditor(model, tokenizer, unrelated=peft_baft.GENERAL, template="raw")


def main(model_name: str = "smollm2", folder: str = "edits/journal") -> None:
    journal = peft_baft.Journal(folder)
    for record in islice(
        peft_baft.edit_continually(fresh_editor(model_name), FACTS, journal=journal), 2
    ):
        print(f"made: {record.edits[0].prompt} {record.edits[0].target}, problem: {record.problem}")
    print("stopped after two, as a crash would")

    editor = fresh_editor(model_name)
    # What to do if something else changes.
    check = peft_baft.canary_check(editor.model, editor.tokenizer, 0.5)
    for record in peft_baft.edit_continually(
        editor, FACTS, journal=journal, resume=True, check=check
    ):
        print(
            f"made or recalled: {record.edits[0].prompt} {record.edits[0].target}, kept: {record.kept}"
        )
    editor.model.save_pretrained(folder)

    print(
        f"the journal holds {len(journal.state().edits)} edits, and the adapter after {journal.snapshots()}"
    )
    journal.roll_back(1)
    # With the first edit alone.
    PeftModel.from_pretrained(peft_baft.load_model(model_name)[0], folder)
    print(f"rolled back: the journal holds {len(journal.state().edits)} edit")


if __name__ == "__main__":
    main(*sys.argv[1:])
