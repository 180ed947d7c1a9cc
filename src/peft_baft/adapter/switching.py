"""Freeze parameters while adapters are switched off, and restore their `requires_grad` flags afterwards.

PEFT freezes them as well, but switching on again makes every active adapter trainable, even one that was frozen before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Switch:
    """The `requires_grad` flags that the parameters of one module have while its adapters are on."""

    def __init__(self) -> None:
        self._is_off = False
        self._flags: dict[nn.Parameter, bool] = {}

    def turn(self, module: nn.Module, *, on: bool) -> None:
        """Freeze the parameters of `module` (off) or restore their flags (on); do nothing if that has been done."""
        if on != self._is_off:
            return
        if on:
            for parameter, flag in self._flags.items():
                parameter.requires_grad_(flag)
            self._flags = {}
        else:
            self._flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
            module.requires_grad_(False)
        self._is_off = not on

    @contextmanager
    def changing_flags(self, module: nn.Module) -> Iterator[None]:
        """Apply changes of flags in the context to the adapters' switched-on state, even if they are off."""
        was_off = self._is_off
        self.turn(module, on=True)
        try:
            yield
        finally:
            self.turn(module, on=not was_off)
