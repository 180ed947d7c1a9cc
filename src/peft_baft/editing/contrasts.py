"""Contrast texts: what must stay as it is although it looks like the fact that is edited.

A contrast text is a neighbour of the fact (`data/neighbours.py`), answered by the unedited model. An edit looks at it through
the hidden vectors that the unedited model has at its edited tokens. They are computed once, before the edit. Each step then
asks of the adapter alone, without a forward of the model, how far it moves them: at the edited blocks an adapter that moves
none of them leaves the whole text as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer
from peft_baft.adapter.model_call import end_tokens, full_logits, input_device
from peft_baft.adapter.state import without_adapters
from peft_baft.data.batching import Tokens, collate, context_window, encode_prompt, padding_id
from peft_baft.data.cases import Edit, Prompt, prompt_words
from peft_baft.data.neighbours import other_subjects, subject_candidates, with_other_subject
from peft_baft.data.templates import Template, is_chat
from peft_baft.editing.acceleration.module_patches import logits_only_at
from peft_baft.editing.acceleration.packed_linear import packed_forwards
from peft_baft.editing.acceleration.prepared import PreparedModel
from peft_baft.editing.acceleration.shared_prefix import PromptBatch, SharedPrefix, find_prefix
from peft_baft.editing.scope import Scope

BATCH_SIZE = 64  # so many contrast texts are answered together
# Each span that may be the subject is exchanged for so many others, to see what that changes.
TRIED_SUBJECTS = 2
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
    """

    hidden: Mapping[str, Tensor]
    before: Mapping[str, Tensor]

    def displacements(self, layers: Sequence[BaftLayer], adapter_name: str) -> Tensor:
        """Compute how far an adapter moves the vectors now: |Φ(h) - Φ₀(h)|² / |h|², mean over the blocks.

        Returns:
            (m,) with gradient, on the first block's device.
        """
        shares = []
        for layer in layers:
            h = self.hidden[layer.name]
            moved = layer.change_at(adapter_name, h) - self.before[layer.name]
            shares.append(moved.float().square().sum(-1) / h.float().square().sum(-1))
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
    prepared: PreparedModel | None = None,
) -> HeldVectors:
    """Let the unedited model answer the prompts, and keep its hidden vectors at the tokens that an adapter edits.

    Args:
        prepared: of the base model; by default what the context of its adapters owns.
    """
    prepared = prepared or PreparedModel.of(model)
    packed = packed_forwards(model.get_base_model().modules(), prepared.packed)
    prefix = SharedPrefix()
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    # Texts of like length need little padding.
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    with without_adapters(model):
        ids = find_prefix(model, prompts, prompt_positions, prepared.verified_length)
        if ids:
            prefix = SharedPrefix.of(model, ids, packed)
        for start in range(0, len(ordered), BATCH_SIZE):
            some = ordered[start : start + BATCH_SIZE]
            batch = PromptBatch.of(some, padding_id(tokenizer), prefix)
            with ExitStack() as stack:
                outputs = {
                    layer.name: stack.enter_context(collected_outputs(layer.get_base_layer()))
                    for layer in layers
                }
                answers = batch.answers(model, padding_id(tokenizer), scope.answer_tokens, packed)
            found = _hidden_of_answers(model, outputs, batch.mask, answers, prompt_positions)
            for name, vectors in found.items():
                parts[name].append(vectors)
    hidden = {name: torch.cat(of_block) for name, of_block in parts.items()}
    with torch.no_grad():
        before = {layer.name: layer.change_at(adapter_name, hidden[layer.name]) for layer in layers}
    return HeldVectors(hidden, before)


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
    # has that token alone, or, for a model that keeps no cache, all those before it as well.
    width, positions = mask.shape[1], min(prompt_positions, mask.shape[1])
    of_answer = goes_on(answers.cpu(), end_tokens(model))[:, :-1]
    real = torch.cat([mask[:, -positions:].bool(), of_answer], 1)
    hidden = {}
    for name, (first, *later) in outputs.items():
        if first.shape[1] != width:
            base = type(model.get_base_model()).__name__
            raise ValueError(NOT_A_TOKEN_A_STEP.format(base, first.shape[1], width))
        vectors = torch.cat([first[:, -positions:], *(part[:, -1:] for part in later)], 1)
        hidden[name] = vectors[real.to(vectors.device)]
    return hidden


@contextmanager
def collected_outputs(block: nn.Module) -> Iterator[list[Tensor]]:
    """List the hidden vectors (rows, tokens, d) that a block gives in each forward inside."""
    outputs: list[Tensor] = []

    def collect(_block: nn.Module, _args: tuple, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).detach())

    with block.register_forward_hook(collect):
        yield outputs


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
