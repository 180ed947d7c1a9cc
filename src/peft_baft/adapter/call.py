"""What a block needs to know about its forward, and how to find that again when autograd reruns the block.

Activation checkpointing runs a block a second time, during the backward, with the inputs of the first run. By then the model may
have been called on other texts, and on a GPU the second run happens in one of autograd's threads. The call is therefore looked
up by the block's input, not by the thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.texts import Texts, equal

MOST_CALLS = (
    1000  # remembered per input, so that a loop over one tensor does not collect ever more of them
)
METADATA_KEY = (
    "peft_baft.call"  # in an autograd node: the calls in which its result was a block's input
)
NOT_FOUND = (
    "A block with a BaFT adapter was run again during a backward, as in activation checkpointing, on an input that none of the "
    "model's forwards gave it, so that the tokens to edit are unknown. This happens if saved activations are copied, "
    "as in reentrant checkpointing with offloading. Checkpoint the blocks with use_reentrant=False, and do not checkpoint a part "
    "of the model around the blocks that receives no labels or prompt_lengths itself."
)
AMBIGUOUS = (
    "A block with a BaFT adapter was run again during a backward, as in activation checkpointing, on an input that it had in "
    "several forwards with different prompts, so that the tokens to edit are unknown. Checkpoint with use_reentrant=False, or "
    "pass a copy of the inputs to each forward."
)


@dataclass(frozen=True, eq=False)
class Call:
    """What the blocks need to know about one forward. Nothing here has a gradient, so a stored call keeps no graph alive.

    Attributes:
        relative_positions: (rows, tokens) long; None edits everything, for models that do not take sequences of tokens.
        row_adapters: the adapter of each row of a mixed batch (PEFT's `adapter_names`); None if the active adapters edit all
            rows.
        active: the adapters that were active in a block when it first ran, by the block's name.
        texts: all tokens of each sequence; None if no kind of adapter on the model reads them.
        may_be_repeated: whether gradients were enabled, so that blocks may run again in a backward.
    """

    relative_positions: Tensor | None
    row_adapters: list[str] | None = None
    active: dict[str, Sequence[str]] = field(default_factory=dict)
    texts: Texts | None = None
    may_be_repeated: bool = False

    def edits_like(self, other: Call) -> bool:
        """Return whether two calls edit the same tokens with the same adapters."""
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
        w: (rows, tokens, k) with gradient. mask: (rows, tokens) bool, True for edited tokens.
    """

    w: Tensor
    mask: Tensor


def in_backward() -> bool:
    """Return whether this thread is computing a backward; a block that runs in one has run before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden vectors that a block was called with: the first argument that is a tensor."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


class CallsByInput:
    """The calls of forwards whose blocks may run again, by the input of each block.

    A call is found by the tensor itself, or by the address of its values, since reentrant checkpointing passes a detached
    alias. An entry lives as long as the tensor, and two living tensors share an address only if one is an alias of the other.
    If the values were moved away and back (`torch.autograd.graph.save_on_cpu`), the call is found by the autograd node that
    computed them.
    """

    def __init__(self) -> None:
        # Reentrant, since the garbage collector may run `forget` inside `remember`.
        self._lock = threading.RLock()
        self._entries: dict[tuple[int, int], list[tuple[weakref.ref[Tensor], Call | None]]] = {}

    def remember(self, owner: nn.Module, tensor: Tensor, call: Call) -> None:
        """Record that `owner` was called with `tensor` in a forward."""
        if tensor.grad_fn is not None:
            _calls_of_node(tensor)[id(owner)] = call
        address = _address(tensor)
        if address is None:
            return
        key = (id(owner), address)

        def forget(_: weakref.ref[Tensor]) -> None:
            self._replace(key, self._living(key))

        with self._lock:
            entries = self._living(key)
            # Beyond that many, only the fact that there were more is recorded, and `find` raises.
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
        """Return the call in which `owner` was called with `tensor`; None if there is none.

        Raises:
            RuntimeError: there are several, which edit different tokens.
        """
        address = _address(tensor)
        entries = [] if address is None else self._living((id(owner), address))
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
    """Return the calls recorded in the autograd node of a tensor, by the id of the module called with the tensor."""
    node: Any = tensor.grad_fn
    calls: dict[int, Call] = node.metadata.setdefault(METADATA_KEY, {})
    return calls


def _address(tensor: Tensor) -> int | None:
    """Return the address of a tensor's values; None if it has no storage."""
    try:
        return tensor.data_ptr() or None
    except RuntimeError:  # in torch.func's transforms
        return None
