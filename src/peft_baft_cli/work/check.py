"""`baft check`."""

from __future__ import annotations

from json import dumps

from peft_baft.tools.check.check import check as check_model
from peft_baft_cli.errors import CHECK_FAILED, DONE
from peft_baft_cli.options import CheckCommand
from peft_baft_cli.screen import doing
from peft_baft_cli.work.common import chosen_model


def check(options: CheckCommand) -> int:
    """Check a model, with an adapter if one is given, and print the report; return the exit code."""
    choice = chosen_model(options)
    base, tokenizer = choice.load_base()
    with doing("checking, which takes about a minute"):
        report = check_model(
            base, tokenizer, adapter=options.adapter, adapter_revision=options.adapter_revision
        )
    print(dumps(report.to_dict(), indent=2) if options.json else report)
    return DONE if report.ok else CHECK_FAILED
