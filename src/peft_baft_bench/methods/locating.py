"""Shared by methods that locate a fact at its subject's last token: prefixes, keys, and target vectors.

ROME (arXiv 2202.05262, Sec. 3.1) and its successors use the input of a down projection at the subject's last
token as the key of a fact, and find by gradient descent what the projection should output there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from peft_baft_bench.methods.in_place import minimise, stop_below
from peft_baft_bench.methods.projections import by_rows
from peft_baft_bench.methods.validation import (
    require_integer,
    require_non_negative,
    require_positive,
)

ESSENCE = "{} is a"  # its continuation shows what the model believes the subject is


@dataclass(frozen=True)
class LocatedFact:
    """The texts of one fact and the positions of its subject in them.

    Attributes:
        rows: the prompt with its answer, first without and then with each prefix.
        places: the position of the subject's last token in each row.
        essence: the text "SUBJECT is a", whose continuation shows what the model believes the subject is.
        essence_place: the position of the subject's last token in it.
    """

    rows: tuple[Tokens, ...]
    places: tuple[int, ...]
    essence: Tokens
    essence_place: int


def generate_prefixes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[tuple[int, int]],
    seed: int = 0,
) -> list[str]:
    """Generate texts with the unedited model that can precede a prompt.

    Args:
        lengths: (tokens, count) pairs.
        seed: of the sampling; the caller's random state is not changed.
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
                text = str(tokenizer.decode([*ids[0], *new[0]], skip_special_tokens=True))
                found.append(" ".join(text.split()))
    return found


def cached_prefixes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[tuple[int, int]],
    prepared: EditCache,
) -> list[str]:
    """Generate prefixes once for all editors of a model; see `generate_prefixes`."""
    key = ("prefixes", *lengths)
    if key not in prepared.computed:
        prepared.computed[key] = generate_prefixes(model, tokenizer, lengths)
    found: list[str] = prepared.computed[key]
    return found


def with_prefixes(prompt: Prompt, prefixes: Sequence[str]) -> list[Prompt]:
    """Return a prompt without a prefix, and with each of the prefixes."""
    return [prompt, *(Context(before=f"{text}.").around(prompt) for text in prefixes)]


def locate_fact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    prefixes: Sequence[str],
    method: str,
    template: Template = RAW,
) -> LocatedFact:
    """Tokenise a fact without and with each prefix, and find its subject's last token in each text.

    Raises:
        ValueError: the edit has no subject, or a text does not fit into the model's context window.
    """
    if edit.subject is None:
        raise ValueError(
            f"{method} changes what a model knows about a subject, and {prompt_words(edit.prompt)!r:.60} names none: give "
            "Edit(prompt, target, subject=...), the words of the prompt that name the fact's subject."
        )
    prompts = with_prefixes(edit.prompt, prefixes)
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
    return LocatedFact(
        tuple(rows), tuple(places), bare, last_token_of(tokenizer, essence, edit.subject)
    )


@dataclass(frozen=True)
class Search:
    """How the target vector is searched for: Adam from zero, by default with EasyEdit's settings for ROME.

    Args:
        lr: the learning rate of Adam.
        max_steps: the maximum number of steps.
        stop_loss: stop once the total loss is below this.
        weight_decay: of the change's length, relative to the squared length of the original output.
        clamp: maximum length of the change, relative to the length of the original output.
        kl: weight of the KL divergence of the predictions after the subject.
    """

    lr: float = 0.5
    max_steps: int = 25
    stop_loss: float = 0.05
    weight_decay: float = 1e-3
    clamp: float = 4.0
    kl: float = 0.0625

    def __post_init__(self) -> None:
        require_integer("max_steps", self.max_steps, 1)
        for name in ("lr", "clamp"):
            require_positive(name, getattr(self, name))
        for name in ("stop_loss", "weight_decay", "kl"):
            require_non_negative(name, getattr(self, name))


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        target: what the module should output, (d,).
        result: the result as of an edit.
    """

    target: Tensor
    result: EditResult


def search_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    module_name: str,
    located: LocatedFact,
    search: Search,
) -> SearchResult:
    """Search for the module output at the subject's last token that makes the model give the answer in all texts.

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
    answer = labels[labels >= 0].to(input_device(model))
    answer_lengths = [len(row.ids) - row.prompt_length for row in located.rows]
    module, fixed = model.get_submodule(module_name), blocks_before(model, module_name)
    whole = RepeatedTexts.whole(model, tokenizer, rows, read, fixed)
    with torch.no_grad(), capture(module, len(rows)) as seen:
        unedited = whole.logits()
    before = unedited[-1].float().log_softmax(-1)
    original = seen[0].output[0, located.places[0]].detach().float()
    # Activations before the subject's last token cannot change, so they are computed once.
    texts = repeated_texts(model, tokenizer, rows, places, read, fixed)
    at = torch.tensor(places) - torch.tensor(texts.cuts)
    longest = search.clamp * original.norm()
    delta = nn.Parameter(torch.zeros_like(original))

    def terms() -> Terms:
        with add_vector(module, at, delta):
            logits = texts.logits()
        token_losses = answer_losses(logits[:-1], answer)
        now = logits[-1].float().log_softmax(-1)
        # Average over each text's answer tokens, then over texts.
        return {
            STOP_TERM: torch.stack(
                [part.mean() for part in torch.split(token_losses, answer_lengths)]
            ).mean(),
            "essence": search.kl * (now.exp() * (now - before)).sum(),
            "length": search.weight_decay * delta.norm() / original.square().sum(),
        }

    result = minimise(
        torch.optim.Adam([delta], lr=search.lr),
        terms,
        search.max_steps,
        stop_below(search.stop_loss),
        learned_below=search.stop_loss,
        after_step=lambda: delta.mul_((longest / delta.norm()).clamp(max=1.0)),
    )
    return SearchResult(original + delta.detach(), result)


@dataclass(frozen=True)
class Activations:
    """The input of a module, (rows, tokens, f), and its output, (rows, tokens, d)."""

    input: Tensor
    output: Tensor


@contextmanager
def capture(module: nn.Module, rows: int) -> Iterator[list[Activations]]:
    """Record the inputs and outputs of a module in the enclosed forwards, which have `rows` rows."""
    seen: list[Activations] = []
    handle = module.register_forward_hook(
        lambda _, args, output: seen.append(
            Activations(by_rows(args[0], rows), by_rows(_hidden(output), rows))
        )
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def add_vector(module: nn.Module, places: Tensor, delta: Tensor) -> Iterator[None]:
    """Add a vector (d,) to the output of a module at one token of each row; `places` are the tokens' positions, (rows,)."""

    def add(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    key_module: nn.Module,
    output_module: nn.Module,
    located: LocatedFact,
) -> tuple[Tensor, Tensor]:
    """Compute the input of one module and the output of another (or the same) at the subject's last token.

    Returns:
        The inputs in each text of the fact, (texts, f), without a prefix first; and the output without a
            prefix, (d,).
    """
    device = input_device(model)
    batch = {k: v.to(device) for k, v in collate(located.rows, padding_id(tokenizer)).items()}
    batch.pop("labels")
    count = len(located.rows)
    with (
        capture(key_module, count) as keyed,
        capture(output_module, count) as produced,
        no_logits(model),
    ):
        full_logits(model, **batch)
    rows = torch.arange(len(located.places))
    keys = keyed[0].input[rows, list(located.places)].float()
    return keys, produced[0].output[0, located.places[0]].float()


def _hidden(output: Any) -> Tensor:
    """Return the hidden vectors (rows, tokens, d) from a module's output, which may be a tuple that begins with them."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
