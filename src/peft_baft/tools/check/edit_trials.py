"""Trials of editing: gradients arrive, the fast path gives the same, a fact is learned, a saved adapter comes back."""

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
    flags_kept,
    in_words,
    largest_difference,
    reasons_for_plain_path,
    step_difference,
)
from peft_baft.tools.check.tried_model import TriedModel

STEPS = 10  # of the edit that is tried
RELOADED = (
    "baft_check_reloaded"  # name of the adapter that is saved and read again, while it is there
)

REACHED = "gradient reaches every edited block"
FAST = "fast edit path = plain path, loss and gradient"
LEARNS = "an edit's loss falls"
RELOADS = "saved and read again, the adapter is the same"


@torch.enable_grad()
def loss_and_gradients(
    tried: TriedModel, forward: AnswerForward
) -> tuple[float, dict[str, Tensor]]:
    """Compute the mean loss, and the gradient of each of the adapter's parameters in each block."""
    tried.model.zero_grad()
    loss = forward.losses().mean()
    loss.backward()
    gradients = {}
    for layer in tried.layers:
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                gradients[f"{layer.name} {name}"] = parameter.grad.detach().float().cpu().clone()
    return loss.item(), gradients


def reached(tried: TriedModel) -> Finding:
    """Try whether the gradient of every edited block is finite and not zero."""
    with trainable(tried.model):
        forward = FullForward(tried.model, tried.rows_to_train(), [0], tried.pad, tried.device)
        _, gradients = loss_and_gradients(tried, forward)
    sizes = {layer.name: 0.0 for layer in tried.layers}
    for name, gradient in gradients.items():
        block = name.partition(" ")[0]
        sizes[block] = max(sizes[block], gradient.norm().item())
    without = [name for name, size in sizes.items() if not 0 < size < math.inf]
    return Finding(REACHED, not without, detail=f"Not: {', '.join(without)}." if without else "")


def fast(tried: TriedModel) -> Finding:
    """Try whether the fast path gives the plain path's loss and gradient, and whether an edit would take it."""
    arguments = (tried.model, tried.rows_to_train(), [0], tried.pad)
    if not ACCELERATED:
        return Finding(FAST, None, detail="The accelerated implementations are not installed.")
    from peft_baft.editing.acceleration.cached_prefix import CachedPrefix

    with trainable(tried.model), reasons_for_plain_path() as reasons:
        plain = loss_and_gradients(tried, FullForward(*arguments, tried.device))
        chosen = open_forward(*arguments, tried.positions)
        try:
            cached = CachedPrefix.build(*arguments, tried.device, tried.positions)
            # Twice, since a step must not change the cache that the next one uses.
            difference = max(
                step_difference(plain, loss_and_gradients(tried, cached)) for _ in range(2)
            )
            why = "loss or gradient would differ."
        except Exception as error:
            difference, why = math.inf, in_words(error)
    shown = None if math.isinf(difference) else difference
    if not isinstance(chosen, CachedPrefix):
        detail = f"Edits take the plain path, which is slower: {' '.join(reasons) or why}"
        return Finding(FAST, None, shown, tried.tolerance, detail)
    if difference <= tried.tolerance:
        return Finding(FAST, True, shown, tried.tolerance)
    return Finding(FAST, False, shown, tried.tolerance, f"Edits take the fast path, but {why}")


def learns(tried: TriedModel) -> Finding:
    """Try whether some steps of an edit lower its loss."""
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
    """Try whether the adapter, saved and read again under another name, gives the same logits bit for bit."""
    expected = tried.logits_alone(tried.prompts[0], tried.answer)
    with tempfile.TemporaryDirectory() as folder, flags_kept(tried.model):
        tried.model.save_pretrained(
            folder, selected_adapters=[tried.adapter_name], save_embedding_layers=False
        )
        where = folder if tried.adapter_name == "default" else f"{folder}/{tried.adapter_name}"
        try:
            tried.model.load_adapter(where, adapter_name=RELOADED)
            tried.model.set_adapter(RELOADED)
            reloaded = tried.logits_alone(tried.prompts[0], tried.answer)
        finally:
            tried.model.set_adapter(tried.adapter_name)
            if RELOADED in tried.model.peft_config:
                tried.model.delete_adapter(RELOADED)
    difference = largest_difference([(reloaded, expected)])
    return Finding(RELOADS, bool(torch.equal(reloaded, expected)), difference, 0.0)
