"""A memory of edits: it recognises a question and gives the stored answer. Importing it enables `BaftConfig(memory=...)`.

Nothing else in the package requires this folder. Without it and its command, plain BaFT works as before.
"""

from typing import TYPE_CHECKING, Any

from peft_baft.adapter.kinds import register_kind
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.kind import MEMORY

if TYPE_CHECKING:
    from peft_baft.memory.editor import MemoryEditor, MemoryMatch

register_kind(MEMORY)

__all__ = ["MemoryConfig", "MemoryEditor", "MemoryMatch"]


def __getattr__(name: str) -> Any:
    """Import the editor when it is first used: an adapter is loaded without it."""
    if name in ("MemoryEditor", "MemoryMatch"):
        from peft_baft.memory import editor

        return getattr(editor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
