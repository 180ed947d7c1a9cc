"""Trials of editing: gradients reach all blocks, the fast path is exact, a loss falls, a saved adapter can be loaded."""

from __future__ import annotations

import math
import tempfile

import torch
from torch import Tensor

from peft_baft.adapter.state import rolled_back, trainable
from peft_baft.editing.answers import AnswerForward, FullForward
from peft_baft.editing.baft import BaftEditor
from peft_baft.editing.fast_paths import ACCELERATED, open_forward
from peft_baft.editing.scope import NARROW
from peft_baft.editing.train import DescentConfig
from peft_baft.tools.check.findings import Finding
from peft_baft.tools.check.tools import (
    describe,
    largest_difference,
    reasons_for_plain_path,
    requires_grad_restored,
    step_difference,
)
from peft_baft.tools.check.tried_model import TriedModel

STEPS = 10  # optimiser steps of the edit
RELOADED = "baft_check_reloaded"  # the name under which the saved adapter is loaded

REACHED = "gradients reach every edited block"
FAST = "fast edit path = plain path, loss and gradient"
LEARNS = "the loss of an edit falls"
RELOADS = "a saved and loaded adapter is the same"


@torch.enable_grad()
def loss_and_gradients(
    tried: TriedModel, forward: AnswerForward
) -> tuple[float, dict[str, Tensor]]:
    """Compute the mean loss, and the gradients of the adapter's parameters in each block."""
    tried.model.zero_grad()
    loss = forward.losses().mean()
    loss.backward()
    gradients = {}
    for layer in tried.layers:
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                gradients[f"{layer.name} {name}"] = parameter.grad.detach().float().cpu().clone()
    return loss.item(), gradients


def gradients_reach_blocks(tried: TriedModel) -> Finding:
    """Test whether the gradient of every edited block is finite and not zero."""
    with trainable(tried.model):
        forward = FullForward(tried.model, tried.rows_to_train(), [0], tried.pad, tried.device)
        _, gradients = loss_and_gradients(tried, forward)
    norms = {layer.name: 0.0 for layer in tried.layers}
    for name, gradient in gradients.items():
        block = name.partition(" ")[0]
        norms[block] = max(norms[block], gradient.norm().item())
    without = [name for name, norm in norms.items() if not 0 < norm < math.inf]
    return Finding(REACHED, not without, detail=f"Not: {', '.join(without)}." if without else "")


def fast_path_is_equal(tried: TriedModel) -> Finding:
    """Test whether the fast path has the plain path's loss and gradients, and whether an edit would use it."""
    arguments = (tried.model, tried.rows_to_train(), [0], tried.pad)
    if not ACCELERATED:
        return Finding(FAST, None, detail="The accelerated implementations are not installed.")
    from peft_baft.editing.acceleration.cached_prefix import CachedPrefix

    with trainable(tried.model), reasons_for_plain_path() as reasons:
        plain = loss_and_gradients(tried, FullForward(*arguments, tried.device))
        chosen = open_forward(*arguments, tried.positions)
        try:
            cached = CachedPrefix.build(*arguments, tried.device, tried.positions)
            # Twice, since a step must not change the cache that the next step uses.
            difference = max(
                step_difference(plain, loss_and_gradients(tried, cached)) for _ in range(2)
            )
            why = "the loss or gradients would differ."
        except Exception as error:
            difference, why = math.inf, describe(error)
    shown = None if math.isinf(difference) else difference
    if not isinstance(chosen, CachedPrefix):
        detail = f"Edits use the plain path, which is slower: {' '.join(reasons) or why}"
        return Finding(FAST, None, shown, tried.tolerance, detail)
    if difference <= tried.tolerance:
        return Finding(FAST, True, shown, tried.tolerance)
    return Finding(FAST, False, shown, tried.tolerance, f"Edits use the fast path, but {why}")


def loss_falls(tried: TriedModel) -> Finding:
    """Test whether a few steps of an edit lower its loss."""
    with rolled_back(tried.model):
        editor = BaftEditor(
            tried.model,
            tried.tokenizer,
            descent=DescentConfig(max_steps=STEPS),
            template="raw",
            scope=NARROW,
        )
        with torch.no_grad():
            forward = FullForward(
                tried.model, tried.rows_to_train()[:1], [0], tried.pad, tried.device
            )
            before = forward.losses().mean().item()
        after = editor.edit([tried.fact]).losses["teacher_forcing"]
    return Finding(
        LEARNS, after < before, detail=f"From {before:.3g} to {after:.3g} in {STEPS} steps."
    )


def reloads(tried: TriedModel) -> Finding:
    """Test whether the adapter, saved and loaded under another name, has exactly the same logits."""
    expected = tried.logits_of_row(tried.prompts[0], tried.answer)
    with tempfile.TemporaryDirectory() as folder, requires_grad_restored(tried.model):
        tried.model.save_pretrained(
            folder, selected_adapters=[tried.adapter_name], save_embedding_layers=False
        )
        where = folder if tried.adapter_name == "default" else f"{folder}/{tried.adapter_name}"
        try:
            tried.model.load_adapter(where, adapter_name=RELOADED)
            tried.model.set_adapter(RELOADED)
            reloaded = tried.logits_of_row(tried.prompts[0], tried.answer)
        finally:
            tried.model.set_adapter(tried.adapter_name)
            if RELOADED in tried.model.peft_config:
                tried.model.delete_adapter(RELOADED)
    difference = largest_difference([(reloaded, expected)])
    return Finding(RELOADS, bool(torch.equal(reloaded, expected)), difference, 0.0)
