"""The command `baft`.

This package is separate from `peft_baft` because importing anything inside `peft_baft` runs `peft_baft/__init__.py`, which
registers the adapter type with PEFT and therefore imports torch, transformers and peft. That takes seconds, and `baft --help` or
a misspelt option should not wait for it. Modules here import only the standard library and typer. The work of each command is in
`peft_baft_cli.work`, which is imported once the command line has been parsed.
"""

from peft_baft_cli.run import main

__all__ = ["main"]
