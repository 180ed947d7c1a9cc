"""The one way to train edits: lanes side by side in shared forwards.

A lane is one adapter that learns one batch of facts. An edit is a lane with one fact, a batch is a lane with several, and
independent edits side by side are several lanes: a short edit's time goes into reading the model's weights, which all rows of a
batch share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor

from peft_baft.adapter import EditContext, RecordedGates
from peft_baft.adapter.balance import WITHOUT_GRADIENT
from peft_baft.data.batching import Tokens
from peft_baft.editing.answers import AnswerForward
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import Descent, Terms, descend
from peft_baft.processes import Processes

# By block: (n, k) at edited tokens, (m, k) at those of unrelated text.
Gates = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LaneOutput:
    """What one forward gives for one lane.

    Attributes:
        answer_losses: (n,) cross entropy of each answer token of the facts.
        gates: the gates of each block with gates, at the edited tokens of the facts and at those of the unrelated texts.
        displacements: (m,) how far the adapter moves the hidden vectors of contrast texts, which the edit shall leave alone,
            weighted.
    """

    answer_losses: Tensor
    gates: Gates
    displacements: Tensor


@dataclass
class Lane:
    """One adapter that learns one batch of facts.

    Attributes:
        adapter_name: what the facts are taught to.
        facts: the texts to learn. unrelated: texts that the edit should leave alone, beside them.
        displacements: computes how far the adapter moves hidden vectors that it shall leave alone, (m,) weighted; None for none.
        output: that of the last forward in which the lane took part.
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


LaneTerms = Callable[[Lane, LaneOutput], Terms]  # the named losses of a lane
# For rows, of which some are learned.
OpenForward = Callable[[Sequence[Tokens], Sequence[int]], AnswerForward]


class LaneBatch:
    """The rows of all running lanes in one batch, which shrinks when a lane ends: its rows would be computed in vain.

    Args:
        lanes: in the order of their rows.
        open_forward: makes the forward for all rows.
        context: of the model's BaFT adapters; None where gates are not needed.
        gated_blocks: names of the blocks whose gates are needed.
        prompt_positions: P of the adapters, which is asked for with a context alone.
        one_adapter_per_row: whether each row is edited by its lane's adapter; else by the active one.
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
        for lane, places in zip(lanes, row_ranges(lanes), strict=True):
            learned += places[: len(lane.facts)]
        self._forward = open_forward([row for lane in lanes for row in lane.rows], learned)
        self._take(lanes)

    def _take(self, lanes: Sequence[Lane]) -> None:
        """Note which lanes the batch holds, and where each one's edited tokens stand in its gates."""
        self._lanes = list(lanes)
        self._edited: list[tuple[Tensor, Tensor]] = []
        for lane, places in zip(lanes, row_ranges(lanes), strict=True):
            facts, unrelated = places[: len(lane.facts)], places[len(lane.facts) :]
            find = self._forward.targets.edited_places
            of_facts = find(facts, places, self._prompt_positions)
            self._edited.append((of_facts, find(unrelated, places, self._prompt_positions)))

    def keep(self, lanes: Sequence[Lane]) -> None:
        """Go on with some of the lanes alone."""
        if len(lanes) == len(self._lanes):
            return
        rows: list[int] = []
        for lane, places in zip(self._lanes, row_ranges(self._lanes), strict=True):
            if any(lane is kept for kept in lanes):
                rows += places
        self._forward = self._forward.select_rows(rows)
        self._take(lanes)

    def outputs(self) -> list[LaneOutput]:
        """Run one forward.

        Raises:
            ValueError: the gates carry no gradient, so that a regulariser would not act.
        """
        with self._editing(), self._recording() as recorded:
            losses = self._forward.losses()
        # The losses stand in the order of the rows, and each lane has the next of them.
        counts = self._forward.targets.counts
        ranges = row_ranges(self._lanes)
        parts = losses.split([sum(counts[i] for i in places) for places in ranges])
        outputs = []
        for lane, part, places in zip(self._lanes, parts, self._edited, strict=True):
            gates: Gates = {}
            for block in self._gated_blocks:
                key = (block, lane.adapter_name) if self._one_adapter_per_row else block
                gates[block] = _gates_at(recorded[key], places)
            moved = part.new_zeros(0) if lane.displacements is None else lane.displacements()
            outputs.append(LaneOutput(part, gates, moved))
        return outputs

    def _editing(self) -> AbstractContextManager[Any]:
        if self._context is None or not self._one_adapter_per_row:
            return nullcontext()
        return self._context.rows([lane.adapter_name for lane in self._lanes for _ in lane.rows])

    def _recording(self) -> AbstractContextManager[Any]:
        return nullcontext({}) if self._context is None else self._context.recording()


def _gates_at(recorded: RecordedGates, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Take the gates (n, k) and (m, k) at two lists of tokens."""
    if not recorded.w.requires_grad:
        raise ValueError(WITHOUT_GRADIENT)
    w = recorded.w.flatten(0, 1)
    of_facts, of_unrelated = places
    return w[of_facts.to(w.device)], w[of_unrelated.to(w.device)]


def row_ranges(lanes: Sequence[Lane]) -> list[range]:
    """Say which rows of a batch are each lane's."""
    ends = list(accumulate(len(lane.rows) for lane in lanes))
    return [range(end - len(lane.rows), end) for lane, end in zip(lanes, ends, strict=True)]


def train_lanes(
    lanes: Sequence[Lane],
    batch: LaneBatch | None,
    terms: LaneTerms,
    gated_blocks: Sequence[str] = (),
    processes: Processes | None = None,
) -> list[EditResult]:
    """Train every lane to its own end, in one forward and one backward a step.

    Args:
        batch: the lanes' rows; None for a process that has no part of them.
        terms: the losses of a lane, given what all processes computed for it.
        gated_blocks: names of the blocks whose gates the terms need, the same in all processes.
        processes: those that share the facts of each lane; each is given the outputs of all.

    Raises:
        FloatingPointError: as `descend`. ValueError: as `LaneBatch.outputs`.
    """
    processes = processes or Processes()

    def compute() -> list[Tensor]:
        return _flatten(batch.outputs()) if batch is not None else []

    def losses(descents: Sequence[Descent]) -> list[Terms]:
        running = [lane for lane in lanes if any(lane.descent is descent for descent in descents)]
        if batch is not None:
            batch.keep(running)
        outputs = _unflatten(processes.all_gather_rows(compute), gated_blocks)
        for lane, output in zip(running, outputs, strict=True):
            lane.output = output
        return [terms(lane, output) for lane, output in zip(running, outputs, strict=True)]

    return descend([lane.descent for lane in lanes], losses, processes)


def _flatten(outputs: Sequence[LaneOutput]) -> list[Tensor]:
    """List the tensors of outputs in a fixed order, for other processes."""
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
        of_blocks = dict(zip(gated_blocks, pairs, strict=True))
        outputs.append(LaneOutput(answer_losses, of_blocks, displacements))
    return outputs
