"""The memory of edits, as a method to be compared with others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from peft import get_peft_model

from peft_baft.adapter import BaftConfig
from peft_baft.editing.memory.editor import MEMORY_DESCENT, MemoryEditor
from peft_baft.editing.method import EditorSetup, MethodSettings
from peft_baft.editing.scope import NARROW, Scope
from peft_baft.editing.train import DescentConfig


@dataclass(frozen=True)
class Memory(MethodSettings):
    """Keep edits in a memory: each owns a code in a frozen basis, and a router picks one for a prompt, or none.

    Args:
        r, prompt_positions, key_dimensions, least_subject, strictness, most_unlike: as in `BaftConfig`.
        contexts, wordings: in how many each fact is taught besides, as in `Scope`.
        descent: how a code is learned.

    Raises:
        TypeError, ValueError: as `BaftConfig` and `Scope`.
    """

    r: int = 64
    prompt_positions: int = 3
    key_dimensions: int = 64
    least_subject: float = 0.72
    strictness: float = 0.4
    most_unlike: int = 1
    contexts: int = 0
    wordings: int = 0
    descent: DescentConfig = field(default_factory=lambda: MEMORY_DESCENT)
    seeded = False

    def __post_init__(self) -> None:
        self._config()
        self._scope()

    def _scope(self) -> Scope:
        return replace(NARROW, contexts=self.contexts, wordings=self.wordings)

    def _config(self) -> BaftConfig:
        of_config = set(self._own_settings()) - {"contexts", "wordings"}
        settings = {name: getattr(self, name) for name in of_config}
        return BaftConfig(task_type="CAUSAL_LM", memory=True, **settings)

    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> MemoryEditor:
        """Put an empty memory on `base`, and make its editor, which takes no unrelated text and draws no random numbers."""
        setup = setup or EditorSetup()
        return MemoryEditor(
            get_peft_model(base, self._config()).eval(),
            tokenizer,
            self.descent,
            processes=setup.processes,
            prepared=setup.prepared,
            template=setup.template,
            scope=self._scope(),
        )
