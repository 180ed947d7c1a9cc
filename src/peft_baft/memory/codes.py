"""Learn the code of each edit: what is added to hidden vectors, in a frozen basis that all edits share.

    h ← h + c R        R (r, d) orthonormal rows of a block, c (r,) the edit's own numbers in that block

In the terms of BaFT, A = R and the gates are those of edits and not of basis vectors: one is open, or none. Edits that share
nothing but a frozen basis cannot forget each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.model_call import (
    call_with_cache,
    fork,
    full_logits,
    input_device,
    select_rows,
)
from peft_baft.baselines.projections import blocks_before
from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.editing.acceleration.module_patches import (
    FixedBlocks,
    at_least_four,
    logits_only_at,
    with_hidden,
)
from peft_baft.editing.acceleration.prefix_cache import split_batch
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
    texts = _Texts.of(model, tokenizer, rows, basis, prompt_positions)
    numbers = {id(descent): number for number, descent in enumerate(descents)}
    at_hand = list(range(len(rows)))  # of which row of `rows` each row of `texts` is

    def losses(running: Sequence[Descent]) -> list[Terms]:
        nonlocal texts, at_hand
        wanted = [numbers[id(descent)] for descent in running]
        if 2 * len(wanted) <= len(at_hand):  # what is learned needs no more forwards
            texts, at_hand = texts.select([at_hand.index(n) for n in wanted]), wanted
        of_rows = texts.losses(torch.stack([codes[n] for n in at_hand]))
        return [{STOP_TERM: of_rows[at_hand.index(n)].mean()} for n in wanted]

    results = descend(descents, losses)
    return torch.stack([code.detach() for code in codes]), results


@dataclass(frozen=True)
class _Texts:
    """What follows the tokens that no code edits, with a cache of these: texts that are put to a model again and again.

    Attributes:
        inputs: of the model; edited: (rows, tokens) bool. places: rows and columns of the logits that are read; wanted: what they
            should predict; counts: how many there are of each row.
    """

    model: Any
    basis: Basis
    inputs: dict[str, Tensor]
    cache: Any
    edited: Tensor
    places: tuple[Tensor, Tensor]
    wanted: Tensor
    counts: list[int]
    fixed: FixedBlocks

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, rows: Sequence[Tokens], basis: Basis, positions: int
    ) -> _Texts:
        """Put what no code edits into a cache, where the model keeps one and every prompt is long enough."""
        device = input_device(model)
        begins = [max(0, row.prompt_length - positions) for row in rows]
        cache, cuts = None, begins
        if all(begins):
            first, inputs = split_batch(model, rows, begins, padding_id(tokenizer), device)
            nowhere = torch.zeros(0, dtype=torch.long)
            head = model.get_output_embeddings()
            try:
                with torch.no_grad(), logits_only_at(head, (nowhere, nowhere)):
                    _, cache = call_with_cache(model, model, first)
            except NotImplementedError:
                cache = None
        if cache is None:
            cuts = [0] * len(rows)
            batch = collate(rows, padding_id(tokenizer))
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        answers = [answer_ids(row) for row in rows]
        ends = [len(row.ids) - cut for row, cut in zip(rows, cuts, strict=True)]
        columns = [
            torch.arange(end - 1 - len(ids), end - 1)
            for end, ids in zip(ends, answers, strict=True)
        ]
        counts = [len(ids) for ids in answers]
        numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        tokens = torch.arange(inputs["input_ids"].shape[1], device=device)
        begin = torch.tensor([b - cut for b, cut in zip(begins, cuts, strict=True)], device=device)
        return cls(
            model,
            basis,
            inputs,
            cache,
            tokens >= begin[:, None],
            (numbers, torch.cat(columns)),
            torch.cat(answers).to(device),
            counts,
            FixedBlocks(blocks_before(model, basis.blocks[0])),
        )

    def losses(self, codes: Tensor) -> list[Tensor]:
        """Compute for each row the cross entropies of its answer's tokens, with its code (rows, blocks, r)."""
        head = self.model.get_output_embeddings()
        with (
            self.basis.added(codes, self.edited),
            self.fixed.run_once(),
            logits_only_at(head, at_least_four(self.places)),
        ):
            if self.cache is None:
                logits = full_logits(self.model, **self.inputs)
            else:
                cache = fork(self.cache)
                logits, _ = call_with_cache(self.model, self.model, self.inputs, cache)
        logits = logits[: len(self.wanted)]
        return list(answer_losses(logits, self.wanted.to(logits.device)).split(self.counts))

    def select(self, chosen: Sequence[int]) -> _Texts:
        """Make the same of some of the rows."""
        index = torch.tensor(chosen)
        parts = [part.tolist() for part in self.places[1].split(self.counts)]
        wanted = self.wanted.split(self.counts)
        counts = [self.counts[i] for i in chosen]
        numbers = torch.arange(len(chosen)).repeat_interleave(torch.tensor(counts))
        columns = torch.tensor([column for i in chosen for column in parts[i]])
        device = self.edited.device
        index = index.to(device)
        outputs = {
            block: with_hidden(output, lambda hidden: hidden[index.to(hidden.device)])
            for block, output in self.fixed.outputs.items()
        }
        return replace(
            self,
            inputs={name: part[index] for name, part in self.inputs.items()},
            cache=None if self.cache is None else select_rows(self.cache, index),
            edited=self.edited[index],
            places=(numbers, columns),
            wanted=torch.cat([wanted[i] for i in chosen]),
            counts=counts,
            fixed=FixedBlocks(self.fixed.blocks, outputs),
        )
