"""Contrast texts: prompts similar to an edited fact whose answers must not change.

A contrast text is a neighbour of the fact (`data/neighbours.py`) with the unedited model's answer. The hidden vectors of the
unedited model at its edited tokens are computed once, before the edit. Each step then applies only the adapter to them, without
a forward pass of the model, and penalises how far it moves them. An adapter that moves none of them in the edited blocks leaves
the whole text unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.fast_paths import prompt_batches
from peft_baft.editing.module_patches import collected_outputs, logits_only_at
from peft_baft.editing.scope import Scope
from peft_baft.running import end_tokens, full_logits, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The number of other subjects by which each candidate span is replaced in the search for the subject.
TRIED_SUBJECTS = 2
# Lower bound of a vector's squared length, relative to the median.
LEAST_SIZE = 1e-3
TOO_LONG = "%d of the %d contrast texts of %r are too long for the model and are left out."
CHUNKED_PREFILL = (
    "{} computed {} tokens of a prompt of {} in the first forward of generate(), so the positions of its hidden vectors are "
    "unknown. Generate without chunked prefill, or edit with scope=NARROW."
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContrastTargets:
    """Hidden vectors that an edit should not move, each by the name of the edited block.

    Attributes:
        hidden: (m, d) the block's output at the edited tokens of the contrast texts.
        before: (m, d) what the adapter added to them before the edit.
        sizes: (m,) their squared lengths, by which displacements are divided (`squared_lengths`).
    """

    hidden: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    sizes: Mapping[str, Tensor]

    def displacements(self, layers: Sequence[BaftLayer], adapter_name: str) -> Tensor:
        """Compute how far an adapter moves the vectors now: |Φ(h) - Φ₀(h)|² / |h|², mean over the blocks.

        Φ₀ is the adapter before the edit. Very small |h|² are replaced by a lower bound.

        Returns:
            (m,) with gradient, on the first block's device.
        """
        relative = []
        for layer in layers:
            h = self.hidden[layer.name]
            moved = PLAIN.change_at(layer, adapter_name, h) - self.before[layer.name]
            relative.append(moved.float().square().sum(-1) / self.sizes[layer.name])
        return torch.stack([part.to(relative[0].device) for part in relative]).mean(0)


def contrast_rows(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    template: Template,
    scope: Scope,
) -> list[Tokens]:
    """Tokenise the prompts of a fact's contrast texts; returns an empty list if the fact's subject is unknown."""
    rows = []
    for prompts in scope.contrasts(edit, is_chat(edit.prompt, template)):
        for prompt in prompts:
            # A template may reject a system prompt; then the bare prompt follows.
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


def contrast_targets(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[BaftLayer],
    prompts: Sequence[Tokens],
    scope: Scope,
    prompt_positions: int,
    adapter_name: str,
    prepared: EditCache | None = None,
) -> ContrastTargets:
    """Answer the prompts with the unedited model, and return its hidden vectors at the tokens that an adapter edits.

    Args:
        prepared: the `EditCache` of the base model; by default the one stored for this model.

    Raises:
        ValueError: the model does not compute a prompt in one forward pass.
    """
    prepared = prepared or EditCache.of(model)
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    last_block, padding = layers[-1].get_base_layer(), padding_id(tokenizer)
    # Sorting by length reduces padding.
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    with without_adapters(model):
        batches = prompt_batches(model, last_block, ordered, padding, prompt_positions, prepared)
        for mask, generate in batches:
            with ExitStack() as stack:
                outputs = {
                    layer.name: stack.enter_context(collected_outputs(layer.get_base_layer()))
                    for layer in layers
                }
                answers = generate(scope.answer_tokens)
            edited = _hidden_of_answers(model, outputs, mask, answers, prompt_positions)
            for name, vectors in edited.items():
                parts[name].append(vectors)
    hidden = {name: torch.cat(vectors) for name, vectors in parts.items()}
    with torch.no_grad():
        before = {
            layer.name: PLAIN.change_at(layer, adapter_name, hidden[layer.name]) for layer in layers
        }
    sizes = {name: squared_lengths(vectors) for name, vectors in hidden.items()}
    return ContrastTargets(hidden, before, sizes)


def squared_lengths(hidden: Tensor) -> Tensor:
    """Compute |h|² of vectors (m, d), but at least `LEAST_SIZE` times the median: (m,) float32, all above 0.

    A vector can be zero: the embedding of a padding token often is, and a recurrent block maps zero to zero.
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
    """Select the hidden vectors at the edited tokens of one batch of prompts and answers, (m, d) by block.

    Args:
        outputs: the outputs of each block, one per forward pass. mask: (rows, tokens) of the prompts, padded on the left.

    Raises:
        ValueError: the model did not compute the prompts in one forward pass.
    """
    # The first forward pass has the prompts, aligned on the right. Each later one ends with the next token of the answers:
    # it has only that token, or, for a model without a cache, all tokens before it as well. A model may run a block several
    # times in each forward pass (Dory); then all its outputs are used.
    width, positions = mask.shape[1], min(prompt_positions, mask.shape[1])
    in_answer = before_end(answers.cpu(), end_tokens(model))[:, :-1]
    real = torch.cat([mask[:, -positions:].bool(), in_answer], 1)
    hidden = {}
    for name, block_outputs in outputs.items():
        if block_outputs[0].shape[1] != width:
            base = type(model.get_base_model()).__name__
            raise ValueError(CHUNKED_PREFILL.format(base, block_outputs[0].shape[1], width))
        runs = len(block_outputs) // answers.shape[1]
        parts = []
        for run in range(runs):
            first, *later = block_outputs[run::runs]
            vectors = torch.cat([first[:, -positions:], *(part[:, -1:] for part in later)], 1)
            parts.append(vectors[real.to(vectors.device)])
        hidden[name] = torch.cat(parts)
    return hidden


def before_end(answers: Tensor, ends: Sequence[int]) -> Tensor:
    """Return which tokens of generated answers (rows, tokens) come before their row's first end token: (rows, tokens) bool."""
    ended = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype))
    return ended.cumsum(1) == 0


@torch.no_grad()
def find_subject(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Template
) -> str | None:
    """Find the subject of a prompt: the span whose replacement changes the unedited model's next-token distribution most.

    Returns:
        The span as written in the prompt; None if the prompt has no candidate.
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
    probabilities = logits.float().softmax(-1)
    change = (probabilities[1:] - probabilities[0]).abs().sum(-1).view(len(candidates), -1).mean(1)
    return candidates[int(change.argmax())]
