"""Editing a model through a PEFT adapter: the contract, and the part that every PEFT method shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_baft.data.batching import Tokens, collate, context_window, encode, padding_id
from peft_baft.data.cases import Edit
from peft_baft.editing.descent import DescentConfig, Outcome, descend
from peft_baft.losses import teacher_forcing


class AdapterEditor:
    """Teaches facts to the active adapter of a PEFT model, of any method, by teacher forcing alone.

    An edit either takes place whole or leaves the adapter as it was, whatever goes wrong.

    Args:
        model: a PeftModel with one active adapter.
        tokenizer: the model's own, a fast one.
        descent: how an edit of one fact is trained; by default the method's own settings.
        batch_descent: how a batch of several facts is trained.

    Raises:
        TypeError: the model is no PeftModel. ValueError: not exactly one adapter is active.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        descent: DescentConfig | None = None,
        batch_descent: DescentConfig | None = None,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(f"An editor takes a PeftModel, from get_peft_model(model, BaftConfig(...)), not {type(model).__name__}.")
        if len(model.active_adapters) != 1:
            raise ValueError(f"One adapter must be active to be edited, but active are {list(model.active_adapters)}; use set_adapter.")
        self.model, self.tokenizer = model, tokenizer
        self.descent = descent or DescentConfig()
        self.batch_descent = batch_descent or DescentConfig(max_steps=70)

    def edit(self, edits: Sequence[Edit]) -> Outcome:
        """Teach `edits` to the active adapter at once, as one batch.

        Raises:
            TypeError, ValueError: an edit is unusable, longer than the model can read, or contradicts another one.
            FloatingPointError: a loss became NaN or infinite. In each case the adapter is as it was.
        """
        rows = self._tokens(edits)
        with restored_on_error(self.model), trainable(self.model) as parameters, evaluating(self.model):
            if not parameters:
                raise ValueError("The active adapter has no trainable parameters.")
            return self._train(rows, parameters, self.descent if len(edits) == 1 else self.batch_descent)

    def edit_in_turn(self, edits: Sequence[Edit], batch_size: int = 1) -> Iterator[Outcome]:
        """Teach `edits` one after another, `batch_size` at a time; yields the outcome of each batch as it is done.

        All edits are checked before the first one is made.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        batches = [edits[i : i + batch_size] for i in range(0, len(edits), batch_size)]
        for batch in batches:
            self._tokens(batch)
        return (self.edit(batch) for batch in batches)

    def _train(self, rows: list[Tokens], parameters: list[nn.Parameter], descent: DescentConfig) -> Outcome:
        batch = self._batch(rows)
        return descend(parameters, lambda: {"teacher_forcing": teacher_forcing(self._logits(batch), batch["labels"])}, descent)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, use_cache=False).logits

    def _batch(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        device = self.model.get_input_embeddings().weight.device
        return {name: tensor.to(device) for name, tensor in collate(rows, padding_id(self.tokenizer)).items()}

    def _tokens(self, edits: Sequence[Edit]) -> list[Tokens]:
        """Check a batch and tokenise it: (prompt, target) rows, each once."""
        if not isinstance(edits, Sequence) or not all(isinstance(edit, Edit) for edit in edits):
            raise TypeError(f"edits must be a list of Edit(prompt, target), not {edits!r:.80}.")
        if not edits:
            raise ValueError("There is nothing to edit: the list of edits is empty.")
        targets: dict[str, str] = {}
        for edit in edits:
            prompt, target = edit.prompt.strip(), edit.target.strip()
            if targets.setdefault(prompt, target) != target:
                raise ValueError(f"Two edits of one batch contradict each other: {prompt!r} -> {targets[prompt]!r} and {target!r}.")
        rows = [encode(self.tokenizer, prompt, target) for prompt, target in targets.items()]
        for row, prompt in zip(rows, targets, strict=True):
            require_fits(self.model, row, prompt)
        return rows


def require_fits(model: Any, row: Tokens, prompt: str) -> None:
    """Raise a ValueError if a text is longer than the model's context window."""
    window = context_window(model)
    if window is not None and len(row.ids) > window:
        raise ValueError(f"{prompt[:40]!r}… has {len(row.ids)} tokens with its target, but the model reads at most {window}.")


def adapter_tensors(model: nn.Module) -> list[Tensor]:
    """Everything an edit may change: the adapters' parameters and buffers, and whatever else is trainable."""
    tensors: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            container = getattr(layer, name, None)
            if isinstance(container, nn.Module):
                tensors += [*container.parameters(), *container.buffers()]
    return list({id(tensor): tensor for tensor in tensors}.values())


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put the adapter back, bit for bit, if what is inside does not come to its end, be it by an interrupt."""
    restore = snapshot(model)
    try:
        yield
    except BaseException:
        restore()
        raise


@contextmanager
def rolled_back(model: nn.Module) -> Iterator[None]:
    """Put the adapter back, bit for bit and statistics included, after what is inside: single editing."""
    restore = snapshot(model)
    try:
        yield
    finally:
        restore()


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember the adapter as it is; calling the result puts it back so."""
    kept = [(tensor, tensor.detach().clone()) for tensor in adapter_tensors(model)]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

    return restore


@contextmanager
def trainable(model: PeftModel) -> Iterator[list[nn.Parameter]]:
    """The active adapter's parameters, needing gradients inside, as they did before outside.

    A reloaded adapter is frozen; this lets it go on learning without a flag to remember.
    """
    before = {p: p.requires_grad for p in model.parameters()}
    model.base_model.set_requires_grad(model.active_adapters, True)
    try:
        yield [p for p in model.parameters() if p.requires_grad]
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
            parameter.grad = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Train without dropout: a fact is learned for the model that will be used."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
