"""`baft ask`."""

from __future__ import annotations

from functools import partial
from json import dumps
from typing import Any

from peft_baft.data.batching import prompt_text
from peft_baft.evaluation.scoring import greedy_answers
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import AskCommand
from peft_baft_cli.screen import doing, print_table, shown
from peft_baft_cli.work.common import (
    adapter_folder,
    attach_adapter,
    chosen_form,
    chosen_model,
)


def ask(options: AskCommand) -> int:
    """Print the greedy answers to prompts with and without the edits; return the exit code."""
    choice = chosen_model(options)
    base, tokenizer = choice.load_base()
    template = chosen_form(options.template, tokenizer, choice.adapter)
    ask_model = partial(
        greedy_answers,
        tokenizer=tokenizer,
        prompts=options.prompts,
        max_new_tokens=options.max_new_tokens,
        template=template,
    )
    with doing("asking"):
        without = ask_model(base)
        model = attach_adapter(base, options.adapter, options.adapter_revision)
        matches = None
        if options.explain:
            from peft_baft_cli.work.memory import explained, require_memory_editor

            editor = require_memory_editor(model, tokenizer, template, options.adapter)
            folder = adapter_folder(options.adapter, options.adapter_revision)
            matches = explained(editor, options.prompts, folder)
        answers = ask_model(model)
    sent = [prompt_text(tokenizer, prompt, template=template) for prompt in options.prompts]
    rows = list(zip(options.prompts, without, answers, strict=True))
    if options.json:
        listed: list[dict[str, Any]] = [
            {"prompt": prompt, "without": old, "with": new} for prompt, old, new in rows
        ]
        if options.show_sent:
            listed = [row | {"sent": text} for row, text in zip(listed, sent, strict=True)]
        if matches is not None:
            listed = [row | {"match": match} for row, match in zip(listed, matches, strict=True)]
        report = {
            "model": choice.model,
            "adapter": options.adapter,
            "template": template.name,
            "answers": listed,
        }
        print(dumps(report, indent=2))
    else:
        if options.show_sent:
            for text in sent:
                print(f"sent: {shown(text)}")
        print_table(("prompt", "without the edits", "with the edits"), rows)
        if matches is not None:
            from peft_baft_cli.work.memory import print_explained

            print_explained(matches)
    return DONE
