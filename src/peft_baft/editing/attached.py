"""The base class of all editors of a PEFT adapter, whether they train it or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from peft_baft.adapter.rollback import restored_on_error
from peft_baft.adapter.state import (
    adapter_state_dict,
    adapter_tensors,
    load_adapter_state_dict,
    method_modules,
    snapshot,
)
from peft_baft.adapter.taught_form import remember, taught_form
from peft_baft.data.batching import require_fast
from peft_baft.data.cases import Edit
from peft_baft.data.templates import Template, chosen_templates, is_chat
from peft_baft.editing.editor import CURSOR, EditResult, checked_edits
from peft_baft.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARDED = (
    "DeepSpeed ZeRO-3 has sharded the adapter's weights, but an editor uses its own optimiser. Shard the base model first, with "
    "accelerator.prepare(base) or deepspeed.initialize(model=base, ...), and call get_peft_model afterwards."
)


class AttachedEditor(ABC):
    """Edits the active adapter of a PEFT model.

    Args:
        model: a PeftModel with one active adapter. tokenizer: the model's fast tokenizer.
        processes: the processes that share the work; by default only this one.
        template, template_options: the prompt formats in which facts are trained; see `AdapterEditor`.

    Attributes:
        independent: whether the result of an edit does not depend on other edits, before it or in the same batch.

    Raises:
        TypeError: the model is not a PeftModel, the adapter uses prompt learning, or the tokenizer is not a fast one.
        ValueError: the number of active adapters is not one; or a chat template is requested and the tokenizer has none.
    """

    independent = False

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        processes: Processes | None = None,
        template: str | Template = "auto",
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(
                f"An editor needs a PeftModel, from get_peft_model(model, BaftConfig(...)), not {type(model).__name__}."
            )
        if len(model.active_adapters) != 1:
            raise ValueError(
                f"Exactly one adapter must be active, not {list(model.active_adapters)}; use set_adapter."
            )
        self.model, self.tokenizer, self.adapter_name = model, tokenizer, model.active_adapters[0]
        config = model.peft_config[self.adapter_name]
        if config.is_prompt_learning:
            raise TypeError(
                f"The adapter {self.adapter_name!r} uses prompt learning, which cannot be edited; use another PEFT method."
            )
        self.processes = processes or Processes()
        require_fast(tokenizer)
        taught = taught_form(config)
        self.templates = chosen_templates(tokenizer, template, template_options, taught)

    @abstractmethod
    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Make the edits as one batch; see `Editor.edit`."""

    def edit_in_turn(self, edits: Iterable[Edit], batch_size: int = 1) -> Iterator[EditResult]:
        """Make the edits one after another, `batch_size` at a time, and yield the result of each batch.

        All edits are checked when this is called, and raise the errors of `edit` before the first is made. A batch is made
        when its result is requested.
        """
        return (self.edit(batch) for batch in self.batches(edits, batch_size))

    def batches(self, edits: Iterable[Edit], batch_size: int) -> list[list[Edit]]:
        """Split the edits into batches, after checking all of them; raises the errors of `edit`."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        facts = checked_edits(edits)
        self._require_in_use()
        batches = [facts[i : i + batch_size] for i in range(0, len(facts), batch_size)]
        self._require_usable(batches)
        return batches

    @abstractmethod
    def _require_usable(self, batches: Sequence[Sequence[Edit]]) -> None:
        """Raise the error that `edit` would raise for any of these batches."""

    @abstractmethod
    def described(self) -> dict[str, str]:
        """Return the settings that affect the outcome of edits, except the adapter's config, for a journal to compare."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapter's tensors under the names that `save_pretrained` writes, and the editor's cursors."""
        return adapter_state_dict(self.model, self.adapter_name)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that `state_dict` returned."""
        weights = {name: tensor for name, tensor in state.items() if not name.startswith(CURSOR)}
        load_adapter_state_dict(self.model, self.adapter_name, weights)

    def snapshot(self) -> Callable[[], None]:
        """Copy everything that edits change, including the editor's cursors, and return a function that restores it."""
        return snapshot(self.model)

    def remove(self) -> None:
        """Remove all adapters; this restores the base model."""
        self.model.unload()

    def remember_form(self, adapter_name: str, edits: Sequence[Edit]) -> None:
        """Add the prompt format of these edits to those that the adapter's config records."""
        chats = {is_chat(edit.prompt, template) for edit in edits for template in self.templates}
        form = "chat" if True in chats else "raw"
        if len(chats) == 2:
            form = "both"
        remember(self.model.peft_config[adapter_name], form, self.tokenizer)

    def _require_in_use(self) -> None:
        """Raise a ValueError unless the adapter is the active one, enabled and not merged."""
        active = list(self.model.active_adapters)
        if active != [self.adapter_name]:
            raise ValueError(
                f"This editor edits {self.adapter_name!r}, but the active adapters are {active}; use set_adapter, or create a "
                "new editor."
            )
        for layer in method_modules(self.model):
            if isinstance(layer, BaseTunerLayer) and (layer.disable_adapters or layer.merged):
                state = "disabled" if layer.disable_adapters else "merged into the base weights"
                raise ValueError(
                    f"The adapter {self.adapter_name!r} cannot be edited while it is {state}."
                )
        if any(hasattr(tensor, "ds_id") for tensor in adapter_tensors(self.model)):
            raise ValueError(SHARDED)

    def _restored_on_error(self) -> AbstractContextManager[None]:
        """Restore everything that edits change if the code inside raises, including on an interrupt."""
        return restored_on_error(self.snapshot)
