"""What an edit does to one prompt, token by token: where it acts, how strongly, and what the model then says instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, baft_layers, prompt_lengths
from peft_baft.adapter.state import evaluating, is_baft_peft_model, without_adapters
from peft_baft.data.batching import Tokens, context_window, encode_prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import greedy_tokens, logits_of_rows
from peft_baft.evaluation.scoring import first_line, greedy_answers
from peft_baft.tools.inspect.token_text import token_text


@dataclass(frozen=True)
class Change:
    """One candidate for the next token: its id, its text, and its probability without and with the edits."""

    id: int
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Token:
    """One token of the prompt or of the edited model's answer.

    Attributes:
        text: what it stands for; bytes that are only a part of a character read ‹E6 97›.
        answer: the edited model said it; False in the prompt.
        edited: an adapter acts on it.
        moved: share of the next token's probability that the edits moved to other tokens: total variation, in [0, 1].
        changes: candidates for the next token, the most risen first; empty where the token is not edited.
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
        size: norm of Φ(h) - h over the norm of h, of all adapters together; 0 where none acts.
        gates: the gates w(h), each in [0, 1], of each adapter that acts here, by its name; r ones for an adapter without
            gates (ReFT); a single one for an adapter of another kind, where it changes the token. Empty where the token is not
            edited.
    """

    size: float
    gates: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Block:
    """One edited block: its name in the base model, and a cell for each token."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Adapter:
    """An active adapter and the settings that a reader of its gates needs.

    Attributes:
        weighting: as in `BaftConfig`; of an adapter of another kind than plain BaFT, the kind's name.
        edit: of a kind whose edits answer prompts, the number of the one that answers; None if none does.
    """

    name: str
    r: int
    weighting: str
    prompt_positions: int
    answer_positions: int | None = None
    edit: int | None = None


@dataclass(frozen=True)
class Inspection:
    """A prompt, the greedy answers without (`before`) and with (`after`) the edits, and what the edits did."""

    prompt: str
    before: str
    after: str
    adapters: tuple[Adapter, ...]
    tokens: tuple[Token, ...]
    blocks: tuple[Block, ...]

    @property
    def prompt_end(self) -> int:
        """Index of the last prompt token: what comes after it is the answer's first token."""
        return sum(not token.answer for token in self.tokens) - 1


@torch.no_grad()
def inspect(
    model: PeftModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 12,
    top: int = 10,
    *,
    template: Template = RAW,
) -> Inspection:
    """Let the edited model answer `prompt` greedily, and measure every edit on the way.

    Everything is read off one forward over prompt and answer; probabilities without the edits are those of the same text.
    The model runs in evaluation mode and is left as it was found.

    Args:
        max_new_tokens: longest answer; it ends earlier at the end of the text or of its first line.
        template: the form in which the prompt is put to the model.
        top: how many candidates for each next token; the favourites without and with the edits are always among them.

    Raises:
        TypeError: the model carries no BaFT adapter.
        ValueError: none is active; the prompt is empty, unreadable or fills the context window; a number is below 1.
        FloatingPointError: the model's arithmetic broke down on this prompt.
    """
    layers = _active_layers(model)
    row, limit = _encoded(model, tokenizer, prompt, max_new_tokens, top, template)
    with evaluating(model):
        after, said = _answer(model, tokenizer, row, limit)
        ids = [*row.ids, *said]
        text = Tokens(tuple(ids), row.prompt_length)
        with _watching(layers) as seen, prompt_lengths(model, [row.prompt_length]):
            logits = _logits(model, tokenizer, text)
        # Where tokens stand is known until the next forward.
        blocks = tuple(_block(layer, seen) for layer in layers)
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
        kinds = {
            config.peft_type for config in (getattr(model, "peft_config", None) or {}).values()
        }
        raise TypeError(
            f"inspect() shows the gates of a BaFT adapter, but this {type(model).__name__} carries "
            f"{'/'.join(sorted(kinds)) or 'no adapter'}. Load a BaFT adapter with PeftModel.from_pretrained(model, folder), "
            "or make one with `baft edit`."
        )
    layers = [
        layer for layer in baft_layers(model) if not layer.disable_adapters and _active(layer)
    ]
    if not layers:
        raise ValueError(
            "This model's BaFT adapter is not active; switch to it with set_adapter(name)."
        )
    return layers


def _active(layer: BaftLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.configs]


def _adapters(layers: Sequence[BaftLayer], prompt: Sequence[int]) -> tuple[Adapter, ...]:
    """Describe the active adapters. prompt: token ids."""
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
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, top: int, template: Template
) -> tuple[Tokens, int]:
    """Encode the prompt, and find how many tokens may follow it; or refuse it."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(
            f"The prompt holds half a character, which no tokenizer can read: {prompt!r:.60}."
        )
    if max_new_tokens < 1 or top < 1:
        raise ValueError(
            f"max_new_tokens and top must be at least 1, not {max_new_tokens} and {top}."
        )
    row = encode_prompt(tokenizer, prompt, template=template)
    window = context_window(model) or len(row.ids) + max_new_tokens
    if not 0 < len(row.ids) < window:
        raise ValueError(
            f"The prompt {prompt!r:.60} has {len(row.ids)} tokens, but it must have at least 1, and fewer than the {window} "
            "that the model reads at most."
        )
    return row, min(max_new_tokens, window - len(row.ids))


def _answer(model: Any, tokenizer: Any, row: Tokens, limit: int) -> tuple[str, list[int]]:
    """Generate the answer, one line as `greedy_answers` gives it, and as many token ids as it takes to say it."""
    new = greedy_tokens(model, tokenizer, [row], [limit])[0]
    line = first_line(tokenizer, new)
    length = next(n for n in range(len(new) + 1) if first_line(tokenizer, new[:n]) == line)
    return line, new[:length].tolist()


def _logits(model: Any, tokenizer: Any, text: Tokens) -> Tensor:
    """Compute the logits (tokens, vocabulary) of one forward over prompt and answer."""
    logits = logits_of_rows(model, tokenizer, [text])[0]
    if logits.isnan().any():
        raise FloatingPointError(
            "The model's output on this prompt is not a number; try --dtype float32."
        )
    return logits


@contextmanager
def _watching(layers: Iterable[BaftLayer]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Keep what goes into and comes out of each layer and each of its gates, in the first row of the last forward."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = args[0][0].cpu(), output[0].cpu()

    watched = [module for layer in layers for module in (layer, *layer.baft_gate.values())]
    handles = [module.register_forward_hook(keep) for module in watched]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _block(layer: BaftLayer, seen: dict[nn.Module, tuple[Tensor, Tensor]]) -> Block:
    """Measure sizes and gates of one block, from what was seen of it in one forward."""
    h, out = (x.float() for x in seen[layer])
    sizes = (out - h).norm(dim=-1) / h.norm(dim=-1).clamp_min(torch.finfo(h.dtype).tiny)
    relative_positions = layer.context.relative_positions
    assert relative_positions is not None, "the model was given tokens"
    gates: list[dict[str, tuple[float, ...]]] = [{} for _ in sizes]
    for name in _active(layer):
        config = layer.configs[name]
        edited = config.edits(relative_positions[0])
        if name in layer.baft_gate:
            w = seen[layer.baft_gate[name]][1]
        elif config.kind.trains:
            w = torch.ones(len(h), config.r)
        else:
            w, edited = torch.ones(len(h), 1), (sizes > 0).to(edited.device)
        for i in edited.nonzero()[:, 0].tolist():
            gates[i][name] = tuple(w[i].tolist())
    cells = [
        Cell(size, gates_of_token)
        for size, gates_of_token in zip(sizes.tolist(), gates, strict=True)
    ]
    return Block(layer.name, tuple(cells))


def _next_token(
    tokenizer: Any, plain: Tensor, logits: Tensor, said: Sequence[int], top: int
) -> tuple[float, tuple[Change, ...]]:
    """Measure how far the next token's probabilities moved, and list candidates for it.

    These are both favourites and the token that does come, always, and then those that changed most.
    """
    before = plain.float().softmax(-1).cpu()
    after = logits.float().softmax(-1).cpu()
    change = after - before
    always = list(dict.fromkeys([int(before.argmax()), int(after.argmax()), *said]))
    most_changed = change.abs().topk(min(top, len(change))).indices.tolist()
    candidates = list(dict.fromkeys([*always, *most_changed]))[: max(top, len(always))]
    ids = sorted(candidates, key=lambda i: -change[i].item())
    changes = tuple(
        Change(i, token_text(tokenizer, i), before[i].item(), after[i].item()) for i in ids
    )
    return change.clamp_min(0).sum().item(), changes
