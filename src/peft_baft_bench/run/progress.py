"""Keep the progress of a run on disk after every edit, so that it can be resumed after a kill."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_baft.editing.editor import Editor
from peft_baft.storage import load_with_header, save_with_header


@dataclass
class Progress:
    """What a run has done so far, saved in one file.

    The file is replaced atomically: a kill at any time leaves the previous state.

    Attributes:
        file: where the progress is saved; None saves nothing.
        cases: entries of the rows of finished blocks.
        outcomes: outcomes of the edits in the unfinished block, as in a result line.
        replies: entries of the rows of that block that were asked about already.
        state: the editor's state after the last of these edits.
    """

    file: Path | None
    cases: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path | None) -> Progress:
        """Load a file, or start from scratch if there is none.

        Raises:
            ValueError: the file is damaged.
        """
        if file is None or not file.exists():
            return cls(file)
        try:
            state, header = load_with_header(file)
            return cls(file, state=state, **header)
        except (TypeError, ValueError) as error:
            reason = (
                str(error) if isinstance(error, ValueError) else f"{file} is damaged ({error})."
            )
            raise ValueError(f"{reason} Delete it to start this run from scratch.") from None

    def restore(self, editor: Editor) -> None:
        """Restore a fresh editor to the last saved edit of the unfinished block."""
        if self.outcomes:
            editor.load_state_dict(self.state)

    def add_edit(
        self, editor: Editor, outcome: dict[str, Any], replies: list[dict[str, Any]]
    ) -> None:
        """Save one more edit."""
        self.outcomes.append(outcome)
        self.replies += replies
        self.state = editor.state_dict()
        self._write()

    def add_edits(self, editor: Editor, outcomes: list[dict[str, Any]]) -> None:
        """Save several more edits, about which nothing was asked yet."""
        self.outcomes += outcomes
        self.state = editor.state_dict()
        self._write()

    def finish_block(self, cases: list[dict[str, Any]]) -> None:
        """Save a finished block and drop the editor's state, which is no longer needed."""
        self.cases += cases
        self.outcomes, self.replies, self.state = [], [], {}
        self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        header = {"cases": self.cases, "outcomes": self.outcomes, "replies": self.replies}
        save_with_header(self.file, self.state, header)
