"""When is edited, and when asked: single, continual and batched editing are one thing with three numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WHEN = ("after_all", "immediate")


@dataclass(frozen=True)
class Schedule:
    """Blocks of consecutive rows, each edited by an editor of its own.

    Args:
        edits: T, how many edits one editor makes in turn, or how many batches.
        batch_size: how many facts are learned at once.
        when: `after_all` asks everything after the last edit of a block, which is what a user of the edited model sees and what
            the paper's tables give; `immediate` asks each fact right behind its own edit, which is kinder to an editor
            that forgets.

    Raises:
        TypeError, ValueError: a value is out of its range.
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
        """The field's word for it."""
        if self.batch_size > 1:
            return "batched"
        return "continual" if self.edits > 1 else "single"

    @property
    def block(self) -> int:
        """Rows of one block."""
        return self.edits * self.batch_size

    def blocks(self, first: int, last: int) -> list[range]:
        """Cut the rows first…last-1 into whole blocks; rows of an unfinished last block are left out.

        Raises:
            ValueError: there are not enough rows for one block.
        """
        if last - first < self.block:
            raise ValueError(
                f"{self.edits} edits of {self.batch_size} rows need {self.block} rows, but rows {first}:{last} are "
                f"{last - first}. Take more rows or fewer edits."
            )
        return [
            range(start, start + self.block)
            for start in range(first, last - self.block + 1, self.block)
        ]

    def described(self) -> dict[str, Any]:
        """Give the schedule as it stands in a result line."""
        return {
            "name": self.name,
            "edits": self.edits,
            "batch_size": self.batch_size,
            "when": self.when,
        }
