"""Checks of settings that several methods share. `name` is how the error message calls the setting, such as `rome: contexts`."""

from __future__ import annotations

INFINITY = float("inf")


def require_layer(layer: object, method: str) -> None:
    """Raise a TypeError unless a setting `layer` is an integer or None."""
    if layer is not None and type(layer) is not int:
        raise TypeError(f"{method}: layer must be an integer, not {layer!r}.")


def require_integer(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}.")


def require_positive(name: str, value: float) -> None:
    """Raise a ValueError unless `value` is above 0 and finite."""
    if not 0 < value < INFINITY:
        raise ValueError(f"{name} must be above 0 and finite, not {value!r}.")


def require_non_negative(name: str, value: float) -> None:
    """Raise a ValueError unless `value` is at least 0 and finite."""
    if not 0 <= value < INFINITY:
        raise ValueError(f"{name} must be 0 or above and finite, not {value!r}.")


def require_fraction(name: str, value: float) -> None:
    """Raise a ValueError unless `value` is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, not {value!r}.")
