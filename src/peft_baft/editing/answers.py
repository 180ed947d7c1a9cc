"""The answer tokens that an edit is trained on, and the plain computation of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor

from peft_baft.adapter import EditContext, find_context
from peft_baft.data.batching import Tokens, collate
from peft_baft.losses import answer_losses
from peft_baft.running import full_logits


@dataclass(frozen=True)
class AnswerTargets:
    """The places of a batch's answer tokens and edited tokens.

    A batch may lack the first tokens of each row, if those are in a cache.

    Attributes:
        rows: the whole texts.
        learned: the indices of the rows whose answers are trained; the others are only needed for their gates.
        cuts: the number of tokens of each row that the batch lacks; its column 0 has token `cuts[i]` of row i.
        width: the number of columns of the batch.
        places: rows and columns, (n,) each, of the logits that predict the trained answer tokens.
        tokens: (n,) ids of these answer tokens, row after row.
        counts: the number of trained answer tokens of each row.
        prompt_lengths: (rows,) long.
    """

    rows: Sequence[Tokens]
    learned: Sequence[int]
    cuts: Sequence[int]
    width: int
    places: tuple[Tensor, Tensor]
    tokens: Tensor
    counts: Sequence[int]
    prompt_lengths: Tensor

    @classmethod
    def of(
        cls,
        rows: Sequence[Tokens],
        learned: Sequence[int],
        cuts: Sequence[int],
        width: int,
        device: torch.device,
    ) -> AnswerTargets:
        """Return the targets of a batch of these rows without their first `cuts[i]` tokens."""
        places_rows, places_columns, tokens = [], [], []
        counts = [0] * len(rows)
        for i in learned:
            row = rows[i]
            counts[i] = len(row.ids) - row.prompt_length
            for t in range(row.prompt_length, len(row.ids)):
                places_rows.append(i)
                places_columns.append(
                    t - 1 - cuts[i]
                )  # the logits of the previous token predict it
                tokens.append(row.ids[t])
        places = (
            torch.tensor(places_rows, device=device),
            torch.tensor(places_columns, device=device),
        )
        prompt_lengths = torch.tensor([row.prompt_length for row in rows], device=device)
        tokens_on_device = torch.tensor(tokens, device=device)
        return cls(rows, learned, cuts, width, places, tokens_on_device, counts, prompt_lengths)

    def select_rows(self, chosen: Sequence[int], width: int) -> AnswerTargets:
        """Return the targets of a batch of some of the rows, `width` columns wide."""
        rows, cuts = [self.rows[i] for i in chosen], [self.cuts[i] for i in chosen]
        learned = [number for number, i in enumerate(chosen) if i in self.learned]
        return AnswerTargets.of(rows, learned, cuts, width, self.tokens.device)

    def edited_places(
        self, rows: Sequence[int], among: Sequence[int], prompt_positions: int
    ) -> Tensor:
        """Return the places of the edited tokens of some rows in a tensor of the rows `among`.

        Returns:
            (m,) indices into that tensor, (rows, tokens, …), flattened to (rows * tokens, …).
        """
        places = []
        for i in rows:
            first = max(0, self.rows[i].prompt_length - prompt_positions)
            begin = among.index(i) * self.width - self.cuts[i]
            places += [begin + t for t in range(first, len(self.rows[i].ids))]
        return torch.tensor(places, dtype=torch.long, device=self.tokens.device)


class AnswerForward(Protocol):
    """A computation of the losses of some answers, repeated while an adapter is trained."""

    @property
    def targets(self) -> AnswerTargets:
        """The tokens that are trained, in the order of the losses."""
        ...

    def losses(self) -> Tensor:
        """Compute the cross entropy of each trained answer token, (n,), at the adapter's current parameters."""
        ...

    def select_rows(self, chosen: Sequence[int]) -> AnswerForward:
        """Return the computation for some of the rows."""
        ...


class FullForward:
    """The plain computation: each forward pass computes every token of every row.

    Args:
        model: a PeftModel. rows: the texts. learned: the indices of the rows whose answers are trained.
        padding: a token id for padding. device: the device of the model's inputs.
    """

    def __init__(
        self,
        model: PeftModel,
        rows: Sequence[Tokens],
        learned: Sequence[int],
        padding: int,
        device: torch.device,
    ) -> None:
        self.model, self._padding, self._context = model, padding, find_context(model)
        batch = collate(rows, padding)
        self._inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        width = self._inputs["input_ids"].shape[1]
        self.targets = AnswerTargets.of(rows, learned, [0] * len(rows), width, device)

    def losses(self) -> Tensor:
        """Compute the cross entropy of each trained answer token, (n,)."""
        with stated_lengths(self._context, self.targets):
            logits = full_logits(self.model, **self._inputs)
        at_answers = logits[on_device(logits.device, self.targets.places)]
        return answer_losses(at_answers, self.targets.tokens.to(logits.device))

    def select_rows(self, chosen: Sequence[int]) -> FullForward:
        """Return the computation for some of the rows."""
        rows = [self.targets.rows[i] for i in chosen]
        learned = [number for number, i in enumerate(chosen) if i in self.targets.learned]
        return FullForward(self.model, rows, learned, self._padding, self.targets.tokens.device)


def stated_lengths(
    context: EditContext | None, targets: AnswerTargets
) -> AbstractContextManager[Any]:
    """Set the prompt lengths of a batch in the model's edit context, if it has BaFT adapters and so a context."""
    return nullcontext() if context is None else context.stating(targets.prompt_lengths)


def on_device(device: torch.device, indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Move indices to the device of the tensor that they index."""
    return tuple(index.to(device) for index in indices)
