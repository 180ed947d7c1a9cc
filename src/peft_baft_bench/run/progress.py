"""A run that survives being killed: what is done is on disk, whole, after every edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_baft.editing.editor import Editor
from peft_baft.storage import load_with_header, save_with_header


@dataclass
class Progress:
    """What a run has done so far, in one file that is replaced as a whole: a kill at any instant leaves the last state.

    Attributes:
        file: where it is kept; None keeps nothing.
        cases: entries of the rows of finished blocks.
        outcomes: of the edits made in the block under way, as they stand in a result line.
        replies: of the same block, the entries of rows that were asked already.
        state: that of the editor after the last of these edits.
    """

    file: Path | None
    cases: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path | None) -> Progress:
        """Read what a file keeps, or make a new beginning.

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
            raise ValueError(
                f"{reason} Delete it to measure this run from its beginning."
            ) from None

    def restore(self, editor: Editor) -> None:
        """Bring a fresh editor to where the block under way had come."""
        if self.outcomes:
            editor.load_state_dict(self.state)

    def add_edit(
        self, editor: Editor, outcome: dict[str, Any], replies: list[dict[str, Any]]
    ) -> None:
        """Keep one more edit."""
        self.outcomes.append(outcome)
        self.replies += replies
        self.state = editor.state_dict()
        self._write()

    def add_edits(self, editor: Editor, outcomes: list[dict[str, Any]]) -> None:
        """Keep some more edits, of which nothing was asked yet."""
        self.outcomes += outcomes
        self.state = editor.state_dict()
        self._write()

    def finish_block(self, cases: list[dict[str, Any]]) -> None:
        """Keep a whole block; its editor's state is not needed any more."""
        self.cases += cases
        self.outcomes, self.replies, self.state = [], [], {}
        self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        header = {"cases": self.cases, "outcomes": self.outcomes, "replies": self.replies}
        save_with_header(self.file, self.state, header)
