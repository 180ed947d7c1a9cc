"""What a benchmark needs of an editing method: settings that a user may set by name, and that start editors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from peft_baft.data.cases import Unrelated
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import Editor
from peft_baft.processes import Processes


@dataclass(frozen=True)
class EditorSetup:
    """What an editor is started with, besides its model and the method's settings; a method takes what it needs.

    Attributes:
        unrelated: texts to leave alone, for the edits of this editor.
        seed: of the first weights, where these are random.
        processes: those that share the facts of each batch.
        prepared: what editors of one base model share; None where there is only one.
        template: the form in which facts are taught.
    """

    unrelated: Sequence[Unrelated] = ()
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    prepared: EditCache | None = None
    template: Template = RAW


class MethodSettings(ABC):
    """Settings of an editing method. A method is a frozen dataclass below this, and what `start` returns.

    Its fields, and those of dataclasses in its fields, are what a user may set by name, as in `NAME:lr=0.001`.

    Attributes:
        side_by_side: whether its editors are `SideBySideEditor`s.
        seeded: whether edits depend on the seed of a run.
    """

    side_by_side: bool = False
    seeded: bool = True

    @abstractmethod
    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> Editor:
        """Make an editor of `base`, which has no edit yet; `editor.remove()` gives `base` back."""

    def described(self) -> dict[str, Any]:
        """Give the settings as they stand in a result line: two runs of one method differ in them, or are equal."""
        return asdict(self)  # type: ignore[call-overload]

    def setting_names(self) -> set[str]:
        """List what may be set by name."""
        names = set(self._own_settings())
        for part in self._nested_settings().values():
            names |= {f.name for f in fields(part)}
        return names

    def with_setting(self, name: str, value: Any) -> MethodSettings:
        """Set one setting, in each part that has one of this name.

        Raises:
            ValueError: none has. TypeError, ValueError: as the part, for such a value.
        """
        if name in self._own_settings():
            return replace(self, **{name: value})  # type: ignore[type-var]
        changes = {}
        for place, part in self._nested_settings().items():
            if name in {f.name for f in fields(part)}:
                changes[place] = replace(part, **{name: value})
        if not changes:
            known = ", ".join(sorted(self.setting_names()))
            raise ValueError(f"unknown setting {name!r}; known are {known}.")
        return replace(self, **changes)  # type: ignore[type-var]

    def _own_settings(self) -> list[str]:
        """List the fields that hold one setting each."""
        nested = self._nested_settings()
        return [f.name for f in fields(self) if f.name not in nested]  # type: ignore[arg-type]

    def _nested_settings(self) -> dict[str, Any]:
        """Get the dataclasses in fields, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {
            name: value
            for name, value in values.items()
            if is_dataclass(value) and not isinstance(value, type)
        }
