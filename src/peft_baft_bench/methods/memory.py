"""The memory of edits, as a method for comparisons."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter import BaftConfig
from peft_baft.memory import MemoryConfig, MemoryEditor
from peft_baft_bench.methods.method import EditorSetup, MethodSettings


@dataclass(frozen=True)
class Memory(MethodSettings):
    """Store edits in a memory.

    A router selects at most one edit per prompt, and its answer is produced in closed form.

    Args:
        after, key_dimensions, least_subject, strictness, most_unlike: see `MemoryConfig`.

    Raises:
        TypeError, ValueError: as `MemoryConfig`.
    """

    after: str = "stop"
    key_dimensions: int = 64
    least_subject: float = 0.72
    strictness: float = 0.4
    most_unlike: int = 1
    seeded = False

    def __post_init__(self) -> None:
        self._config()

    def _config(self) -> BaftConfig:
        return BaftConfig(task_type="CAUSAL_LM", memory=MemoryConfig(**asdict(self)))

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> MemoryEditor:
        """Attach an empty memory to `base` and create its editor; it uses neither unrelated text nor random numbers."""
        setup = setup or EditorSetup()
        return MemoryEditor(
            get_peft_model(base, self._config()).eval(),
            tokenizer,
            processes=setup.processes,
            prepared=setup.prepared,
            template=setup.template,
        )
