"""The work of the command `baft`. Of this package, nothing outside this folder prints.

How the command line is read is in `peft_baft_cli`, beside this package, which imports nothing heavy. Each command is a
function here that takes plain values.
"""

from peft_baft_cli import main

__all__ = ["main"]
