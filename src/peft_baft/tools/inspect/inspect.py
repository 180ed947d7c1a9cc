"""Measure what edits do to one prompt, token by token: where they act, how strongly, and how the output changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_baft.adapter import BaftLayer, baft_layers, prompt_lengths
from peft_baft.adapter.state import evaluating, is_baft_peft_model, without_adapters
from peft_baft.data.batching import Tokens, context_window, encode_prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import greedy_tokens, logits_of_rows
from peft_baft.evaluation.scoring import first_line, greedy_answers
from peft_baft.tools.inspect.token_text import token_text


@dataclass(frozen=True)
class Change:
    """A candidate for the next token: its id, its text, and its probability without and with the edits."""

    id: int
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Token:
    """One token of the prompt or of the edited model's answer.

    Attributes:
        text: its text; bytes of a partial character are written as ‹E6 97›.
        answer: whether it belongs to the answer, and not to the prompt.
        edited: whether an adapter edits it.
        moved: total variation distance, in [0, 1], of the next token's probabilities with and without the edits.
        changes: candidates for the next token, the largest increase first; empty if the token is not edited.
    """

    id: int
    text: str
    answer: bool
    edited: bool
    moved: float
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Cell:
    """What the adapters do to one token in one block.

    Attributes:
        size: norm of Φ(h) - h divided by the norm of h, for all adapters together; 0 if none acts here.
        gates: the gates w(h), each in [0, 1], of each adapter that acts here, by its name. Adapters without gates (ReFT) have
            r gates that are 1; adapters of other kinds have a single gate of 1 if they change the token. Empty if the token is
            not edited.
    """

    size: float
    gates: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Block:
    """An edited block: its name in the base model, and a cell for each token."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Adapter:
    """An active adapter and the settings that are needed to interpret its gates.

    Attributes:
        weighting: as in `BaftConfig`; the name of the kind if it is not a plain BaFT adapter.
        edit: for a kind that selects an edit per prompt, the number of the selected one; None if there is none.
    """

    name: str
    r: int
    weighting: str
    prompt_positions: int
    answer_positions: int | None = None
    edit: int | None = None


@dataclass(frozen=True)
class Inspection:
    """A prompt, the greedy answers without (`before`) and with (`after`) the edits, and measurements of the edits."""

    prompt: str
    before: str
    after: str
    adapters: tuple[Adapter, ...]
    tokens: tuple[Token, ...]
    blocks: tuple[Block, ...]

    @property
    def prompt_end(self) -> int:
        """Index of the last prompt token, which predicts the answer's first token."""
        return sum(not token.answer for token in self.tokens) - 1


@torch.no_grad()
def inspect(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 12,
    top: int = 10,
    *,
    template: Template = RAW,
) -> Inspection:
    """Answer `prompt` greedily with the edited model, and measure what the edits do to each token.

    All measurements come from one forward over the prompt and the answer; probabilities without the edits are for the same text.
    The model runs in evaluation mode, and is left unchanged.

    Args:
        max_new_tokens: maximum length of the answer; it also ends at the end of the text or of its first line.
        template: the prompt format.
        top: number of candidates for each next token. The most probable tokens without and with the edits are always included.

    Raises:
        TypeError: the model has no BaFT adapter.
        ValueError: no BaFT adapter is active; the prompt is empty, invalid or fills the context window; a number is below 1.
        FloatingPointError: the model's output on this prompt is NaN.
    """
    layers = _active_layers(model)
    row, limit = _encoded(model, tokenizer, prompt, max_new_tokens, top, template)
    with evaluating(model):
        after, answer = _answer(model, tokenizer, row, limit)
        ids = [*row.ids, *answer]
        text = Tokens(tuple(ids), row.prompt_length)
        with _recorded(layers) as records, prompt_lengths(model, [row.prompt_length]):
            logits = _logits(model, tokenizer, text)
        # The token positions are known until the next forward.
        blocks = tuple(_block(layer, records) for layer in layers)
        adapters = _adapters(layers, row.ids)
        with without_adapters(model):
            plain = _logits(model, tokenizer, text)
            before = greedy_answers(model, tokenizer, [prompt], limit, template=template)[0]
    tokens = []
    for i, token in enumerate(ids):
        is_edited = any(block.cells[i].gates for block in blocks)
        moved = 0.0
        changes: tuple[Change, ...] = ()
        if is_edited:
            moved, changes = _next_token(tokenizer, plain[i], logits[i], ids[i + 1 : i + 2], top)
        is_answer = i >= row.prompt_length
        tokens.append(
            Token(token, token_text(tokenizer, token), is_answer, is_edited, moved, changes)
        )
    return Inspection(prompt, before, after, adapters, tuple(tokens), blocks)


def _active_layers(model: nn.Module) -> list[BaftLayer]:
    if not is_baft_peft_model(model):
        configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
        kinds = {config.peft_type for config in configs.values()}
        raise TypeError(
            f"inspect() shows the gates of a BaFT adapter, but this {type(model).__name__} has "
            f"{'/'.join(sorted(kinds)) or 'no adapter'}. Load a BaFT adapter with PeftModel.from_pretrained(model, folder), "
            "or make one with `baft edit`."
        )
    layers = [
        layer for layer in baft_layers(model) if not layer.disable_adapters and _active(layer)
    ]
    if not layers:
        raise ValueError(
            "This model's BaFT adapter is not active; activate it with set_adapter(name)."
        )
    return layers


def _active(layer: BaftLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.configs]


def _adapters(layers: Sequence[BaftLayer], prompt: Sequence[int]) -> tuple[Adapter, ...]:
    """Describe the active adapters for a prompt of token ids."""
    configs = {name: layer.configs[name] for layer in layers for name in _active(layer)}
    parts: dict[str, Any] = {
        name: part for layer in layers for name, part in layer.baft_part.items()
    }
    adapters = []
    for name, c in configs.items():
        weighting = c.weighting if c.kind.trains else c.kind.name
        edit = parts[name].answering(prompt) if name in parts else None
        adapters.append(Adapter(name, c.r, weighting, c.prompt_positions, c.answer_positions, edit))
    return tuple(adapters)


def _encoded(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    top: int,
    template: Template,
) -> tuple[Tokens, int]:
    """Return the encoded prompt and the number of tokens to generate; raise a ValueError if an argument is invalid."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(
            f"The prompt has half a character (a lone surrogate), which no tokenizer can read: {prompt!r:.60}."
        )
    if max_new_tokens < 1 or top < 1:
        raise ValueError(
            f"max_new_tokens and top must be at least 1, not {max_new_tokens} and {top}."
        )
    row = encode_prompt(tokenizer, prompt, template=template)
    window = context_window(model) or len(row.ids) + max_new_tokens
    if not 0 < len(row.ids) < window:
        raise ValueError(
            f"The prompt {prompt!r:.60} has {len(row.ids)} tokens, but it must have at least 1 and fewer than {window}, the "
            "most that the model reads."
        )
    return row, min(max_new_tokens, window - len(row.ids))


def _answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: Tokens, limit: int
) -> tuple[str, list[int]]:
    """Generate the answer; return its first line, as `greedy_answers` does, and the token ids of that line."""
    new = greedy_tokens(model, tokenizer, [row], [limit])[0]
    line = first_line(tokenizer, new)
    length = next(n for n in range(len(new) + 1) if first_line(tokenizer, new[:n]) == line)
    return line, new[:length].tolist()


def _logits(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: Tokens) -> Tensor:
    """Compute the logits (tokens, vocabulary) of one forward over prompt and answer."""
    logits = logits_of_rows(model, tokenizer, [text])[0]
    if logits.isnan().any():
        raise FloatingPointError("The model's output on this prompt is NaN; try --dtype float32.")
    return logits


@contextmanager
def _recorded(layers: Iterable[BaftLayer]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Record the input and output of each layer and of its gates, for the first row of the last forward."""
    records: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        records[module] = args[0][0].cpu(), output[0].cpu()

    modules = [module for layer in layers for module in (layer, *layer.baft_gate.values())]
    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _block(layer: BaftLayer, records: dict[nn.Module, tuple[Tensor, Tensor]]) -> Block:
    """Compute the sizes and gates of one block from the records of a forward."""
    h, out = (x.float() for x in records[layer])
    sizes = (out - h).norm(dim=-1) / h.norm(dim=-1).clamp_min(torch.finfo(h.dtype).tiny)
    relative_positions = layer.context.relative_positions
    assert relative_positions is not None, "a forward just ran"
    gates: list[dict[str, tuple[float, ...]]] = [{} for _ in sizes]
    for name in _active(layer):
        config = layer.configs[name]
        edited = config.edits(relative_positions[0])
        if name in layer.baft_gate:
            w = records[layer.baft_gate[name]][1]
        elif config.kind.trains:
            w = torch.ones(len(h), config.r)
        else:
            w, edited = torch.ones(len(h), 1), (sizes > 0).to(edited.device)
        for i in edited.nonzero()[:, 0].tolist():
            gates[i][name] = tuple(w[i].tolist())
    cells = tuple(map(Cell, sizes.tolist(), gates))
    return Block(layer.name, cells)


def _next_token(
    tokenizer: PreTrainedTokenizerBase,
    plain: Tensor,
    logits: Tensor,
    actual: Sequence[int],
    top: int,
) -> tuple[float, tuple[Change, ...]]:
    """Compute how much the next token's probabilities changed, and list candidates for it.

    The candidates are the most probable tokens with and without the edits, the actual next token, and those that changed most.
    """
    before = plain.float().softmax(-1).cpu()
    after = logits.float().softmax(-1).cpu()
    change = after - before
    always = list(dict.fromkeys([int(before.argmax()), int(after.argmax()), *actual]))
    most_changed = change.abs().topk(min(top, len(change))).indices.tolist()
    candidates = list(dict.fromkeys([*always, *most_changed]))[: max(top, len(always))]
    ids = sorted(candidates, key=lambda i: -change[i].item())
    changes = tuple(
        Change(i, token_text(tokenizer, i), before[i].item(), after[i].item()) for i in ids
    )
    return change.clamp_min(0).sum().item(), changes
