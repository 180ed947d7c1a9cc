"""A memory of edits: it recognises a question and says the taught answer. Importing it makes `BaftConfig(memory=...)` known.

Nothing else in the package imports this folder: delete it, its command and its docs, and plain BaFT works as before.
"""

from peft_baft.adapter.kinds import register_kind
from peft_baft.editing.choice import EDITORS
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.editor import MemoryEditor, MemoryMatch
from peft_baft.memory.kind import MEMORY

register_kind(MEMORY)
EDITORS[MEMORY.name] = MemoryEditor

__all__ = ["MemoryConfig", "MemoryEditor", "MemoryMatch"]
