"""The interface of an editing method in a benchmark: settings that can be set by name, and that create editors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.cases import Unrelated
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import Editor
from peft_baft.processes import Processes


@dataclass(frozen=True)
class EditorSetup:
    """What an editor is created with, in addition to its model and the method's settings.

    Methods ignore what they do not need.

    Attributes:
        unrelated: texts whose predictions the edits should not change.
        seed: for the initial weights, where these are random.
        processes: the processes that share the facts of each batch.
        prepared: what editors of the same base model share; None if there is only one.
        template: the prompt format in which facts are taught.
    """

    unrelated: Sequence[Unrelated] = ()
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    prepared: EditCache | None = None
    template: Template = RAW


class MethodSettings(ABC):
    """Base class for the settings of an editing method.

    A method consists of a frozen dataclass below this class and of the editor that `start` returns. The
    fields, and those of nested dataclasses, can be set by name, as in `NAME:lr=0.001`.

    Attributes:
        side_by_side: whether its editors are `SideBySideEditor`s.
        seeded: whether edits depend on the seed of a run.
    """

    side_by_side: bool = False
    seeded: bool = True

    @abstractmethod
    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> Editor:
        """Create an editor of `base`, which must be unedited; `editor.remove()` restores `base`."""

    def describe(self) -> dict[str, Any]:
        """Return the settings for a result line; they are equal only for equal settings."""
        settings: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return settings

    def setting_names(self) -> set[str]:
        """List the settings that can be set by name."""
        names = set(self._own_settings())
        for part in self._nested_settings().values():
            names |= {f.name for f in fields(part)}
        return names

    def with_setting(self, name: str, value: Any) -> MethodSettings:
        """Return a copy with one setting changed, in each nested dataclass that has a field of this name.

        Raises:
            ValueError: there is no such setting.
            TypeError, ValueError: the value is invalid.
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
        """List the fields that are not nested dataclasses."""
        nested = self._nested_settings()
        return [f.name for f in fields(self) if f.name not in nested]  # type: ignore[arg-type]

    def _nested_settings(self) -> dict[str, Any]:
        """Return the nested dataclasses by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {
            name: value
            for name, value in values.items()
            if is_dataclass(value) and not isinstance(value, type)
        }
