"""The command `baft`.

This package stands beside `peft_baft`, not inside it, for one reason: importing anything inside `peft_baft` runs
`peft_baft/__init__.py`, which makes PEFT know the adapter type and so imports torch, transformers and peft. That takes
seconds, and `baft --help` or a misspelt option should not wait for it. Modules here import the standard library and
typer alone; the work of each command is in `peft_baft_cli.work`, imported once the command line is known to be good.
"""

from peft_baft_cli.run import main

__all__ = ["main"]
