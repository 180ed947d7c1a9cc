"""Independent edits side by side: a short edit's time goes into reading the weights, which the rows of a batch share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate

from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, EditContext, RecordedGates
from peft_baft.data.batching import Tokens
from peft_baft.editing.acceleration.prefix_cache import Session
from peft_baft.editing.train import Descent, Outcome, Terms, descend_together


@dataclass(frozen=True)
class Share:
    """Where one adapter's edited tokens stand in its gates (rows, tokens, k), flattened to (rows * tokens, k).

    Attributes:
        edit: (n,) those of the edit itself. unrelated: (m,) those of the texts that it should leave alone.
    """

    edit: Tensor
    unrelated: Tensor


Gates = Mapping[str, RecordedGates]  # of one adapter, by the name of the block


@dataclass
class Lane:
    """One edit under way.

    Attributes:
        adapter_name: what it is taught to. rows: the fact, then its unrelated texts.
        gates: those of the last forward in which it took part. share: its edited tokens among them.
    """

    adapter_name: str
    rows: list[Tokens]
    descent: Descent
    gates: dict[str, RecordedGates] = field(default_factory=dict)
    share: Share | None = None


def train_lanes(
    lanes: Sequence[Lane],
    context: EditContext,
    blocks: Sequence[str],
    open_session: Callable[[Sequence[Tokens], Sequence[int]], Session],
    positions: int,
    terms: Callable[[str, Tensor, Share, Gates], Terms],
) -> list[Outcome]:
    """Train every lane to its own end, all in one forward and one backward a step.

    Args:
        blocks: names of the blocks whose gates a lane's terms need.
        open_session: a session for so many rows, of which those with these numbers are learned.
        positions: P of the adapters.
        terms: the losses of one adapter, given its name, the mean cross entropy of its answer, its share and its gates.
    """
    of_descent = {id(lane.descent): lane for lane in lanes}
    running = list(lanes)
    session = open_session([row for lane in lanes for row in lane.rows], [own[0] for own in _places(lanes)])
    _divide(session, running, positions)

    def losses(going: Sequence[Descent]) -> list[Terms]:
        nonlocal running, session
        if len(going) < len(running):  # rows of edits that are done would be computed in vain
            left = {id(descent) for descent in going}
            places = zip(running, _places(running), strict=True)
            session = session.taking([i for lane, own in places if id(lane.descent) in left for i in own])
            running = [of_descent[id(descent)] for descent in going]
            _divide(session, running, positions)
        with context.rows(_names(running)), context.recording() as recorded:
            answers = session.losses().split([sum(session.answers[i] for i in own) for own in _places(running)])
        for lane in running:
            lane.gates = {name: recorded[name, lane.adapter_name] for name in blocks}
        return [
            terms(lane.adapter_name, own.mean(), lane.share, lane.gates)
            for lane, own in zip(running, answers, strict=True)
            if lane.share is not None
        ]

    return descend_together([lane.descent for lane in lanes], losses)


def divide(session: Session, edit: Sequence[int], unrelated: Sequence[int], positions: int) -> Share:
    """The share of an adapter whose rows are `edit` and then `unrelated`."""
    own = [*edit, *unrelated]
    return Share(session.edited(edit, own, positions), session.edited(unrelated, own, positions))


def _divide(session: Session, lanes: Sequence[Lane], positions: int) -> None:
    for lane, own in zip(lanes, _places(lanes), strict=True):
        lane.share = divide(session, own[:1], own[1:], positions)


def _names(lanes: Sequence[Lane]) -> list[str]:
    return [lane.adapter_name for lane in lanes for _ in lane.rows]


def _places(lanes: Sequence[Lane]) -> list[range]:
    """Which rows of a batch are each lane's."""
    ends = list(accumulate(len(lane.rows) for lane in lanes))
    return [range(end - len(lane.rows), end) for lane, end in zip(lanes, ends, strict=True)]


def copy_adapter(model: PeftModel, layers: Sequence[BaftLayer], source: str, name: str) -> None:
    """Give the model one more BaFT adapter, `name`, that is as `source` is now."""
    model.add_adapter(name, deepcopy(model.peft_config[source]))
    for layer in layers:
        for container in (layer.baft_basis, layer.baft_source, layer.baft_gate):
            if source in container:
                container[name].load_state_dict(container[source].state_dict())
        if source in layer.baft_gate_usage:
            layer.baft_gate_usage[name] = layer.baft_gate_usage[source].clone()


def parameters_of(layers: Sequence[BaftLayer], name: str) -> list[nn.Parameter]:
    """The parameters of one adapter."""
    containers = [c for layer in layers for c in (layer.baft_basis, layer.baft_source, layer.baft_gate)]
    return [p for container in containers if name in container for p in container[name].parameters()]
