"""Shared by methods that decide per prompt how it is answered.

They need the positions of prompts, and decisions that persist while the answer is decoded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

LAST_PROMPT_TOKEN = -1  # position relative to the end of the prompt


class PromptTracker:
    """Locates the prompts of each row during a forward of a model, and caches what was decided for each row.

    A decision is made in the forward that contains the end of a prompt, and persists in the following
    forwards, in which the answer is decoded with a cache.
    """

    def __init__(self, model: nn.Module, block_or_module: str) -> None:
        self._context = EditContext(model, stack_owner(model, block_or_module))
        self._decisions: Tensor | None = None

    def modify_output(
        self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]
    ) -> RemovableHandle:
        """Register a function that modifies the output of a module.

        Args:
            change: called with the module's input, (rows, tokens, f), and output, (rows, tokens, d); returns
                the new output, or None to keep it.
        """

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            rows = len(self.positions(output.device))
            changed = change(by_rows(args[0], rows), by_rows(output, rows))
            return None if changed is None else changed.reshape(output.shape)

        return module.register_forward_hook(hook)

    def remove(self) -> None:
        """Remove the hooks from the model."""
        self._context.detach()

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of each token relative to the end of its prompt, (rows, tokens)."""
        positions = self._context.relative_positions
        if positions is None:
            raise ValueError(
                "The method needs a model that is called with token ids, (rows, tokens)."
            )
        return positions.to(device)

    def end_mask(self, device: torch.device) -> Tensor:
        """Mark the last token of each prompt, (rows, tokens) bool."""
        return self.positions(device) == LAST_PROMPT_TOKEN

    def prompt_mask(self, device: torch.device) -> Tensor:
        """Mark the tokens of prompts, (rows, tokens) bool."""
        positions = self.positions(device)
        return (positions < 0) & (positions != OUTSIDE)

    def decide_once(self, decide: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """Make a decision for each row, or return the one made when its prompt was read.

        Args:
            decide: called with the mask of the prompts' tokens, (rows, tokens) bool; returns a tensor with
                one entry per row.

        Raises:
            ValueError: a prompt was read in pieces, or the number of decoded rows differs from the number of
                decisions.
        """
        ends, prompts = self.end_mask(device).any(1), self.prompt_mask(device)
        if ends.all():
            self._decisions = decide(prompts)
        elif ends.any() or prompts.any():
            raise ValueError(
                "The method needs whole prompts, but a forward contained part of one: read each prompt in one forward, the "
                "same for all rows of a batch."
            )
        elif self._decisions is None or len(self._decisions) != len(ends):
            count = 0 if self._decisions is None else len(self._decisions)
            raise ValueError(
                f"{len(ends)} rows continue from a cache, but {count} prompts were read: read their prompts first."
            )
        return self._decisions


class TrainingTexts:
    """Texts that are run repeatedly while their answers are learned, in a model with a `PromptTracker`.

    Args:
        fixed: the blocks before the trained part, which run only once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Tokens],
        fixed: FixedBlocks,
    ):
        self._model, self._fixed = model, fixed
        device = input_device(model)
        batch = collate(rows, padding_id(tokenizer))
        self._batch = {name: part.to(device) for name, part in batch.items()}
        # Labels also mark where prompts end, but with them the model would compute its own loss.
        del self._batch["labels"]
        self._batch["prompt_lengths"] = torch.tensor([row.prompt_length for row in rows])
        answers = [answer_ids(row) for row in rows]
        self._answers, self._counts = torch.cat(answers).to(device), [len(ids) for ids in answers]
        # The logits before a token predict it.
        columns = [
            torch.arange(len(row.ids) - 1 - len(ids), len(row.ids) - 1)
            for row, ids in zip(rows, answers, strict=True)
        ]
        numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor(self._counts))
        self._places = numbers, torch.cat(columns)

    def losses(self) -> list[Tensor]:
        """Compute the cross entropies of each row's answer tokens."""
        head = self._model.get_output_embeddings()
        with self._fixed.run_once(), logits_only_at(head, at_least_four(self._places)):
            logits = full_logits(self._model, **self._batch)[: len(self._answers)]
        losses = answer_losses(logits, self._answers.to(logits.device))
        return list(torch.split(losses, self._counts))

    def loss(self) -> Tensor:
        """Average the cross entropy over each row's answer tokens, then over rows."""
        return torch.stack([losses.mean() for losses in self.losses()]).mean()


class ProjectionEditor(InTurnEditor):
    """Base class of `Editor`s that make edits one after another at one projection, depending on the prompt.

    Subclasses implement `_change`.

    Args:
        name: of the projection. Subclasses call `_attach` at the end of their `__init__`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        name: str,
    ) -> None:
        super().__init__(model, tokenizer, template)
        self._name = name
        self._projection: nn.Module = model.get_submodule(name)
        self._device = next(self._projection.parameters()).device
        self._tracker = PromptTracker(model, name)

    def _attach(self) -> None:
        self._handle = self._tracker.modify_output(self._projection, self._change)

    @abstractmethod
    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """Modify the output of the projection; see `PromptTracker.modify_output`."""

    def _training_texts(self, rows: Sequence[Tokens]) -> TrainingTexts:
        """Prepare rows for repeated forwards while something at the projection is trained."""
        fixed = FixedBlocks(blocks_before(self.model, self._name))
        return TrainingTexts(self.model, self.tokenizer, rows, fixed)

    def remove(self) -> None:
        """Remove the hooks from the model; the model is then unedited."""
        self._handle.remove()
        self._tracker.remove()


def mean_over(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average hidden vectors (rows, tokens, f) over the marked tokens (rows, tokens): (rows, f) float32."""
    weights = mask.float()[..., None]
    return (hidden.float() * weights).sum(1) / weights.sum(1)
