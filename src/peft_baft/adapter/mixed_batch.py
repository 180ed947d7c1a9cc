"""Mixed batches: PEFT's `adapter_names`, which names the adapter of each row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_baft.adapter.context import EditContext
from peft_baft.adapter.model_call import StackSignature, read_stack_call

BASE = "__base__"  # PEFT's name for no adapter


def require_known_names(names: Any, known: Iterable[str]) -> list[str]:
    """Return the adapters of the rows of a batch, as a list.

    Raises:
        TypeError: they are not a list of names. ValueError: there is no adapter of one of these names.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"adapter_names must be a list with the name of each row's adapter, not {names!r:.60}."
        )
    unknown = sorted({*names} - {BASE, *known})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    return list(names)


@contextmanager
def adapters_by_row(model: nn.Module, context: EditContext, names: list[str]) -> Iterator[None]:
    """Let row i of this thread's batches inside be computed by adapter `names[i]`.

    `generate` repeats each row as often as it has beams or returned sequences. This is read from each of its forwards, since
    their number may come from an argument, a generation config or the model's own.

    Args:
        model: the base model.
    """
    thread, signature = threading.get_ident(), StackSignature.of(model)

    def repeat_names(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Other threads' forwards pass this hook as well, and so do forwards on another text inside this one.
        if threading.get_ident() != thread or context.row_adapters is None:
            return
        call = read_stack_call(signature, args, kwargs)
        rows = len(names) if call is None or context.generation is None else len(call.tokens)
        repeats = rows // len(names) if names and rows % len(names) == 0 else 1
        context.row_adapters = [name for name in names for _ in range(repeats)]

    handle = model.register_forward_pre_hook(repeat_names, with_kwargs=True, prepend=True)
    try:
        with context.rows(names):
            yield
    finally:
        handle.remove()


def choose_copies_by_row(
    wrappers: Iterable[AuxiliaryTrainingWrapper], context: EditContext
) -> None:
    """Let each row of a mixed batch be computed by its own adapter's copy of a saved module (`modules_to_save`), too."""
    for wrapper in wrappers:
        hooks = wrapper._forward_pre_hooks.values()
        if not any(getattr(hook, "func", None) is _choose_copies for hook in hooks):
            wrapper.register_forward_pre_hook(partial(_choose_copies, context), with_kwargs=True)


def _choose_copies(
    context: EditContext, wrapper: AuxiliaryTrainingWrapper, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Before a saved module: tell PEFT's wrapper whose copy computes each row; the model's own where an adapter has none."""
    if context.row_adapters is None:
        return None
    present = wrapper._get_available_adapters()
    names = [name if name in present else BASE for name in context.row_adapters]
    return args, {**kwargs, "adapter_names": names}
