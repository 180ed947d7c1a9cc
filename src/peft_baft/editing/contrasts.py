"""Contrast texts: what must stay as it is although it looks like the fact that is edited.

A contrast text is a neighbour of the fact (`data/neighbours.py`), answered by the unedited model. An edit looks at it through
the hidden vectors that the unedited model has at its edited tokens. They are computed once, before the edit. Each step then
asks of the adapter alone, without a forward of the model, how far it moves them: at the edited blocks an adapter that moves
none of them leaves the whole text as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from peft_baft.adapter import BaftLayer
from peft_baft.adapter.plain import PLAIN
from peft_baft.adapter.state import without_adapters
from peft_baft.data.batching import Tokens, collate, context_window, encode_prompt, padding_id
from peft_baft.data.cases import Edit, Prompt, prompt_words
from peft_baft.data.neighbours import other_subjects, subject_candidates, with_other_subject
from peft_baft.data.templates import Template, is_chat
from peft_baft.editing.acceleration.module_patches import collected_outputs, logits_only_at
from peft_baft.editing.acceleration.packed_linear import packed_forwards
from peft_baft.editing.acceleration.padded_prompts import takes_left_padding
from peft_baft.editing.acceleration.shared_prefix import PromptBatch, SharedPrefix, find_prefix
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.scope import Scope
from peft_baft.running import end_tokens, full_logits, input_device

BATCH_SIZE = 64  # so many contrast texts are answered together
# Each span that may be the subject is exchanged for so many others, to see what that changes.
TRIED_SUBJECTS = 2
# A held vector counts as having at least this share of the median squared length.
LEAST_SIZE = 1e-3
TOO_LONG = "%d of the %d contrast texts of %r are too long for the model, and are left out."
NOT_A_TOKEN_A_STEP = (
    "{} computed {} tokens of a prompt of {} in the first forward of generate(), so where its hidden vectors stand is not known. "
    "Generate without chunked prefill, or edit with scope=NARROW."
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldVectors:
    """Hidden vectors that an edit shall not move.

    Attributes:
        hidden: by the name of the edited block, (m, d) its output at the edited tokens of the contrast texts.
        before: by the same name, (m, d) what the adapter adds to them before the edit.
        sizes: by the same name, (m,) their squared lengths, by which displacements are divided (`squared_lengths`).
    """

    hidden: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    sizes: Mapping[str, Tensor]

    def displacements(self, layers: Sequence[BaftLayer], adapter_name: str) -> Tensor:
        """Compute how far an adapter moves the vectors now: |Φ(h) - Φ₀(h)|² / |h|², mean over the blocks.

        Where |h| is nearly 0, the quotient is taken with a least length instead.

        Returns:
            (m,) with gradient, on the first block's device.
        """
        shares = []
        for layer in layers:
            h = self.hidden[layer.name]
            moved = PLAIN.change_at(layer, adapter_name, h) - self.before[layer.name]
            shares.append(moved.float().square().sum(-1) / self.sizes[layer.name])
        return torch.stack([share.to(shares[0].device) for share in shares]).mean(0)


def contrast_rows(
    model: PeftModel, tokenizer: Any, edit: Edit, template: Template, scope: Scope
) -> list[Tokens]:
    """Tokenise the prompts of a fact's contrast texts; none where its subject is not known."""
    rows = []
    for prompts in scope.contrasts(edit, is_chat(edit.prompt, template)):
        for prompt in prompts:
            # A template may refuse a system prompt; then the text stands bare.
            with suppress(ValueError):
                rows.append(encode_prompt(tokenizer, prompt, template=template))
                break
    window = context_window(model)
    longest = float("inf") if window is None else window - scope.answer_tokens
    fitting = [row for row in rows if len(row.ids) <= longest]
    if len(fitting) < len(rows):
        left_out = len(rows) - len(fitting)
        logger.warning(TOO_LONG, left_out, len(rows), prompt_words(edit.prompt))
    return fitting


def hold(
    model: PeftModel,
    tokenizer: Any,
    layers: Sequence[BaftLayer],
    prompts: Sequence[Tokens],
    scope: Scope,
    prompt_positions: int,
    adapter_name: str,
    prepared: EditCache | None = None,
) -> HeldVectors:
    """Let the unedited model answer the prompts, and keep its hidden vectors at the tokens that an adapter edits.

    Args:
        prepared: of the base model; by default the one that is kept with it.
    """
    prepared = prepared or EditCache.of(model)
    packed = packed_forwards(model.get_base_model().modules(), prepared.packed)
    prefix = SharedPrefix()
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    last_block, padding = layers[-1].get_base_layer(), padding_id(tokenizer)
    # Texts of like length need little padding.
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    with without_adapters(model):
        padded = takes_left_padding(model, last_block, prompts, padding, prompt_positions, prepared)
        if padded:
            ids = find_prefix(model, prompts, prompt_positions, prepared.verified_length)
            prefix = SharedPrefix.of(model, ids, packed) if ids else prefix
        size = BATCH_SIZE if padded else 1
        for start in range(0, len(ordered), size):
            some = ordered[start : start + size]
            batch = PromptBatch.of(some, padding, prefix)
            with ExitStack() as stack:
                outputs = {
                    layer.name: stack.enter_context(collected_outputs(layer.get_base_layer()))
                    for layer in layers
                }
                answers = batch.answers(model, padding, scope.answer_tokens, packed)
            found = _hidden_of_answers(model, outputs, batch.mask, answers, prompt_positions)
            for name, vectors in found.items():
                parts[name].append(vectors)
    hidden = {name: torch.cat(of_block) for name, of_block in parts.items()}
    with torch.no_grad():
        before = {
            layer.name: PLAIN.change_at(layer, adapter_name, hidden[layer.name]) for layer in layers
        }
    sizes = {name: squared_lengths(vectors) for name, vectors in hidden.items()}
    return HeldVectors(hidden, before, sizes)


def squared_lengths(hidden: Tensor) -> Tensor:
    """Compute |h|² of vectors (m, d), and at least `LEAST_SIZE` of the median: (m,) float32, all above 0.

    A vector may be zero. The embedding of a padding token often is, and a recurrent block maps zero to zero.
    """
    sizes = hidden.float().square().sum(-1)
    real = sizes[sizes > 0]
    median = real.median() if len(real) else sizes.new_ones(())
    return sizes.clamp(min=LEAST_SIZE * median)


def _hidden_of_answers(
    model: PeftModel,
    outputs: Mapping[str, list[Tensor]],
    mask: Tensor,
    answers: Tensor,
    prompt_positions: int,
) -> dict[str, Tensor]:
    """Choose the edited tokens of one batch of prompts and answers: by block (m, d).

    Args:
        outputs: what each block gave in each forward. mask: (rows, tokens) of the prompts, padded on the left.

    Raises:
        ValueError: the model did not compute the prompts in one forward.
    """
    # The first forward has the prompts, which end at its right, and each later one ends with one more token of the answers: it
    # has only that token, or, for a model that keeps no cache, all those before it as well. A model may run a block several
    # times in each forward (Dory): then all its outputs count.
    width, positions = mask.shape[1], min(prompt_positions, mask.shape[1])
    of_answer = goes_on(answers.cpu(), end_tokens(model))[:, :-1]
    real = torch.cat([mask[:, -positions:].bool(), of_answer], 1)
    hidden = {}
    for name, of_block in outputs.items():
        if of_block[0].shape[1] != width:
            base = type(model.get_base_model()).__name__
            raise ValueError(NOT_A_TOKEN_A_STEP.format(base, of_block[0].shape[1], width))
        runs = len(of_block) // answers.shape[1]
        parts = []
        for run in range(runs):
            first, *later = of_block[run::runs]
            vectors = torch.cat([first[:, -positions:], *(part[:, -1:] for part in later)], 1)
            parts.append(vectors[real.to(vectors.device)])
        hidden[name] = torch.cat(parts)
    return hidden


def goes_on(answers: Tensor, ends: Sequence[int]) -> Tensor:
    """Tell which tokens of generated answers (rows, tokens) stand before the end of their row's: (rows, tokens) bool."""
    ended = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype))
    return ended.cumsum(1) == 0


@torch.no_grad()
def find_subject(
    model: PeftModel, tokenizer: Any, prompt: Prompt, template: Template
) -> str | None:
    """Find what a prompt is about: the span whose exchange changes most what the unedited model would say next.

    Returns:
        The span as it stands in the prompt; None where the prompt has none that could be one.
    """
    candidates = subject_candidates(prompt)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    prompts = [prompt]
    for candidate in candidates:
        others = other_subjects(prompt, candidate, TRIED_SUBJECTS)
        prompts += [with_other_subject(prompt, candidate, other) for other in others]
    rows = [encode_prompt(tokenizer, text, template=template) for text in prompts]
    device = input_device(model)
    batch = collate(rows, padding_id(tokenizer))
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    last = torch.tensor([len(row.ids) - 1 for row in rows], device=device)
    places = (torch.arange(len(rows), device=device), last)
    base = model.get_base_model()
    with without_adapters(model), logits_only_at(base.get_output_embeddings(), places):
        logits = full_logits(model, **inputs)
    likely = logits.float().softmax(-1)
    change = (likely[1:] - likely[0]).abs().sum(-1).view(len(candidates), -1).mean(1)
    return candidates[int(change.argmax())]
