"""`baft chat`."""

from __future__ import annotations

import sys

from peft_baft.adapter.taught_form import warn_of_another
from peft_baft.evaluation.chatting import Conversation
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import ChatCommand
from peft_baft_cli.screen import shown
from peft_baft_cli.work.common import attach_adapter, chosen_model

HELP = "/unedited: answer the last question without the edits   /again: start over   /quit: end"


def chat(options: ChatCommand) -> int:
    """Chat with an edited model in the terminal, or answer the lines of a pipe; return the exit code."""
    choice = chosen_model(options)
    base, tokenizer = choice.load_base()
    model = attach_adapter(base, options.adapter, options.adapter_revision)
    conversation = Conversation(
        model, tokenizer, options.system, max_new_tokens=options.max_new_tokens
    )
    warn_of_another(choice.adapter, {"chat"}, tokenizer)
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
    """Read a line from the user; None at the end of the input."""
    try:
        return input("> " if in_terminal else "").strip()
    except EOFError:
        return None


def _reply(conversation: Conversation, line: str) -> str:
    """Return the answer to a line, or the result of a command. An error is returned as text, so that the chat continues."""
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
