"""`baft ask`."""

from __future__ import annotations

from json import dumps

from peft_baft.evaluation.scoring import greedy_answers
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import AskCommand
from peft_baft_cli.screen import doing, print_table
from peft_baft_cli.work.common import attach_adapter, chosen_subject


def ask(options: AskCommand) -> int:
    """Print the greedy answers to prompts without and with the edits; return the exit code."""
    subject = chosen_subject(options)
    base, tokenizer = subject.load_base()
    with doing("asking"):
        without = greedy_answers(base, tokenizer, options.prompts, options.max_new_tokens)
        edited = attach_adapter(base, options.adapter, options.adapter_revision)
        answers = greedy_answers(edited, tokenizer, options.prompts, options.max_new_tokens)
    rows = list(zip(options.prompts, without, answers, strict=True))
    if options.json:
        listed = [{"prompt": prompt, "without": old, "with": new} for prompt, old, new in rows]
        print(
            dumps({"model": subject.model, "adapter": options.adapter, "answers": listed}, indent=2)
        )
    else:
        print_table(("prompt", "without the edits", "with the edits"), rows)
    return DONE
