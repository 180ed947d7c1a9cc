"""Restore a model, or the editors of its adapters, if something fails half-way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn


@contextmanager
def restored_on_error(snapshot: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Undo what the code in the context did if it raises, even if it is interrupted.

    Args:
        snapshot: records the present state, and returns a function that restores it.
    """
    restore = snapshot()
    try:
        yield
    except BaseException:
        restore()
        raise


def undone_on_failure(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the structure of a model if the code in the context raises."""
    return restored_on_error(lambda: structure_of(model))


def structure_of(model: nn.Module) -> Callable[[], None]:
    """Record modules, hooks, attributes and `requires_grad` flags of a model; calling the result restores them.

    Values of tensors are not recorded: attaching an adapter changes none that exist.
    """
    from peft_baft.adapter.layer import BaftLayer  # which itself needs `Cursors`

    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, BaftLayer)]
    shared = [part for layer in layers for part in (layer.context, *layer.configs.values())]
    attributes = [vars(one) for one in (*modules, *{id(one): one for one in shared}.values())]
    before = []
    for current in attributes:
        containers = [(v, v.copy()) for v in current.values() if isinstance(v, (dict, list, set))]
        before.append((current, current.copy(), containers))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for current, values, containers in before:
            _refill(current, values)
            for container, content in containers:
                # In place: the handle of a hook refers to the dictionary that holds the hook.
                _refill(container, content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return restore


def _refill(container: Any, content: Any) -> None:
    """Replace the contents of a dictionary, list or set."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


class _Undo(threading.local):
    """What this thread undoes if the running `PeftModel.from_pretrained` fails; None if none is running."""

    attached: list[Callable[[], None]] | None = None


UNDO = _Undo()


class HasCursor(Protocol):
    """An editor with a position, such as in a list of texts that it takes in turn."""

    cursor: Any


class Cursors:
    """The cursors of the editors of one model's adapters.

    The next edit depends on them as on the adapters, so a snapshot of the adapters includes them. Editors are referenced weakly;
    copies of the model have none.
    """

    def __init__(self) -> None:
        # By editor, where its cursor began.
        self._beginnings: WeakKeyDictionary[HasCursor, Any] = WeakKeyDictionary()

    def add(self, owner: HasCursor) -> None:
        """Include the cursor of an editor for as long as the editor exists."""
        self._beginnings[owner] = owner.cursor

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores all cursors; those of editors added since then begin again."""
        recorded = WeakKeyDictionary({owner: owner.cursor for owner in self._beginnings})

        def restore() -> None:
            for owner, beginning in list(self._beginnings.items()):
                owner.cursor = recorded.get(owner, beginning)

        return restore

    def __reduce__(self) -> tuple[type[Cursors], tuple[()]]:
        return Cursors, ()
