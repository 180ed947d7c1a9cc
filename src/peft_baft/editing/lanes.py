"""Training of edits in lanes that share forward passes.

A lane is one adapter that is trained on one batch of facts. A single edit is a lane with one fact, a batch edit is a lane with
several, and independent edits are several lanes. Most of the time of a short edit goes into reading the model's weights, which
all rows of a batch share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter import EditContext, RecordedGates
from peft_baft.adapter.balance import WITHOUT_GRADIENT
from peft_baft.data.batching import Tokens
from peft_baft.editing.answers import AnswerForward
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import Descent, Terms, descend
from peft_baft.processes import Processes

# By block: the gates (n, k) at the edited tokens of facts, and (m, k) at those of unrelated texts.
Gates = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LaneOutput:
    """The output of one forward pass for one lane.

    Attributes:
        answer_losses: (n,) cross entropy of each answer token of the facts.
        gates: for each block with gates, their values at the edited tokens of the facts and of the unrelated texts.
        displacements: (m,) weighted distances by which the adapter moves the hidden vectors of contrast texts.
    """

    answer_losses: Tensor
    gates: Gates
    displacements: Tensor


@dataclass
class Lane:
    """One adapter that is trained on one batch of facts.

    Attributes:
        adapter_name: the adapter that is trained.
        facts: the rows to train on. unrelated: rows that the edit should not affect.
        displacements: computes the weighted distances, (m,), by which the adapter moves contrast texts; None without them.
        output: the output of the lane's last forward pass.
    """

    adapter_name: str
    facts: list[Tokens]
    unrelated: list[Tokens]
    descent: Descent
    displacements: Callable[[], Tensor] | None = None
    output: LaneOutput | None = field(default=None)

    @property
    def rows(self) -> list[Tokens]:
        """The lane's rows of a batch: its facts, then its unrelated texts."""
        return [*self.facts, *self.unrelated]


LaneTerms = Callable[[Lane, LaneOutput], Terms]  # computes the named losses of a lane
# Called with the rows of a batch and the indices of those whose answers are trained.
OpenForward = Callable[[Sequence[Tokens], Sequence[int]], AnswerForward]


class LaneBatch:
    """A batch with the rows of all running lanes. The rows of a lane are dropped when it ends.

    Args:
        lanes: the lanes, in the order of their rows.
        open_forward: returns the loss computation for the rows.
        context: the edit context of the model's BaFT adapters; None if no gates are needed.
        gated_blocks: names of the blocks whose gates are needed.
        prompt_positions: P of the adapters; needed only with a context.
        one_adapter_per_row: whether each row uses its lane's adapter instead of the active one.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        open_forward: OpenForward,
        context: EditContext | None = None,
        gated_blocks: Sequence[str] = (),
        prompt_positions: int = 0,
        one_adapter_per_row: bool = False,
    ) -> None:
        self._context, self._gated_blocks = context, list(gated_blocks)
        self._prompt_positions, self._one_adapter_per_row = prompt_positions, one_adapter_per_row
        learned: list[int] = []
        for lane, lane_rows in zip(lanes, row_ranges(lanes), strict=True):
            learned += lane_rows[: len(lane.facts)]
        self._forward = open_forward([row for lane in lanes for row in lane.rows], learned)
        self._set_lanes(lanes)

    def _set_lanes(self, lanes: Sequence[Lane]) -> None:
        """Set the lanes of the batch, and compute the places of each lane's edited tokens among its gates."""
        self._lanes = list(lanes)
        self._edited: list[tuple[Tensor, Tensor]] = []
        edited_places = self._forward.targets.edited_places
        for lane, lane_rows in zip(lanes, row_ranges(lanes), strict=True):
            facts, unrelated = lane_rows[: len(lane.facts)], lane_rows[len(lane.facts) :]
            in_facts = edited_places(facts, lane_rows, self._prompt_positions)
            in_unrelated = edited_places(unrelated, lane_rows, self._prompt_positions)
            self._edited.append((in_facts, in_unrelated))

    def select_lanes(self, lanes: Sequence[Lane]) -> None:
        """Drop all lanes except these, which must be given in the order of their rows."""
        if len(lanes) == len(self._lanes):
            return
        rows: list[int] = []
        for lane, lane_rows in zip(self._lanes, row_ranges(self._lanes), strict=True):
            if any(lane is selected for selected in lanes):
                rows += lane_rows
        self._forward = self._forward.select_rows(rows)
        self._set_lanes(lanes)

    def outputs(self) -> list[LaneOutput]:
        """Run one forward pass.

        Raises:
            ValueError: the gates have no gradient, so a regulariser would have no effect.
        """
        with self._editing(), self._recording() as recorded:
            losses = self._forward.losses()
        # The losses are in the order of the rows, lane after lane.
        counts = self._forward.targets.counts
        answer_tokens = [sum(counts[i] for i in rows) for rows in row_ranges(self._lanes)]
        lane_losses = torch.split(losses, answer_tokens)
        outputs = []
        for lane, own_losses, places in zip(self._lanes, lane_losses, self._edited, strict=True):
            gates: Gates = {}
            for block in self._gated_blocks:
                key = (block, lane.adapter_name) if self._one_adapter_per_row else block
                gates[block] = _gates_at(recorded[key], places)
            moved = own_losses.new_zeros(0) if lane.displacements is None else lane.displacements()
            outputs.append(LaneOutput(own_losses, gates, moved))
        return outputs

    def _editing(self) -> AbstractContextManager[Any]:
        if self._context is None or not self._one_adapter_per_row:
            return nullcontext()
        return self._context.rows([lane.adapter_name for lane in self._lanes for _ in lane.rows])

    def _recording(self) -> AbstractContextManager[Any]:
        return nullcontext({}) if self._context is None else self._context.recording()


def _gates_at(recorded: RecordedGates, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the gates (n, k) and (m, k) at the edited tokens of facts and of unrelated texts."""
    if not recorded.w.requires_grad:
        raise ValueError(WITHOUT_GRADIENT)
    w = recorded.w.flatten(0, 1)
    in_facts, in_unrelated = places
    return w[in_facts.to(w.device)], w[in_unrelated.to(w.device)]


def row_ranges(lanes: Sequence[Lane]) -> list[range]:
    """Return the range of each lane's rows in a batch."""
    ends = list(accumulate(len(lane.rows) for lane in lanes))
    return [range(end - len(lane.rows), end) for lane, end in zip(lanes, ends, strict=True)]


def train_lanes(
    lanes: Sequence[Lane],
    batch: LaneBatch | None,
    terms: LaneTerms,
    gated_blocks: Sequence[str] = (),
    processes: Processes | None = None,
) -> list[EditResult]:
    """Train all lanes with one forward and one backward pass per step; each lane stops on its own criterion.

    Args:
        batch: the rows of the lanes; None in a process that has none of them.
        terms: computes the losses of a lane from the joined outputs of all processes.
        gated_blocks: names of the blocks whose gates the terms need; the same in all processes.
        processes: the processes that share the facts of each lane. The outputs of all are gathered in each.

    Raises:
        FloatingPointError: as `descend`. ValueError: as `LaneBatch.outputs`.
    """
    processes = processes or Processes()

    def compute() -> list[Tensor]:
        return _flatten(batch.outputs()) if batch is not None else []

    def losses(descents: Sequence[Descent]) -> list[Terms]:
        running = [lane for lane in lanes if any(lane.descent is descent for descent in descents)]
        if batch is not None:
            batch.select_lanes(running)
        outputs = _unflatten(processes.all_gather_rows(compute), gated_blocks)
        for lane, output in zip(running, outputs, strict=True):
            lane.output = output
        return [terms(lane, output) for lane, output in zip(running, outputs, strict=True)]

    return descend([lane.descent for lane in lanes], losses, processes)


def _flatten(outputs: Sequence[LaneOutput]) -> list[Tensor]:
    """List the tensors of outputs in a fixed order, to be sent to other processes."""
    tensors = []
    for output in outputs:
        tensors += [output.answer_losses, output.displacements]
        for pair in output.gates.values():
            tensors += pair
    return tensors


def _unflatten(tensors: Sequence[Tensor], gated_blocks: Sequence[str]) -> list[LaneOutput]:
    """Undo `_flatten`."""
    count = 2 + 2 * len(gated_blocks)
    outputs = []
    for first in range(0, len(tensors), count):
        answer_losses, displacements, *gates = tensors[first : first + count]
        pairs = zip(gates[::2], gates[1::2], strict=True)
        gates_by_block = dict(zip(gated_blocks, pairs, strict=True))
        outputs.append(LaneOutput(answer_losses, gates_by_block, displacements))
    return outputs
