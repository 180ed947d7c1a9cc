"""Mixed batches: PEFT's `adapter_names`, which names an adapter for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from peft.utils.other import AuxiliaryTrainingWrapper

if TYPE_CHECKING:
    from peft_baft.adapter.context import EditContext

BASE = "__base__"  # PEFT's name for no adapter


def require_known_names(names: Any, known: Iterable[str]) -> list[str]:
    """Return `adapter_names` as a list.

    Raises:
        TypeError: it is not a list of names. ValueError: there is no adapter of one of these names.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"adapter_names must be a list with the name of each row's adapter, not {names!r:.60}."
        )
    unknown = sorted({*names} - {BASE, *known})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    return list(names)


def repeated_names(names: list[str], rows: int) -> list[str]:
    """Return the adapter of each row of a step of `generate`, which repeats each row for its beams or answers.

    The number of repetitions is inferred from the step, since it may come from an argument or from either generation config.
    If `rows` is not a multiple of the names, they are returned unchanged, and the blocks raise.
    """
    repeats = rows // len(names) if names and rows % len(names) == 0 else 1
    return [name for name in names for _ in range(repeats)]


def choose_copies_by_row(
    wrappers: Iterable[AuxiliaryTrainingWrapper], context: EditContext
) -> None:
    """Compute each row of a mixed batch with its adapter's copy of a saved module (`modules_to_save`), too."""
    for wrapper in wrappers:
        hooks = wrapper._forward_pre_hooks.values()
        if not any(getattr(hook, "func", None) is _choose_copies for hook in hooks):
            wrapper.register_forward_pre_hook(partial(_choose_copies, context), with_kwargs=True)


def _choose_copies(
    context: EditContext,
    wrapper: AuxiliaryTrainingWrapper,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a saved module: pass PEFT's wrapper the adapter of each row; rows of adapters without a copy use the original."""
    if context.row_adapters is None:
        return None
    present = wrapper._get_available_adapters()
    names = [name if name in present else BASE for name in context.row_adapters]
    return args, {**kwargs, "adapter_names": names}
