"""The command `baft`. Nothing outside this folder prints."""

from peft_baft.cli.main import main

__all__ = ["main"]
