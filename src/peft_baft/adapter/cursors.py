"""Where the editors of a model's adapters are, such as in a list of texts that they take in turn.

The next edit depends on it as on the adapters, so a snapshot of these includes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary


@contextmanager
def restored_on_error(snapshot: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Put something back if the code inside raises, be it by an interrupt.

    Args:
        snapshot: remembers how it is, and returns what puts it back.
    """
    restore = snapshot()
    try:
        yield
    except BaseException:
        restore()
        raise


class HasCursor(Protocol):
    """Something with a position that edits move."""

    cursor: Any


class Cursors:
    """The cursors that belong to the adapters of one model. Their owners are held weakly; copies of the model have none."""

    def __init__(self) -> None:
        # By owner, where it began.
        self._beginnings: WeakKeyDictionary[HasCursor, Any] = WeakKeyDictionary()

    def add(self, owner: HasCursor) -> None:
        """Include the cursor of one more owner, as long as that exists."""
        self._beginnings[owner] = owner.cursor

    def snapshot(self) -> Callable[[], None]:
        """Remember all cursors; calling the result puts them back. Those of owners that came later begin again."""
        remembered = WeakKeyDictionary({owner: owner.cursor for owner in self._beginnings})

        def restore() -> None:
            for owner, beginning in list(self._beginnings.items()):
                owner.cursor = remembered.get(owner, beginning)

        return restore

    def __reduce__(self) -> tuple[type[Cursors], tuple[()]]:
        return Cursors, ()
