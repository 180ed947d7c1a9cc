"""A record that was handed out stays as it was: every public dataclass is frozen, but for those that say why not."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import peft_baft

# What changes after it was made, and why.
CHANGING = {
    "BaftConfig": "PEFT sets fields of a config, as inference_mode",
    "Lane": "an edit under way",
    "Conversation": "a conversation under way",
    "EditCache": "filled by the edits that share it",
    "Generation": "one call of generate under way",
    "Progress": "a run under way",
}


def public_dataclasses() -> Iterator[type]:
    """Yield every dataclass that the package defines under a public name."""
    for module_info in pkgutil.walk_packages(peft_baft.__path__, "peft_baft."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if (
                own
                and isinstance(value, type)
                and dataclasses.is_dataclass(value)
                and not name.startswith("_")
            ):
                yield value


RECORDS = sorted(public_dataclasses(), key=lambda record: (record.__module__, record.__name__))


@pytest.mark.parametrize(
    "record", [r for r in RECORDS if r.__name__ not in CHANGING], ids=lambda record: record.__name__
)
def test_a_field_cannot_be_assigned_or_deleted(record: Any) -> None:
    instance: Any = object.__new__(record)
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field.name, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(instance, field.name)


def test_the_records_that_users_get_are_among_them() -> None:
    exported = {
        name
        for name, value in ((name, getattr(peft_baft, name)) for name in peft_baft.__all__)
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    names = {record.__name__ for record in RECORDS}
    assert (
        len(names) > 20
        and {"Edit", "Case", "DescentConfig", "Objective", "Preset"} <= exported <= names
    )


def test_a_record_that_is_no_longer_frozen_would_be_noticed() -> None:
    @dataclasses.dataclass
    class Open:
        field: int

    with pytest.raises(pytest.fail.Exception):
        test_a_field_cannot_be_assigned_or_deleted(Open)
