"""Put a model back as it was when attaching or loading an adapter fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft_baft.adapter.layer import BaftLayer

CONTAINERS = (
    dict,
    list,
    set,
)


def structure_of(model: nn.Module) -> Callable[[], None]:
    """Remember modules, hooks, attributes and `requires_grad` flags of a model; calling the result puts them back.

    Values of tensors are not remembered: what attaches an adapter writes to none that was there.
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, BaftLayer)]
    shared = [part for layer in layers for part in (layer.context, *layer.configs.values())]
    attributes = [vars(one) for one in (*modules, *{id(one): one for one in shared}.values())]
    before = [
        (
            current,
            current.copy(),
            [(v, v.copy()) for v in current.values() if isinstance(v, CONTAINERS)],
        )
        for current in attributes
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for current, values, containers in before:
            _fill(current, values)
            for container, content in containers:
                # In place: the handle of a hook remembers the dictionary that the hook is in.
                _fill(container, content)
        for parameter, needed in flags:
            parameter.requires_grad_(needed)

    return restore


def _fill(container: Any, content: Any) -> None:
    """Let a dictionary, list or set hold what another one holds."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


class _Undo(threading.local):
    """What this thread undoes if the running `PeftModel.from_pretrained` fails; None where none runs."""

    attached: list[Callable[[], None]] | None = None


UNDO = _Undo()


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Put the structure of a model back if the code inside raises."""
    restore = structure_of(model)
    try:
        yield
    except BaseException:
        restore()
        raise
