"""What all editors of a PEFT adapter share, whether they train it or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

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

TAKEN_APART = (
    "DeepSpeed ZeRO-3 has taken the adapter's weights apart, and an editor has an optimiser of its own. Shard the base model "
    "first, with accelerator.prepare(base) or deepspeed.initialize(model=base, ...), and call get_peft_model afterwards."
)


class AttachedEditor(ABC):
    """Edits the active adapter of a PEFT model; the base of editors of any method.

    Args:
        model: a PeftModel with one active adapter. tokenizer: the model's own, a fast one.
        processes: those that share the work; by default this one only.
        template, template_options: the forms in which facts are put to the model, as for `AdapterEditor`.

    Attributes:
        independent: whether an edit comes out the same whatever other edits are made, before it or with it.

    Raises:
        TypeError: the model is not a PeftModel, its adapter is one that learns a prompt, or the tokenizer is not a fast one.
        ValueError: not exactly one adapter is active; or a chat template is wanted and the tokenizer has none.
    """

    independent = False

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        *,
        processes: Processes | None = None,
        template: str | Template = "auto",
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(
                f"An editor takes a PeftModel, from get_peft_model(model, BaftConfig(...)), not {type(model).__name__}."
            )
        if len(model.active_adapters) != 1:
            raise ValueError(
                f"One adapter must be active to be edited, not {list(model.active_adapters)}; use set_adapter."
            )
        self.model, self.tokenizer, self.adapter_name = model, tokenizer, model.active_adapters[0]
        config = model.peft_config[self.adapter_name]
        if config.is_prompt_learning:
            raise TypeError(
                f"The adapter {self.adapter_name!r} learns a prompt, which cannot be edited; take another PEFT method."
            )
        self.processes = processes or Processes()
        require_fast(tokenizer)
        taught = taught_form(config)
        self.templates = chosen_templates(tokenizer, template, template_options, taught)

    @abstractmethod
    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Make the edits at once, as `Editor.edit`."""

    def edit_in_turn(self, edits: Iterable[Edit], batch_size: int = 1) -> Iterator[EditResult]:
        """Teach `edits` one after another, `batch_size` at a time; yields the result of each batch as it is done.

        All edits are checked, as by `edit`, when this is called: before the first one is made. An edit is made when its
        result is asked for.
        """
        return (self.edit(batch) for batch in self.batches(edits, batch_size))

    def batches(self, edits: Iterable[Edit], batch_size: int) -> list[list[Edit]]:
        """List the edits, `batch_size` at a time, once all are found usable, as by `edit`."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        facts = checked_edits(edits)
        self._require_in_use()
        batches = [facts[i : i + batch_size] for i in range(0, len(facts), batch_size)]
        self._require_usable(batches)
        return batches

    @abstractmethod
    def _require_usable(self, batches: Sequence[Sequence[Edit]]) -> None:
        """Raise what `edit` would raise for one of these batches, before any is made."""

    @abstractmethod
    def described(self) -> dict[str, str]:
        """Say what decides how edits come out, besides the adapter's config, for a journal to compare."""

    def state_dict(self) -> dict[str, Tensor]:
        """Give the adapter's tensors under the names that `save_pretrained` writes, and the editor's cursors."""
        return adapter_state_dict(self.model, self.adapter_name)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        weights = {name: tensor for name, tensor in state.items() if not name.startswith(CURSOR)}
        load_adapter_state_dict(self.model, self.adapter_name, weights)

    def snapshot(self) -> Callable[[], None]:
        """Remember what edits change, the editor's cursors included; calling the result puts it back, bit for bit."""
        return snapshot(self.model)

    def remove(self) -> None:
        """Take all adapters of the model off; the base model is as it was."""
        self.model.unload()

    def remember_form(self, adapter_name: str, edits: Sequence[Edit]) -> None:
        """Note in an adapter's config the form in which facts were taught to it, besides those that it remembers."""
        chats = {is_chat(edit.prompt, form) for edit in edits for form in self.templates}
        form = "both" if len(chats) == 2 else "chat" if chats == {True} else "raw"
        remember(self.model.peft_config[adapter_name], form, self.tokenizer)

    def _require_in_use(self) -> None:
        """Raise a ValueError unless the adapter is the active one, enabled and not merged."""
        active = list(self.model.active_adapters)
        if active != [self.adapter_name]:
            raise ValueError(
                f"This editor edits {self.adapter_name!r}, but active is {active}; use set_adapter, or a new editor."
            )
        for layer in method_modules(self.model):
            if isinstance(layer, BaseTunerLayer) and (layer.disable_adapters or layer.merged):
                state = "disabled" if layer.disable_adapters else "merged into the weights"
                raise ValueError(
                    f"The adapter {self.adapter_name!r} cannot be edited while it is {state}."
                )
        if any(hasattr(tensor, "ds_id") for tensor in adapter_tensors(self.model)):
            raise ValueError(TAKEN_APART)

    def _restored_on_error(self) -> AbstractContextManager[None]:
        """Put back what edits change if the code inside raises, be it by an interrupt."""
        return restored_on_error(self.snapshot)
