"""ROME: each edit is a rank-1 update of one MLP down projection (arXiv 2202.05262), as EasyEdit runs it on Llama.

    W ← W + (v - W k) uᵀ / (uᵀ k)        so that afterwards W k = v

k is the key of the bare prompt, u the direction of the mean key over contexts, and v the output of the
projection with which the model gives the answer. No second moments are used (`mom2_adjustment: false`,
EasyEdit's setting for Llama).

Deliberate differences from EasyEdit: with `mean_key`, k is the mean over contexts too (R-ROME, arXiv
2403.07175), which prevents repeated edits from breaking the model; the contexts are generated once per
editor, with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.cases import Edit
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import EditResult
from peft_baft_bench.methods.in_place import InTurnEditor
from peft_baft_bench.methods.locating import (
    Search,
    cached_prefixes,
    keys_and_outputs,
    locate_fact,
    search_target,
)
from peft_baft_bench.methods.low_rank import LowRankChanges
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection
from peft_baft_bench.methods.validation import require_integer, require_layer

EASYEDIT_BLOCK = 5  # of a model of 32, counted from 0
PREFIX_TOKENS = (5, 10)


@dataclass(frozen=True)
class Rome(MethodSettings):
    """Write each edit into one down projection as a rank-1 update, by default with EasyEdit's settings for ROME.

    Args:
        layer: the block whose down projection is changed, counted from 0; by default EasyEdit's 5 of 32,
            scaled to the model.
        mean_key: whether the update is divided by the mean key over contexts (R-ROME) instead of the bare
            prompt's key.
        contexts: how many model-generated texts of 5 and of 10 tokens are used as prefixes of the prompt; 0
            for none.
        search: how the target output of the projection is searched for.

    Raises:
        TypeError: layer is not an integer.
        ValueError: contexts is not an integer of at least 0.
    """

    layer: int | None = None
    mean_key: bool = False
    contexts: int = 10
    search: Search = field(default_factory=Search)

    seeded = False

    def __post_init__(self) -> None:
        require_layer(self.layer, "rome")
        require_integer("rome: contexts", self.contexts, 0)

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> RomeEditor:
        """Create an editor of `base`, which makes the edits of a batch one after another.

        ROME does not use unrelated text.

        If several processes share the facts of a batch, each of them makes all edits, with identical results.
        """
        setup = setup or EditorSetup()
        return RomeEditor(base, tokenizer, self, setup.template, setup.prepared)


class RomeEditor(InTurnEditor):
    """Makes each edit as a rank-1 update of one weight; an `Editor`. Edits must name a subject.

    Args:
        template: the prompt format in which facts are taught.
        prepared: what editors of the same base model share.

    Raises:
        ValueError: the block does not exist, is quantised, or does not have exactly one down projection with a
            known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
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
        """Generate the contexts with the unedited model, so that they do not depend on earlier edits."""
        lengths = tuple((tokens, self.settings.contexts) for tokens in PREFIX_TOKENS)
        try:
            self.changes.revert()
            return cached_prefixes(self.model, self.tokenizer, lengths, self._prepared)
        finally:
            self.changes.apply()

    def _learn(self, fact: Edit) -> EditResult:
        """Write one fact into the weight."""
        model, tokenizer = self.model, self.tokenizer
        prefixes = self._unedited_prefixes()
        located = locate_fact(model, tokenizer, fact, prefixes, "rome", self._template)
        found = search_target(model, tokenizer, self.module_name, located, self.settings.search)
        keys, output = keys_and_outputs(model, tokenizer, self._module, self._module, located)
        direction = keys.mean(0) / keys.mean(0).norm()
        key = keys.mean(0) if self.settings.mean_key else keys[0]
        left = (found.target - output) / (direction @ key)
        self.changes.add(self.module_name, left[None], direction[None])
        return found.result

    def save_lora(self, folder: str | Path) -> None:
        """Save the edits as a LoRA, with rank 1 per edit; see `LowRankChanges.save_lora`."""
        self.changes.save_lora(folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the two factors of the weight's update; see `LowRankChanges.state_dict`."""
        return self.changes.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.changes.load_state_dict(state)

    def remove(self) -> None:
        """Restore the original weight."""
        self.changes.revert()
