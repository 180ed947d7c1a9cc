"""A memory of edits: it recognises a question and gives the stored answer. Importing it enables `BaftConfig(memory=...)`.

Nothing else in the package requires this folder. Without it and its command, plain BaFT works as before.
"""

from peft_baft.adapter.kinds import register_kind
from peft_baft.editing.choice import EDITORS
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.editor import MemoryEditor, MemoryMatch
from peft_baft.memory.kind import MEMORY

register_kind(MEMORY)
EDITORS[MEMORY.name] = MemoryEditor

__all__ = ["MemoryConfig", "MemoryEditor", "MemoryMatch"]
