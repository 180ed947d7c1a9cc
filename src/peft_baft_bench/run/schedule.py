"""When edits are made and when questions are asked: single, continual and batched editing in one schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WHEN = ("after_all", "immediate")


@dataclass(frozen=True)
class Schedule:
    """Blocks of consecutive rows, each edited by its own editor.

    Args:
        edits: T, the number of edits, or of batches, that one editor makes in turn.
        batch_size: how many facts are learned together.
        when: `after_all` asks all questions after the last edit of a block; this is what a user of the edited
            model sees, and what the paper's tables report. `immediate` asks about each fact right after its
            edit, which favours editors that forget.

    Raises:
        TypeError, ValueError: a value is out of range.
    """

    edits: int = 1
    batch_size: int = 1
    when: str = "after_all"

    def __post_init__(self) -> None:
        for name in ("edits", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, not {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.when not in WHEN:
            raise ValueError(f"when must be one of {', '.join(WHEN)}, not {self.when!r}.")

    @property
    def name(self) -> str:
        """The usual name of the setting: single, continual or batched."""
        if self.batch_size > 1:
            return "batched"
        return "continual" if self.edits > 1 else "single"

    @property
    def block_size(self) -> int:
        """The number of rows in a block."""
        return self.edits * self.batch_size

    def blocks(self, first: int, last: int) -> list[range]:
        """Split the rows first…last-1 into whole blocks; rows of an incomplete last block are dropped.

        Raises:
            ValueError: there are not enough rows for one block.
        """
        if last - first < self.block_size:
            raise ValueError(
                f"{self.edits} edits of {self.batch_size} rows need {self.block_size} rows, but rows {first}:{last} are "
                f"{last - first}. Use more rows or fewer edits."
            )
        return [
            range(start, start + self.block_size)
            for start in range(first, last - self.block_size + 1, self.block_size)
        ]

    def describe(self) -> dict[str, Any]:
        """Return the schedule as it is written to a result line."""
        return {
            "name": self.name,
            "edits": self.edits,
            "batch_size": self.batch_size,
            "when": self.when,
        }
