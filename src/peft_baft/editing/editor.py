"""The `Editor` protocol that every editing method implements, and the result of an edit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from peft_baft.data.batching import Tokens, encode_fitting
from peft_baft.data.cases import Edit, Message, Prompt, as_messages, prompt_words
from peft_baft.data.templates import RAW, Template, is_chat
from peft_baft.editing.scope import FEW, NARROW, Scope

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = "%r is trained in one context fewer than its scope asks for: %s"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditResult:
    """The cost and outcome of an edit.

    Attributes:
        steps: number of optimiser steps.
        losses: last value of each term of the loss, by name.
        seconds: wall time.
        learned: whether the mean cross entropy of the answers fell below the stop loss.
    """

    steps: int
    losses: dict[str, float]
    seconds: float
    learned: bool = False


class Editor(Protocol):
    """An editing method, attached to one base model.

    Benchmarks, journals and training loops use only this interface. An editor changes its base model in place or through an
    adapter. `remove` restores the base model bit for bit.

    Attributes:
        model: the edited model: a PeftModel, or the base model itself.
    """

    model: Any

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Make the edits as one batch, in addition to all earlier edits.

        On error, the model is left unchanged.

        Raises:
            TypeError, ValueError: an edit is invalid.
            FloatingPointError: a loss or a weight became NaN or infinite.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the edits have changed so far, by name.

        The state consists of weights, statistics and cursors (names that begin with `editor.`). A new editor with the same
        settings that loads this state continues exactly as this one would. The tensors are not copies: clone them before the
        next edit.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that `state_dict` returned."""
        ...

    def remove(self) -> None:
        """Undo all edits: restore the base model bit for bit. The editor cannot be used afterwards."""
        ...


@runtime_checkable
class SideBySideEditor(Editor, Protocol):
    """An editor that can train several independent edits in the same forward passes, each in its own adapter."""

    def edit_fresh(
        self, edits: Mapping[str, Edit], seeds: Mapping[str, int]
    ) -> dict[str, EditResult]:
        """Add an adapter per name, initialised with its seed, and train it on the edit of that name.

        Raises:
            FloatingPointError: a loss or a weight became NaN or infinite; none of the adapters can be used.
        """
        ...

    def answering(self, adapter_names: list[str]) -> AbstractContextManager[None]:
        """Apply adapter `adapter_names[i]` to row i of every batch inside the context."""
        ...

    def use(self, adapter_name: str) -> None:
        """Activate this adapter."""
        ...


@runtime_checkable
class IndependentEditor(Editor, Protocol):
    """An editor whose edits do not depend on each other, so that a batch gives the same result as single edits."""

    def edit_independently(self, edits: Sequence[Edit]) -> list[EditResult]:
        """Make several single edits in shared forward passes. An edit replaces an earlier one with the same question.

        On error, the model is left unchanged.

        Raises:
            The same errors as `edit`.
        """
        ...


@runtime_checkable
class RoutedEditor(Editor, Protocol):
    """An editor that applies at most one edit to each prompt."""

    def routed(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """Return the number of the edit that applies to each prompt, counted from 1 in the order of edits; None for none."""
        ...


def combine_results(results: Sequence[EditResult]) -> EditResult:
    """Combine the results of successive edits into one: steps and seconds are summed, the losses are those of the last."""
    return EditResult(
        sum(result.steps for result in results),
        results[-1].losses,
        sum(result.seconds for result in results),
        all(result.learned for result in results),
    )


CURSOR = "editor."  # prefix of the names in an editor's state that are not weights of the model


def checked_edits(edits: Iterable[Edit]) -> list[Edit]:
    """Return the edits as a list.

    Raises:
        TypeError: `edits` is not an iterable of `Edit`. ValueError: it is empty.
    """
    facts = list(edits) if isinstance(edits, Iterable) else None
    if facts is None or not all(isinstance(fact, Edit) for fact in facts):
        raise TypeError(f"edits must be a list of Edit(prompt, target), not {edits!r:.80}.")
    if not facts:
        raise ValueError("There is nothing to edit: the list of edits is empty.")
    return facts


def encode_edits(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    templates: Sequence[Template] = (RAW,),
    end: bool = False,
    scope: Scope = NARROW,
) -> list[list[Tokens]]:
    """Tokenise one batch of edits, after checking that no two have the same prompt.

    Args:
        templates: the prompt formats in which each edit is trained.
        end: whether the end of the answer is trained as well. `Edit.after` takes precedence.
        scope: the contexts and wordings in which each edit is trained in addition to its bare prompt. Those that the template
            rejects (some have no system prompt), or that are too long for the model, are left out with a warning.

    Returns:
        The distinct rows of each edit: one per template and context.

    Raises:
        ValueError: two edits have the same prompt, or an edit is longer than the model's context window.
    """
    _require_distinct_prompts(edits)
    rows = []
    for number, edit in enumerate(edits):
        turn = number if len(edits) > FEW else None
        learn_end = end if edit.after is None else edit.after == "stop"
        edit_rows: list[Tokens] = []
        for template in templates:
            encode = partial(encode_fitting, model, tokenizer, template=template, end=learn_end)
            bare, *others = scope.training_prompts(edit, is_chat(edit.prompt, template), turn)
            edit_rows.append(encode(bare, edit.target))
            for prompt in others:
                try:
                    edit_rows.append(encode(prompt, edit.target))
                except ValueError as error:
                    logger.warning(LEFT_OUT, prompt_words(edit.prompt), error)
        # A prompt of messages is encoded in the same way under every template.
        rows.append(list(dict.fromkeys(edit_rows)))
    return rows


def _require_distinct_prompts(edits: Sequence[Edit]) -> None:
    """Raise a ValueError if two edits have the same prompt."""
    targets: dict[tuple[Message, ...], str] = {}
    for edit in edits:
        messages, target = as_messages(edit.prompt), edit.target.strip()
        if messages in targets:
            first, prompt = targets[messages], prompt_words(edit.prompt)
            same = target == first
            problem = "occurs twice" if same else f"is edited to {first!r} and to {target!r}"
            raise ValueError(
                f"{prompt!r} {problem} in one batch; remove one of them, or make the edits in separate batches."
            )
        targets[messages] = target
