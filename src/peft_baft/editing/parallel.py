"""Independent edits side by side: a short edit's time goes into reading the weights, which the rows of a batch share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, EditContext, RecordedGates
from peft_baft.data.batching import Tokens
from peft_baft.editing.descent import Descent, Outcome, Terms, descend_together
from peft_baft.editing.session import Session

Gates = Mapping[str, RecordedGates]  # of one adapter, by the name of the block


@dataclass
class Lane:
    """One edit under way.

    Attributes:
        adapter_name: what it is taught to. rows: the fact, then its unrelated texts.
        gates: those of the last forward in which it took part.
    """

    adapter_name: str
    rows: list[Tokens]
    descent: Descent
    gates: dict[str, RecordedGates] = field(default_factory=dict)


def train_lanes(
    lanes: Sequence[Lane],
    context: EditContext,
    blocks: Sequence[str],
    open_session: Callable[[Sequence[Tokens]], Session],
    terms: Callable[[str, Tensor, Tensor, Gates], Terms],
) -> list[Outcome]:
    """Train every lane to its own end, all in one forward and one backward a step.

    Args:
        blocks: names of the blocks whose gates a lane's terms need. open_session: a session for so many rows.
        terms: the losses of one adapter, given its name, and logits, labels and gates of its own rows.
    """
    of_descent = {id(lane.descent): lane for lane in lanes}
    running: list[Lane] = []
    session: Session | None = None

    def losses(going: Sequence[Descent]) -> list[Terms]:
        nonlocal running, session
        wanted = [of_descent[id(one)] for one in going]
        if session is None or 2 * len(wanted) <= len(running):  # rows of edits that are done would be computed in vain
            running, session = wanted, None
        names = [lane.adapter_name for lane in running for _ in lane.rows]
        with context.rows(names), context.recording() as recorded:
            session = session or open_session([row for lane in running for row in lane.rows])
            logits = session.logits()
        found, first = {}, 0
        for lane in running:
            own = slice(first, first := first + len(lane.rows))
            found[id(lane)] = logits[own], session.labels[own]
        for lane in wanted:
            lane.gates = {name: recorded[name, lane.adapter_name] for name in blocks}
        return [terms(lane.adapter_name, *found[id(lane)], lane.gates) for lane in wanted]

    return descend_together([lane.descent for lane in lanes], losses)


def copy_adapter(model: PeftModel, layers: Sequence[BaftLayer], source: str, name: str) -> None:
    """Give the model one more BaFT adapter, `name`, that is as `source` is now."""
    model.add_adapter(name, deepcopy(model.peft_config[source]))
    for layer in layers:
        for container in (layer.baft_basis, layer.baft_source, layer.baft_gate):
            if source in container:
                container[name].load_state_dict(container[source].state_dict())
        if source in layer.baft_load:
            layer.baft_load[name] = layer.baft_load[source].clone()


def parameters_of(layers: Sequence[BaftLayer], name: str) -> list[nn.Parameter]:
    """The parameters of one adapter."""
    containers = [c for layer in layers for c in (layer.baft_basis, layer.baft_source, layer.baft_gate)]
    return [p for container in containers if name in container for p in container[name].parameters()]
