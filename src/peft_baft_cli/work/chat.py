"""`baft chat`."""

from __future__ import annotations

import sys

from peft_baft.adapter.taught_form import warn_of_another
from peft_baft.evaluation.chatting import Conversation
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import ChatCommand
from peft_baft_cli.screen import shown
from peft_baft_cli.work.common import attach_adapter, chosen_subject

HELP = "/unedited: the last answer without the edits   /again: forget the conversation   /quit: end"


def chat(options: ChatCommand) -> int:
    """Talk to an edited model in the terminal, or answer the lines of a pipe; return the exit code."""
    subject = chosen_subject(options)
    base, tokenizer = subject.load_base()
    model = attach_adapter(base, options.adapter, options.adapter_revision)
    conversation = Conversation(
        model, tokenizer, options.system, max_new_tokens=options.max_new_tokens
    )
    warn_of_another(subject.adapter, {"chat"}, tokenizer)
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        print(HELP)
    while True:
        line = _next_line(in_terminal)
        if line is None or line == "/quit":
            return DONE
        if line:
            print(shown(_reply(conversation, line)), flush=True)


def _next_line(in_terminal: bool) -> str | None:
    """Read a line of the user; None at the end of the input."""
    try:
        return input("> " if in_terminal else "").strip()
    except EOFError:
        return None


def _reply(conversation: Conversation, line: str) -> str:
    """Do what a line says, and give the answer; what cannot be done is said, and the conversation goes on."""
    if line == "/again":
        conversation.restart()
        return "(forgotten)"
    try:
        if line == "/unedited":
            return f"(without the edits) {conversation.unedited()}"
        if line.startswith("/"):
            return f"(unknown command) {HELP}"
        return conversation.say(line)
    except ValueError as error:
        return f"({error})"
