"""The load balance of the gates in training by transformers' Trainer or a custom loop over `model(...).loss`.

`BaftEditor` has its own objective and does not use this.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.call import RecordedGates
from peft_baft.adapter.layer import BaftLayer
from peft_baft.adapter.model_call import (
    TrainingCall,
    labels_are_tokens,
    loss_of,
    read_training_call,
    with_loss,
)
from peft_baft.losses import load_balance, mean_over_blocks, rescaled

logger = logging.getLogger(__name__)
CEILING = 1.0  # of the rescaling to the loss, as in the editors' objective
NOT_APPLIED = (
    "A BaFT adapter has balance_weight > 0, but the load balance has no effect on this training: {}. It is only added to the "
    "loss that a forward with labels returns; see docs/training.md."
)
WITHOUT_LABELS = (
    "the model is called without labels, as with label smoothing or a custom loss function"
)
LOSS_UNUSED = "the caller computes its own loss from log-probabilities, as TRL does"
WITHOUT_GRADIENT = (
    "The gates were computed without gradients, so the regularisers would have no effect: the model runs its blocks under "
    "no_grad, as in reentrant activation checkpointing. Enable checkpointing with use_reentrant=False, or not at all."
)


class LoadBalanceTerm:
    """Adds the load balance of active adapters with a `balance_weight` to the loss that the base model returns.

    It consists of two hooks on the base model and is not in the tuner's forward: PeftModel bypasses the tuner if the config
    has no task type, and transformers' own adapter loading has no tuner.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._arguments = tuple(inspect.signature(model.forward).parameters)
        # The running forwards of each thread, the innermost last: what stops the recording of the gates, and the gates; None
        # for a forward without the term.
        self._running: dict[int, list[tuple[ExitStack, Mapping[Any, RecordedGates]] | None]] = {}
        self._warned = False
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks from the base model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: if it trains, start recording the gates."""
        running = self._running.setdefault(threading.get_ident(), [])
        running.append(None)
        if not (model.training and torch.is_grad_enabled() and _balanced(model)):
            return
        call = self._read(model, args, kwargs)
        if call.labels is None:
            self._warn(WITHOUT_LABELS)
            return
        if call.loss_unused:
            self._warn(LOSS_UNUSED)
        recording = ExitStack()
        recorded = recording.enter_context(_balanced(model)[0][0].context.recording())
        running[-1] = recording, recorded

    def _end(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """After a forward, even a failed one: stop recording, and add the term to the loss."""
        running = self._running.get(threading.get_ident())
        if not running:  # the forward failed before `_begin`
            return None
        innermost = running.pop()
        if not running:
            del self._running[threading.get_ident()]
        if innermost is None:
            return None
        recording, recorded = innermost
        recording.close()
        loss = loss_of(output)
        if loss is None:
            return None
        share = _share_of_step(self._read(model, args, kwargs), loss)
        for term in _terms(model, recorded, loss / share.clamp(min=torch.finfo(loss.dtype).tiny)):
            loss = loss + share * term.to(loss)
        return with_loss(output, loss)

    def _read(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TrainingCall:
        shifts = labels_are_tokens(model)
        return read_training_call(self._arguments, args, kwargs, shifts=shifts)

    def _warn(self, reason: str) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(NOT_APPLIED.format(reason))


def attach_balance(model: nn.Module) -> None:
    """Add a `LoadBalanceTerm` to a base model, unless it has one."""
    if not _attached(model):
        LoadBalanceTerm(model)


def detach_balance(model: nn.Module) -> None:
    """Undo `attach_balance`, if necessary."""
    for term in _attached(model):
        term.detach()


def _attached(model: nn.Module) -> list[LoadBalanceTerm]:
    """Return the terms on a model.

    Only its own hooks refer to a term, so that a copied or pickled model has its own.
    """
    owners = [getattr(hook, "__self__", None) for hook in model._forward_hooks.values()]
    return [owner for owner in owners if isinstance(owner, LoadBalanceTerm)]


def _balanced(model: nn.Module) -> list[tuple[BaftLayer, str]]:
    """Return pairs of a block and the name of an adapter in it that is active, trained and has a `balance_weight`."""
    balanced = []
    for layer in model.modules():
        if not isinstance(layer, BaftLayer) or layer.disable_adapters:
            continue
        for name in layer.active_adapters:
            if name in layer.configs and layer.configs[name].balance_weight > 0:
                parameters = layer.baft_gate[name].parameters()
                if any(parameter.requires_grad for parameter in parameters):
                    balanced.append((layer, name))
    return balanced


def _terms(model: nn.Module, recorded: Mapping[Any, RecordedGates], loss: Tensor) -> list[Tensor]:
    """Compute the weighted load balance of each adapter, () each, rescaled to the mean loss of an answer token.

    Past use is what editors have counted (`baft_gate_usage`); a forward does not add to it, since it cannot know whether an
    optimiser step follows.
    """
    balances: dict[str, list[Tensor]] = {}  # by adapter, one per block
    weights: dict[str, float] = {}
    for layer, name in _balanced(model):
        gates = recorded.get(layer.name, recorded.get((layer.name, name)))
        if gates is None:
            continue
        if not gates.w.requires_grad:
            raise ValueError(WITHOUT_GRADIENT)
        w = gates.w[gates.mask]
        if len(w):
            usage = layer.baft_gate_usage[name].to(w.device)
            balances.setdefault(name, []).append(
                load_balance(w, past_sum=usage[:-1], past_count=usage[-1])
            )
            weights[name] = layer.configs[name].balance_weight
    return [
        weights[name] * rescaled(mean_over_blocks(per_block), loss, CEILING)
        for name, per_block in balances.items()
    ]


def _share_of_step(call: TrainingCall, loss: Tensor) -> Tensor:
    """Return the share of this forward in the loss of an optimiser step, (); 1 if the loss is the mean over its own tokens.

    Trainer passes the number of tokens that all forwards of a step predict, and sums the losses; a term that is not scaled
    in the same way would count once per forward.
    """
    if call.predicted_in_step is None or call.predicted is None:
        return torch.ones_like(loss)
    return (call.predicted.to(loss) / torch.as_tensor(call.predicted_in_step).to(loss)).detach()
