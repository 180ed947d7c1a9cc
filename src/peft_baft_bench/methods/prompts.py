"""What methods share that decide, by a prompt, how it is answered: where prompts lie, and decisions that stay while decoding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_baft.adapter.blocks import blocks_before, stack_owner
from peft_baft.adapter.context import EditContext
from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.data.templates import Template
from peft_baft.editing.module_patches import (
    FixedBlocks,
    at_least_four,
    logits_only_at,
)
from peft_baft.evaluation.forward import answer_ids
from peft_baft.losses import answer_losses
from peft_baft.running import full_logits, input_device
from peft_baft.span import OUTSIDE
from peft_baft_bench.methods.in_place import InTurnEditor
from peft_baft_bench.methods.projections import by_rows

LAST_PROMPT_TOKEN = -1  # its position relative to the end of the prompt


class PromptWatch:
    """Tells, inside a forward of a model, where the prompts of its rows lie, and keeps what was decided of each row.

    A decision is made in the forward that holds a prompt's end, and stays for the forwards behind it, in which its answer is
    decoded from a cache.
    """

    def __init__(self, model: Any, block_or_module: str) -> None:
        self._context = EditContext(model, stack_owner(model, block_or_module))
        self._decided: Tensor | None = None

    def after(
        self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]
    ) -> RemovableHandle:
        """Let a function change what leaves a module.

        Args:
            change: makes anew what leaves, (rows, tokens, d), given what enters, (rows, tokens, f), and it; None leaves it.
        """

        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            rows = len(self.positions(output.device))
            changed = change(by_rows(args[0], rows), by_rows(output, rows))
            return None if changed is None else changed.reshape(output.shape)

        return module.register_forward_hook(hook)

    def remove(self) -> None:
        """Leave the model alone."""
        self._context.detach()

    def positions(self, device: torch.device) -> Tensor:
        """Give the position of each token relative to the end of its prompt, (rows, tokens)."""
        positions = self._context.relative_positions
        if positions is None:
            raise ValueError("The method needs a model that is called with tokens, (rows, tokens).")
        return positions.to(device)

    def ends(self, device: torch.device) -> Tensor:
        """Mark the last token of each prompt, (rows, tokens) bool."""
        return self.positions(device) == LAST_PROMPT_TOKEN

    def prompts(self, device: torch.device) -> Tensor:
        """Mark the tokens of prompts, (rows, tokens) bool."""
        positions = self.positions(device)
        return (positions < 0) & (positions != OUTSIDE)

    def decided(self, decide: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """Decide of each row, or give what was decided when its prompt was read.

        Args:
            decide: given where the prompts' tokens are, (rows, tokens) bool, makes a tensor with an entry for each row.

        Raises:
            ValueError: a prompt was read in pieces, or another number of rows is decoded than was decided of.
        """
        ends, prompts = self.ends(device).any(1), self.prompts(device)
        if ends.all():
            self._decided = decide(prompts)
        elif ends.any() or prompts.any():
            raise ValueError(
                "The method decides by whole prompts, but a forward held part of one: read each prompt in one forward, the "
                "same for all rows of a batch."
            )
        elif self._decided is None or len(self._decided) != len(ends):
            known = "none" if self._decided is None else len(self._decided)
            raise ValueError(
                f"{len(ends)} rows go on from a cache, but {known} were decided of: read their prompts first."
            )
        return self._decided


class Taught:
    """Rows of text that are put to a model, which a `PromptWatch` watches, again and again while their answers are learned.

    fixed: blocks before what is learned, which run once.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: Sequence[Tokens], fixed: FixedBlocks):
        self._model, self._fixed = model, fixed
        device = input_device(model)
        batch = collate(rows, padding_id(tokenizer))
        self._batch = {name: part.to(device) for name, part in batch.items()}
        # Labels would tell as well where prompts end, but let the model compute a loss of its own.
        del self._batch["labels"]
        self._batch["prompt_lengths"] = torch.tensor([row.prompt_length for row in rows])
        answers = [answer_ids(row) for row in rows]
        self._wanted, self._counts = torch.cat(answers).to(device), [len(ids) for ids in answers]
        # The logits before a token predict it.
        columns = [
            torch.arange(len(row.ids) - 1 - len(ids), len(row.ids) - 1)
            for row, ids in zip(rows, answers, strict=True)
        ]
        numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor(self._counts))
        self._places = numbers, torch.cat(columns)

    def losses(self) -> list[Tensor]:
        """Compute for each row the cross entropies of its answer's tokens."""
        head = self._model.get_output_embeddings()
        with self._fixed.run_once(), logits_only_at(head, at_least_four(self._places)):
            logits = full_logits(self._model, **self._batch)[: len(self._wanted)]
        return list(answer_losses(logits, self._wanted.to(logits.device)).split(self._counts))

    def loss(self) -> Tensor:
        """Compute the mean over rows of the mean over each one's answer tokens."""
        return torch.stack([losses.mean() for losses in self.losses()]).mean()


class ProjectionEditor(InTurnEditor):
    """Makes edits in turn at one projection, by what it reads of prompts; an `Editor` of which a method gives what changes.

    name: of the projection. A subclass calls `_attach` once it is ready to be asked.
    """

    def __init__(self, model: Any, tokenizer: Any, template: Template, name: str) -> None:
        super().__init__(model, tokenizer, template)
        self._name = name
        self._projection: nn.Module = model.get_submodule(name)
        self._device = next(self._projection.parameters()).device
        self._watch = PromptWatch(model, name)

    def _attach(self) -> None:
        self._handle = self._watch.after(self._projection, self._change)

    @abstractmethod
    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """Change what leaves the projection; as `change` of `PromptWatch.after`."""

    def _taught(self, rows: Sequence[Tokens]) -> Taught:
        """Put rows to the model while something at the projection is learned."""
        fixed = FixedBlocks(blocks_before(self.model, self._name))
        return Taught(self.model, self.tokenizer, rows, fixed)

    def remove(self) -> None:
        """Take what was learned off the model."""
        self._handle.remove()
        self._watch.remove()


def mean_over(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average hidden vectors (rows, tokens, f) over the tokens that are marked (rows, tokens): (rows, f) float32."""
    weights = mask.float()[..., None]
    return (hidden.float() * weights).sum(1) / weights.sum(1)
