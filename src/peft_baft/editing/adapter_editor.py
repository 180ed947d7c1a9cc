"""Editing a model through a PEFT adapter: the contract, and the part that every PEFT method shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, BaftModel
from peft_baft.adapter.coexistence import adapter_contents, other_adapters
from peft_baft.data.batching import Tokens, encode_fitting, padding_id
from peft_baft.data.cases import Edit
from peft_baft.editing.acceleration.prefix_cache import open_session
from peft_baft.editing.train import DescentConfig, Outcome, Terms, descend
from peft_baft.processes import Processes


class AdapterEditor:
    """Teaches facts to the active adapter of a PEFT model, of any method, by teacher forcing alone.

    An edit either takes place whole or leaves the adapter as it was, whatever goes wrong.

    Args:
        model: a PeftModel with one active adapter.
        tokenizer: the model's own, a fast one.
        descent: how an edit of one fact is trained; by default the method's own settings.
        batch_descent: how a batch of several facts is trained.

    Attributes:
        processes: those that share the facts of each batch; this one alone, unless set. All of them are given the same
            edits, and end with the same adapter, as if one had made them.
        unrelated_used: how many unrelated texts facts were trained beside; 0 for an editor that takes none.

    Raises:
        TypeError: the model is no PeftModel, or its adapter is one that learns a prompt.
        ValueError: not exactly one adapter is active.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        descent: DescentConfig | None = None,
        batch_descent: DescentConfig | None = None,
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
        if model.peft_config[self.adapter_name].is_prompt_learning:
            raise TypeError(
                f"The adapter {self.adapter_name!r} learns a prompt, which cannot be edited; take another PEFT method."
            )
        self.descent = descent or DescentConfig()
        self.batch_descent = batch_descent or DescentConfig(max_steps=70)
        self.processes = Processes()
        self.unrelated_used = 0

    def edit(self, edits: Iterable[Edit]) -> Outcome:
        """Teach `edits` to the adapter at once, as one batch.

        Raises:
            TypeError, ValueError: an edit is unusable, longer than the model can read, stands twice or contradicts
                another one; or the adapter is not the active one, disabled or merged.
            FloatingPointError: a loss became NaN or infinite. In each case the adapter is as it was.
        """
        rows = self._tokens(checked_edits(edits))
        self._require_in_use()
        descent = self.descent if len(rows) == 1 else self.batch_descent
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(self.model),
            trainable(self.model) as parameters,
        ):
            if not parameters:
                raise ValueError(f"The adapter {self.adapter_name!r} has no trainable parameters.")
            with restored_on_error(self.model), self.processes.together():
                self.processes.require_alike(rows, "edits")
                self.processes.spread(adapter_tensors(self.model))
                return self._train(rows, parameters, descent)

    def edit_in_turn(self, edits: Iterable[Edit], batch_size: int = 1) -> Iterator[Outcome]:
        """Teach `edits` one after another, `batch_size` at a time; yields the outcome of each batch as it is done.

        All edits are checked, as by `edit`, when this is called: before the first one is made. An edit is made when its
        outcome is asked for.
        """
        return (self.edit(batch) for batch in self.batches(edits, batch_size))

    def batches(self, edits: Iterable[Edit], batch_size: int) -> list[list[Edit]]:
        """The edits, `batch_size` at a time, once all are found usable, as by `edit`."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        facts = checked_edits(edits)
        self._require_in_use()
        batches = [facts[i : i + batch_size] for i in range(0, len(facts), batch_size)]
        for batch in batches:
            self._tokens(batch)
        return batches

    def _require_in_use(self) -> None:
        active = list(self.model.active_adapters)
        if active != [self.adapter_name]:
            raise ValueError(
                f"This editor edits {self.adapter_name!r}, but active is {active}; use set_adapter, or a new editor."
            )
        for layer in (module for module in own_modules(self.model) if isinstance(module, BaseTunerLayer)):
            if layer.disable_adapters or layer.merged:
                state = "disabled" if layer.disable_adapters else "merged into the weights"
                raise ValueError(f"The adapter {self.adapter_name!r} cannot be edited while it is {state}.")
        if any(hasattr(tensor, "ds_id") for tensor in adapter_tensors(self.model)):
            raise ValueError(TAKEN_APART)

    def _train(self, rows: list[Tokens], parameters: list[nn.Parameter], descent: DescentConfig) -> Outcome:
        own = self.processes.share(rows)
        session = open_session(self.model, own, range(len(own)), padding_id(self.tokenizer), None) if own else None

        def losses() -> Terms:
            (answers,) = self.processes.joined(lambda: [session.losses()] if session else [])
            return {"teacher_forcing": answers.mean()}

        return descend(parameters, losses, descent, self.processes)

    def _tokens(self, edits: Sequence[Edit]) -> list[Tokens]:
        """Tokenise one batch, after a check of its edits against each other."""
        targets: dict[str, str] = {}
        for edit in edits:
            prompt, target = edit.prompt.strip(), edit.target.strip()
            if prompt in targets:
                first = targets[prompt]
                what = "stands twice" if target == first else f"is edited to {first!r} and to {target!r}"
                raise ValueError(f"{prompt!r} {what} in one batch; leave one, or edit them one after another.")
            targets[prompt] = target
        return [encode_fitting(self.model, self.tokenizer, prompt, target) for prompt, target in targets.items()]


def checked_edits(edits: Iterable[Edit]) -> list[Edit]:
    facts = list(edits) if isinstance(edits, Iterable) else None
    if facts is None or not all(isinstance(fact, Edit) for fact in facts):
        raise TypeError(f"edits must be a list of Edit(prompt, target), not {edits!r:.80}.")
    if not facts:
        raise ValueError("There is nothing to edit: the list of edits is empty.")
    return facts


TAKEN_APART = (
    "DeepSpeed ZeRO-3 has taken the adapter's weights apart, and an editor has an optimiser of its own. Shard the base model "
    "first, with accelerator.prepare(base) or deepspeed.initialize(model=base, ...), and call get_peft_model afterwards."
)


def own_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the adapters of a PeftModel's own method.

    A BaFT adapter may stand beside one of another method, say an unmerged LoRA: an editor of either leaves the other alone.
    """
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BaftModel):
        return list(tuner.own_modules())
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(module, BaftLayer)
    ]


def adapter_tensors(model: nn.Module) -> list[Tensor]:
    """Everything an edit may change: the adapters' parameters and buffers, and whatever else is trainable."""
    own = own_modules(model)
    others = {id(tensor) for tensor in other_adapters(model, own)}
    tensors: list[Tensor] = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    for module in own:
        tensors += adapter_contents(module)
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
    """The active adapter's parameters, needing gradients inside; flags and gradients are put back as they were.

    A reloaded adapter is frozen; this lets it go on learning without a flag to remember. Adapters of other methods are
    frozen inside, also those that were trainable.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
    try:
        model.base_model.set_requires_grad(model.active_adapters, True)
        for tensor in other_adapters(model, own_modules(model)):
            tensor.requires_grad_(False)
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed)
            parameter.grad = gradient


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


@contextmanager
def without_adapters(model: PeftModel) -> Iterator[None]:
    """The model without its adapters. PEFT leaves them trainable afterwards; here they stay as they were."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, was in trainable.items():
            parameter.requires_grad_(was)
