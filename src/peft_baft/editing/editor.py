"""What an editing method is: the protocol that every editor follows, and what an edit gives back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from peft_baft.data.batching import Tokens, encode_fitting
from peft_baft.data.cases import Edit, Message, Prompt, as_messages, prompt_words
from peft_baft.data.templates import RAW, Template, is_chat
from peft_baft.editing.scope import FEW, NARROW, Scope

LEFT_OUT = "%r is taught in one context less than its scope says: %s"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditResult:
    """What an edit cost and how far it came.

    Attributes:
        steps: optimiser steps that were taken.
        losses: each term of the loss at its last evaluation, by name.
        seconds: wall time.
        learned: whether the mean cross entropy of the answers fell below the stop loss.
    """

    steps: int
    losses: dict[str, float]
    seconds: float
    learned: bool = False


class Editor(Protocol):
    """Changes what one model knows.

    A benchmark, a journal or a user's loop needs no more than this of a method. An editor belongs to one base model, which it
    changes in place or through an adapter, and gives back bit for bit when it is removed.

    Attributes:
        model: what answers with the edits so far: a PeftModel, or the base model itself.
    """

    model: Any

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Teach the edits at once, as one batch, on top of those made before.

        Raises:
            TypeError, ValueError: an edit is unusable.
            FloatingPointError: a loss or a weight became NaN or infinite. In each case nothing has changed.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Give everything that the edits so far have changed, by name.

        These are weights, statistics and cursors (names that begin with `editor.`); a fresh editor with the same settings goes
        on from them exactly as this one would. The tensors are the editor's own: copy them to keep them.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        ...

    def remove(self) -> None:
        """Take the edits off: the base model is again as it was, bit for bit. The editor cannot be used afterwards."""
        ...


@runtime_checkable
class SideBySideEditor(Editor, Protocol):
    """An editor that can make independent single edits in the same forwards, each in an adapter of its own."""

    def edit_fresh(
        self, edits: Mapping[str, Edit], seeds: Mapping[str, int]
    ) -> dict[str, EditResult]:
        """Make an adapter for each name, initialised with its seed, and teach it the edit of that name.

        Raises:
            FloatingPointError: one of them broke off; none of the results can be used.
        """
        ...

    def answering(self, adapter_names: list[str]) -> AbstractContextManager[None]:
        """Let row i of the batches inside be answered by adapter `adapter_names[i]`."""
        ...

    def use(self, adapter_name: str) -> None:
        """Let the model answer with this adapter from now on."""
        ...


@runtime_checkable
class IndependentEditor(Editor, Protocol):
    """An editor whose edits do not depend on each other, so that many at once come out as one after another."""

    def edit_independently(self, edits: Sequence[Edit]) -> list[EditResult]:
        """Make the edits as if in turn, in shared forwards; one of the same question replaces an earlier one.

        Raises:
            As `edit`. In each case nothing has changed.
        """
        ...


@runtime_checkable
class RoutedEditor(Editor, Protocol):
    """An editor of which one edit answers a prompt, or none."""

    def routed(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Tell which edit answers each prompt: its number, from 1 in the order in which they were made; None for none."""
        ...


def in_turn(results: Sequence[EditResult]) -> EditResult:
    """Put the results of edits that were made one after another into one: the losses are those of the last."""
    return EditResult(
        sum(result.steps for result in results),
        results[-1].losses,
        sum(result.seconds for result in results),
        all(result.learned for result in results),
    )


CURSOR = "editor."  # how the names of an editor's state begin that are no weights of the model


def checked_edits(edits: Iterable[Edit]) -> list[Edit]:
    """List the edits.

    Raises:
        TypeError: they are no iterable of `Edit`. ValueError: there is none.
    """
    facts = list(edits) if isinstance(edits, Iterable) else None
    if facts is None or not all(isinstance(fact, Edit) for fact in facts):
        raise TypeError(f"edits must be a list of Edit(prompt, target), not {edits!r:.80}.")
    if not facts:
        raise ValueError("There is nothing to edit: the list of edits is empty.")
    return facts


def encode_edits(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    templates: Sequence[Template] = (RAW,),
    end: bool = False,
    scope: Scope = NARROW,
) -> list[list[Tokens]]:
    """Tokenise one batch of edits, after a check of them against each other.

    Args:
        templates: the forms in which each edit is taught. end: whether the end of the answer is learned with it.
        scope: in which surroundings each form is taught besides. One that the template refuses (some take no system prompt),
            or that is too long for the model, is left out, with a warning.

    Returns:
        For each edit its rows, one for each form and context that differs.

    Raises:
        ValueError: an edit stands twice, contradicts another one, or is longer than the model can read.
    """
    targets: dict[tuple[Message, ...], str] = {}
    for edit in edits:
        messages, target = as_messages(edit.prompt), edit.target.strip()
        if messages in targets:
            first, prompt = targets[messages], prompt_words(edit.prompt)
            what = (
                "stands twice" if target == first else f"is edited to {first!r} and to {target!r}"
            )
            raise ValueError(
                f"{prompt!r} {what} in one batch; leave one, or edit them one after another."
            )
        targets[messages] = target
    rows = []
    for number, edit in enumerate(edits):
        turn, forms = number if len(edits) > FEW else None, []
        for template in templates:
            ends = end if edit.after is None else edit.after == "stop"
            encode = partial(encode_fitting, model, tokenizer, template=template, end=ends)
            bare, *others = scope.taught(edit, is_chat(edit.prompt, template), turn)
            forms.append(encode(bare, edit.target))
            for surrounded in others:
                try:
                    forms.append(encode(surrounded, edit.target))
                except ValueError as error:
                    logger.warning(LEFT_OUT, prompt_words(edit.prompt), error)
        rows.append(list(dict.fromkeys(forms)))  # messages are put to a model in one way only
    return rows
