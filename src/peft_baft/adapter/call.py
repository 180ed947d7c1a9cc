"""What a block needs to know of the forward that it is part of, and how it finds this again when autograd runs the block twice.

Activation checkpointing runs a block a second time, during the backward, with the inputs of the first run. By then the model may
have been called on other texts, and on a GPU the second run happens in a thread of autograd's own. What the block was told must
therefore be found by the block's input, not by the thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft_baft.adapter.texts import Texts

# How many calls are kept of one input: a loop over one tensor must not keep ever more of them.
MOST_CALLS = 1000
# Where an autograd node keeps the calls whose block inputs it computed.
IN_METADATA = "peft_baft.call"
NOT_FOUND = (
    "A block with a BaFT adapter was run again during a backward, as activation checkpointing does, on an input that none of the "
    "model's forwards gave it, so that the tokens to edit are unknown. This happens where saved activations are copied, "
    "as reentrant checkpointing with offloading does. Checkpoint the blocks with use_reentrant=False, and not a part of the "
    "model around the blocks that gets no labels or prompt_lengths of its own."
)
AMBIGUOUS = (
    "A block with a BaFT adapter was run again during a backward, as activation checkpointing does, on an input that it got in "
    "several forwards with different prompts, so that the tokens to edit are unknown. Checkpoint with use_reentrant=False, or "
    "give each forward a copy of its inputs."
)


@dataclass(frozen=True, eq=False)
class Call:
    """What the blocks need to know of one forward. Nothing here has a gradient, so that keeping a call keeps no graph.

    Attributes:
        relative_positions: (rows, tokens) long; None edits every token, where the model does not take token sequences.
        row_adapters: the adapter of each row of a mixed batch (PEFT's `adapter_names`); None where all rows are edited by
            the active adapters.
        active: the adapters that were active in a block when it first ran, by the block's name.
        texts: the tokens of each sequence, wherever they lie; None where no kind of adapter on the model reads them.
        may_be_repeated: whether gradients were enabled, so that blocks may run again in a backward.
    """

    relative_positions: Tensor | None
    row_adapters: list[str] | None = None
    active: dict[str, Sequence[str]] = field(default_factory=dict)
    texts: Texts | None = None
    may_be_repeated: bool = False

    def edits_like(self, other: Call) -> bool:
        """Return whether two calls edit the same tokens by the same adapters."""
        return (
            equal(self.relative_positions, other.relative_positions)
            and self.row_adapters == other.row_adapters
            and self.active == other.active
            and self.texts is other.texts
        )


@dataclass(frozen=True)
class RecordedGates:
    """The gates of one block in one forward.

    Attributes:
        w: (rows, tokens, k) with gradient. mask: (rows, tokens) bool, the tokens that are edited.
    """

    w: Tensor
    mask: Tensor


def equal(one: Tensor | None, two: Tensor | None) -> bool:
    """Return whether both are None, or tensors of the same shape and values."""
    if one is None or two is None:
        return one is two
    return one.shape == two.shape and torch.equal(one, two)


def in_backward() -> bool:
    """Return whether this thread is computing a backward, in which a block only runs if it is run again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden vectors that a block is called with: its first argument that is a tensor."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


class CallsByInput:
    """The calls of forwards whose blocks may be run again, by the input of each block.

    A call is found by the tensor itself or by where its values lie: reentrant checkpointing passes a detached alias. An entry
    goes when the tensor does, and no two living tensors share their values unless one is an alias of the other. Where the
    values were moved away and back in between (`torch.autograd.graph.save_on_cpu`), the autograd node that computed them
    still tells the call.
    """

    def __init__(self) -> None:
        # Reentrant, since the garbage collector may run `forget` inside `remember`.
        self._lock = threading.RLock()
        self._entries: dict[tuple[int, int], list[tuple[weakref.ref[Tensor], Call | None]]] = {}

    def remember(self, owner: nn.Module, tensor: Tensor, call: Call) -> None:
        """Note that `owner` got `tensor` in a forward."""
        if tensor.grad_fn is not None:
            _calls_of_node(tensor)[id(owner)] = call
        place = _place(tensor)
        if place is None:
            return
        key = (id(owner), place)

        def forget(_: weakref.ref[Tensor]) -> None:
            self._replace(key, self._living(key))

        with self._lock:
            entries = self._living(key)
            # Beyond that many it is only known that there were more, and `find` raises.
            entry = (weakref.ref(tensor, forget), call if len(entries) < MOST_CALLS else None)
            self._replace(key, [*entries[:MOST_CALLS], entry])

    def _living(self, key: tuple[int, int]) -> list[tuple[weakref.ref[Tensor], Call | None]]:
        return [entry for entry in self._entries.get(key, ()) if entry[0]() is not None]

    def _replace(
        self, key: tuple[int, int], entries: list[tuple[weakref.ref[Tensor], Call | None]]
    ) -> None:
        with self._lock:
            if entries:
                self._entries[key] = entries
            else:
                self._entries.pop(key, None)

    def find(self, owner: nn.Module, tensor: Tensor) -> Call | None:
        """Find the call of the forward in which `owner` got `tensor`; None if it got it in none.

        Raises:
            RuntimeError: it got it in several, which edit different tokens.
        """
        place = _place(tensor)
        entries = [] if place is None else self._living((id(owner), place))
        calls = [call for reference, call in entries if reference() is tensor]
        calls = calls or [call for _, call in entries]
        if not calls and tensor.grad_fn is not None:
            known = _calls_of_node(tensor).get(id(owner))
            calls = [] if known is None else [known]
        if not calls:
            return None
        last = calls[-1]
        if last is None or not all(c is last or (c and c.edits_like(last)) for c in calls):
            raise RuntimeError(AMBIGUOUS)
        return last


def _calls_of_node(tensor: Tensor) -> dict[int, Call]:
    """Return the calls that the autograd node of a tensor keeps, by the ids of what got the tensor."""
    node: Any = tensor.grad_fn
    calls: dict[int, Call] = node.metadata.setdefault(IN_METADATA, {})
    return calls


def _place(tensor: Tensor) -> int | None:
    """Return where the values of a tensor lie; None where it has none of its own."""
    try:
        return tensor.data_ptr() or None
    except RuntimeError:  # of torch.func's transforms
        return None
