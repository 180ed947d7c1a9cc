"""`baft check`."""

from __future__ import annotations

from json import dumps

from peft_baft.tools.check.check import check as check_model
from peft_baft_cli.errors import DONE, NOT_SO
from peft_baft_cli.options import CheckCommand
from peft_baft_cli.screen import doing
from peft_baft_cli.work.common import chosen_subject


def check(options: CheckCommand) -> int:
    """Print what holds for a model, and for an adapter on it; return the exit code."""
    subject = chosen_subject(options)
    base, tokenizer = subject.load_base()
    with doing("checking, which takes about a minute"):
        report = check_model(
            base, tokenizer, adapter=options.adapter, adapter_revision=options.adapter_revision
        )
    print(dumps(report.to_dict(), indent=2) if options.json else report)
    return DONE if report.ok else NOT_SO
