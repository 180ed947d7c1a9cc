"""What methods share that locate a fact at its subject's last token: texts around it, keys, and the vector that says the answer.

ROME (arXiv 2202.05262, Sec. 3.1) and what follows it take what enters a down projection at the subject's last token for the
key of a fact, and find by gradient descent what should leave the projection there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.blocks import blocks_before
from peft_baft.data.batching import Tokens, collate, encode_fitting, last_token_of, padding_id
from peft_baft.data.cases import Edit, Prompt, prompt_words
from peft_baft.data.contexts import Context
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import EditResult
from peft_baft.editing.fast_paths import repeated_texts
from peft_baft.editing.module_patches import no_logits
from peft_baft.editing.repeated_texts import RepeatedTexts
from peft_baft.editing.train import STOP_TERM, Terms
from peft_baft.editing.written_texts import BEGINNINGS
from peft_baft.losses import answer_losses
from peft_baft.running import full_logits, generate_sampled, input_device
from peft_baft_bench.methods.in_place import below, minimise
from peft_baft_bench.methods.projections import by_rows

ESSENCE = "{} is a"  # in which what follows the subject tells what the model takes it for


@dataclass(frozen=True)
class Located:
    """Texts of one fact. rows: the bare prompt first, each with the answer; places: of each, the subject's last token.

    essence, essence_place: the text that begins to say what the subject is, and the subject's last token there.
    """

    rows: tuple[Tokens, ...]
    places: tuple[int, ...]
    essence: Tokens
    essence_place: int


def prefixes(
    model: Any, tokenizer: Any, lengths: Sequence[tuple[int, int]], seed: int = 0
) -> list[str]:
    """Let the unedited model write what may stand before a prompt.

    Args:
        lengths: (tokens, count) pairs. seed: of the random numbers, which leave those of the caller as they were.
    """
    device = input_device(model)
    found: list[str] = []
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.manual_seed(seed)
        for tokens, count in lengths:
            for number in range(count):
                row = tokenizer(BEGINNINGS[number % len(BEGINNINGS)], return_tensors="pt")
                ids, mask = row["input_ids"], row["attention_mask"]
                new = generate_sampled(model, ids, mask, padding_id(tokenizer), tokens)
                text = tokenizer.decode([*ids[0], *new[0]], skip_special_tokens=True)
                found.append(" ".join(text.split()))
    return found


def written_once(
    model: Any, tokenizer: Any, lengths: Sequence[tuple[int, int]], prepared: EditCache
) -> list[str]:
    """Let the unedited model write prefixes, once for all editors of a model; arguments as `prefixes`."""
    key = ("prefixes", *lengths)
    if key not in prepared.computed:
        prepared.computed[key] = prefixes(model, tokenizer, lengths)
    found: list[str] = prepared.computed[key]
    return found


def in_texts(prompt: Prompt, before: Sequence[str]) -> list[Prompt]:
    """Give a prompt bare, and behind each of some texts."""
    return [prompt, *(Context(before=f"{text}.").around(prompt) for text in before)]


def locate(
    model: Any,
    tokenizer: Any,
    edit: Edit,
    before: Sequence[str],
    method: str,
    template: Template = RAW,
) -> Located:
    """Tokenise a fact in each of some contexts, and find its subject's last token in them.

    Raises:
        ValueError: the edit has no subject, or a text is longer than the model can read.
    """
    if edit.subject is None:
        raise ValueError(
            f"{method} changes what a model knows of a subject, and {prompt_words(edit.prompt)!r:.60} names none: give "
            "Edit(prompt, target, subject=...), the words of the prompt that say what the fact is about."
        )
    prompts = in_texts(edit.prompt, before)
    rows = [
        encode_fitting(model, tokenizer, prompt, edit.target, template=template)
        for prompt in prompts
    ]
    places = [
        last_token_of(tokenizer, prompt, edit.subject, template=template) for prompt in prompts
    ]
    essence = ESSENCE.format(edit.subject)
    row = encode_fitting(model, tokenizer, essence, edit.target)
    bare = Tokens(row.ids[: row.prompt_length], row.prompt_length)
    return Located(
        tuple(rows), tuple(places), bare, last_token_of(tokenizer, essence, edit.subject)
    )


@dataclass(frozen=True)
class Search:
    """How the vector that says an answer is searched for: Adam from zero, with EasyEdit's settings for ROME.

    Args:
        lr: of Adam. max_steps: at most so many. stop_loss: stop once the whole loss is below this.
        weight_decay: of the vector's length, relative to the square of what was there. clamp: the vector is at most so many
            times as long as what was there. kl: weight of the divergence of what the subject is taken for.
    """

    lr: float = 0.5
    max_steps: int = 25
    stop_loss: float = 0.05
    weight_decay: float = 1e-3
    clamp: float = 4.0
    kl: float = 0.0625

    def __post_init__(self) -> None:
        if type(self.max_steps) is not int or self.max_steps < 1:
            raise ValueError(f"max_steps must be an integer of at least 1, not {self.max_steps!r}.")
        for name in ("lr", "clamp"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)!r}.")
        for name in ("stop_loss", "weight_decay", "kl"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be 0 or above and finite, not {getattr(self, name)!r}."
                )


@dataclass(frozen=True)
class Found:
    """What a search came to. target: (d,) what should leave the module; result: as of an edit."""

    target: Tensor
    result: EditResult


def search_target(
    model: Any, tokenizer: Any, module_name: str, located: Located, search: Search
) -> Found:
    """Find what should leave a module at the subject's last token, so that the model says the answer in every context.

    Raises:
        FloatingPointError: a loss became NaN or infinite.
    """
    rows, places = [*located.rows, located.essence], [*located.places, located.essence_place]
    labels = collate(rows, padding_id(tokenizer))["labels"][:, 1:]
    row_of_answer, column = (labels >= 0).nonzero(as_tuple=True)
    read = (
        torch.cat([row_of_answer, torch.tensor([len(rows) - 1])]),
        torch.cat([column, torch.tensor([located.essence_place])]),
    )
    wanted = labels[labels >= 0].to(input_device(model))
    per_row = [len(row.ids) - row.prompt_length for row in located.rows]
    module, fixed = model.get_submodule(module_name), blocks_before(model, module_name)
    whole = RepeatedTexts.whole(model, tokenizer, rows, read, fixed)
    with torch.no_grad(), captured(module, len(rows)) as seen:
        unedited = whole.logits()
    before = unedited[-1].float().log_softmax(-1)
    original = seen[0].output[0, located.places[0]].detach().float()
    # What stands before the subject's last token cannot change.
    texts = repeated_texts(model, tokenizer, rows, places, read, fixed)
    at = torch.tensor(places) - torch.tensor(texts.cuts)
    longest = search.clamp * original.norm()
    delta = nn.Parameter(torch.zeros_like(original))

    def terms() -> Terms:
        with added(module, at, delta):
            logits = texts.logits()
        of_answers = answer_losses(logits[:-1], wanted)
        now = logits[-1].float().log_softmax(-1)
        # The mean over each text's answer tokens, and over texts.
        return {
            STOP_TERM: torch.stack([part.mean() for part in of_answers.split(per_row)]).mean(),
            "essence": search.kl * (now.exp() * (now - before)).sum(),
            "length": search.weight_decay * delta.norm() / original.square().sum(),
        }

    result = minimise(
        torch.optim.Adam([delta], lr=search.lr),
        terms,
        search.max_steps,
        below(search.stop_loss),
        learned_below=search.stop_loss,
        after_step=lambda: delta.mul_((longest / delta.norm()).clamp(max=1.0)),
    )
    return Found(original + delta.detach(), result)


@dataclass(frozen=True)
class Pass:
    """What entered a module, (rows, tokens, f), and what left it, (rows, tokens, d)."""

    input: Tensor
    output: Tensor


@contextmanager
def captured(module: nn.Module, rows: int) -> Iterator[list[Pass]]:
    """Keep what enters and leaves a module in the forwards inside, which are over so many rows."""
    seen: list[Pass] = []
    handle = module.register_forward_hook(
        lambda _, args, output: seen.append(
            Pass(by_rows(args[0], rows), by_rows(_hidden(output), rows))
        )
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def added(module: nn.Module, places: Tensor, delta: Tensor) -> Iterator[None]:
    """Add a vector (d,) to what leaves a module at one token of each row; places: (rows,)."""

    def add(_module: nn.Module, _args: tuple, output: Any) -> Any:
        given = _hidden(output)
        hidden = by_rows(given, len(places))
        tokens = torch.arange(hidden.shape[1], device=hidden.device)
        mask = tokens == places.to(hidden.device)[:, None]
        hidden = (hidden + mask[..., None] * delta.to(hidden.dtype)).reshape(given.shape)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def keys_and_outputs(
    model: Any, tokenizer: Any, entered: nn.Module, left: nn.Module, located: Located
) -> tuple[Tensor, Tensor]:
    """Compute what enters a module at the subject's last token, and what leaves the same or another one there.

    Returns:
        What enters in each of the fact's texts, (texts, f), the bare prompt first; what leaves with the bare prompt, (d,).
    """
    device = input_device(model)
    batch = {k: v.to(device) for k, v in collate(located.rows, padding_id(tokenizer)).items()}
    batch.pop("labels")
    count = len(located.rows)
    with captured(entered, count) as before, captured(left, count) as behind, no_logits(model):
        full_logits(model, **batch)
    rows = torch.arange(len(located.places))
    keys = before[0].input[rows, list(located.places)].float()
    return keys, behind[0].output[0, located.places[0]].float()


def _hidden(output: Any) -> Tensor:
    """Take the hidden vectors (rows, tokens, d) of what a module gives; some blocks give them first among others."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
