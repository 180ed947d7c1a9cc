"""Learn the code of each edit: what is added to hidden vectors, in a frozen basis that all edits share.

    h ← h + c R        R (r, d) orthonormal rows of a block, c (r,) the edit's own numbers in that block

In the terms of BaFT, A = R and the gates are those of edits and not of basis vectors: one is open, or none. Edits that share
nothing but a frozen basis cannot forget each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.model_call import input_device
from peft_baft.baselines.projections import blocks_before
from peft_baft.data.batching import Tokens
from peft_baft.editing.acceleration.cached_texts import CachedTexts
from peft_baft.editing.acceleration.module_patches import with_hidden
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import STOP_TERM, Descent, DescentConfig, Terms, descend
from peft_baft.evaluation.forward import answer_ids
from peft_baft.losses import answer_losses


def orthonormal(block: int, rank: int, width: int) -> Tensor:
    """Make the basis of a block, (r, d) float32: the same for every memory, so that it need not be kept.

    Raises:
        ValueError: there are not so many directions.
    """
    if rank > width:
        raise ValueError(f"rank must be at most the width of the model, {width}, not {rank}.")
    generator = torch.Generator().manual_seed(1_000_003 + block)
    random = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(random)
    # The signs of a QR decomposition are a library's own choice; these are not.
    return (basis * triangle.diagonal().sign()).mT.float().contiguous()


class Basis:
    """The bases of the edited blocks of a model, and the hooks that add what codes make of them.

    blocks: names of the modules whose outputs are edited, first ones first. rank: r.
    """

    def __init__(self, model: Any, blocks: Sequence[str], rank: int, width: int) -> None:
        self.blocks, self.model = list(blocks), model
        device = input_device(model)
        self.rows = [
            orthonormal(int(name.rpartition(".")[2]), rank, width).to(device) for name in blocks
        ]

    @contextmanager
    def added(self, codes: Tensor, mask: Tensor) -> Iterator[None]:
        """Add the codes (rows, blocks, r) to the tokens that the mask marks (rows, tokens), in the forwards inside."""
        with ExitStack() as hooks:
            for number, name in enumerate(self.blocks):
                change = codes[:, number] @ self.rows[number]
                hook = partial(_add, change, mask)
                hooks.enter_context(self.model.get_submodule(name).register_forward_hook(hook))
            yield


def _add(change: Tensor, mask: Tensor, _module: nn.Module, _args: tuple, output: Any) -> Any:
    def edited(hidden: Tensor) -> Tensor:
        update = mask.to(hidden.device)[..., None] * change.to(hidden.device)[:, None]
        return hidden + update.to(hidden.dtype)

    return with_hidden(output, edited)


def learn_codes(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    basis: Basis,
    prompt_positions: int,
    config: DescentConfig,
) -> tuple[Tensor, list[EditResult]]:
    """Learn a code for each text side by side, each until its own answer is learned.

    Returns:
        (texts, blocks, r), and the result of each.

    Raises:
        FloatingPointError: a loss became NaN or infinite.
    """
    device = input_device(model)
    codes = [
        nn.Parameter(torch.zeros(len(basis.blocks), len(basis.rows[0]), device=device))
        for _ in rows
    ]
    descents = [Descent([code], config) for code in codes]
    answers = [answer_ids(row).to(device) for row in rows]
    texts = _texts(model, tokenizer, rows, basis, prompt_positions)
    begins = [max(0, row.prompt_length - prompt_positions) for row in rows]
    numbers = {id(descent): number for number, descent in enumerate(descents)}
    at_hand = list(range(len(rows)))  # of which row of `rows` each row of `texts` is

    def losses(running: Sequence[Descent]) -> list[Terms]:
        nonlocal texts, at_hand
        wanted = [numbers[id(descent)] for descent in running]
        if 2 * len(wanted) <= len(at_hand):  # what is learned needs no more forwards
            texts, at_hand = texts.select([at_hand.index(n) for n in wanted]), wanted
        columns = torch.arange(texts.inputs["input_ids"].shape[1], device=device)
        first = [begins[n] - cut for n, cut in zip(at_hand, texts.cuts, strict=True)]
        edited = columns >= torch.tensor(first, device=device)[:, None]
        with basis.added(torch.stack([codes[n] for n in at_hand]), edited):
            logits = texts.logits()
        every = answer_losses(logits, torch.cat([answers[n] for n in at_hand]).to(logits.device))
        of_rows = every.split([len(answers[n]) for n in at_hand])
        return [{STOP_TERM: of_rows[at_hand.index(n)].mean()} for n in wanted]

    results = descend(descents, losses)
    return torch.stack([code.detach() for code in codes]), results


def _texts(
    model: Any, tokenizer: Any, rows: Sequence[Tokens], basis: Basis, prompt_positions: int
) -> CachedTexts:
    """Put what no code edits into a cache, and read the logits that predict the answers' tokens."""
    lengths = [len(row.ids) - row.prompt_length - row.lead for row in rows]
    columns = [
        torch.arange(len(row.ids) - 1 - length, len(row.ids) - 1)
        for row, length in zip(rows, lengths, strict=True)
    ]
    numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
    cuts = [max(0, row.prompt_length - prompt_positions) for row in rows]
    fixed = blocks_before(model, basis.blocks[0])
    return CachedTexts.of(model, tokenizer, rows, cuts, (numbers, torch.cat(columns)), fixed)
