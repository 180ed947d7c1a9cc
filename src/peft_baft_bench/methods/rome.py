"""ROME: one rank-1 change of one MLP down projection an edit (arXiv 2202.05262), as EasyEdit runs it on Llama models.

    W ← W + (v - W k) uᵀ / (uᵀ k)        so that afterwards W k = v

k is the key of the bare prompt, u the direction of its mean over contexts, and v what should leave the projection so that
the answer is said. No second moments are used (`mom2_adjustment: false`, the setting for Llama).

Differences from EasyEdit on purpose: `mean_key` takes the mean over contexts for k as well (R-ROME, arXiv 2403.07175), which
mends that repeated edits break the model; the contexts are written once an editor, with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_baft.data.cases import Edit
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import EditResult
from peft_baft_bench.methods.in_place import InTurnEditor
from peft_baft_bench.methods.locating import (
    Search,
    keys_and_outputs,
    locate,
    search_target,
    written_once,
)
from peft_baft_bench.methods.low_rank import LowRankChanges
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection, require_layer

EASYEDIT_BLOCK = 5  # of a model of 32, counted from 0
PREFIX_TOKENS = (5, 10)


@dataclass(frozen=True)
class Rome(MethodSettings):
    """Write each edit into one down projection as a change of rank 1 (ROME), by default with EasyEdit's settings.

    Args:
        layer: block whose down projection is changed, counted from 0; by default EasyEdit's 5 of 32 scaled to the model.
        mean_key: whether the key that is divided by is the mean over contexts too, which is R-ROME.
        contexts: how many texts of 5 and of 10 tokens, which the model writes, stand before the prompt in turn; 0 for none.
        search: how the vector that says the answer is found.

    Raises:
        TypeError: layer is no integer. ValueError: contexts is no integer of at least 0.
    """

    layer: int | None = None
    mean_key: bool = False
    contexts: int = 10
    search: Search = field(default_factory=Search)

    seeded = False

    def __post_init__(self) -> None:
        require_layer(self.layer, "rome")
        if type(self.contexts) is not int or self.contexts < 0:
            raise ValueError(
                f"rome: contexts must be an integer of at least 0, not {self.contexts!r}."
            )

    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> RomeEditor:
        """Make an editor of `base`. ROME takes no unrelated text; the edits of a batch are made one after another.

        Where several processes share the facts of a batch, each one makes all of them, and they come out alike.
        """
        setup = setup or EditorSetup()
        return RomeEditor(base, tokenizer, self, setup.template, setup.prepared)


class RomeEditor(InTurnEditor):
    """Changes one weight of a model by a matrix of rank 1 an edit; an `Editor`. Its edits need a subject.

    template: the form in which facts are taught. prepared: what editors of one base model share.

    Raises:
        ValueError: the block does not exist, has not one down projection under a known name, or a quantised one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Rome,
        template: Template = RAW,
        prepared: EditCache | None = None,
    ) -> None:
        super().__init__(model, tokenizer, template)
        self.settings = settings
        self.module_name = down_projection(model, settings.layer, EASYEDIT_BLOCK, "rome")
        self._module: nn.Module = model.get_submodule(self.module_name)
        self.changes = LowRankChanges(model, [self.module_name], "rome")
        self._prepared = prepared or EditCache()

    def _unedited_prefixes(self) -> list[str]:
        """Let the model write contexts as it was before the first edit, so that they are the same after every edit."""
        lengths = tuple((tokens, self.settings.contexts) for tokens in PREFIX_TOKENS)
        try:
            self.changes.take_off()
            return written_once(self.model, self.tokenizer, lengths, self._prepared)
        finally:
            self.changes.put_on()

    def _learn(self, fact: Edit) -> EditResult:
        """Write one fact into the weight."""
        parts, before = (self.model, self.tokenizer), self._unedited_prefixes()
        located = locate(*parts, fact, before, "rome", self._template)
        found = search_target(*parts, self.module_name, located, self.settings.search)
        keys, output = keys_and_outputs(*parts, self._module, self._module, located)
        direction = keys.mean(0) / keys.mean(0).norm()
        key = keys.mean(0) if self.settings.mean_key else keys[0]
        left = (found.target - output) / (direction @ key)
        self.changes.add(self.module_name, left[None], direction[None])
        return found.result

    def save_lora(self, folder: str | Path) -> None:
        """Save the edits as a LoRA of rank 1 an edit; as `LowRankChanges.save_lora`."""
        self.changes.save_lora(folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the two factors of the weight's change; as `LowRankChanges.state_dict`."""
        return self.changes.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.changes.load_state_dict(state)

    def remove(self) -> None:
        """Write the original weight back."""
        self.changes.take_off()
