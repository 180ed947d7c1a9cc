"""What methods share that change a model in place: weights frozen while they search, the loop of a search, edits in turn."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.state import frozen
from peft_baft.data.batching import Tokens, encode_fitting
from peft_baft.data.cases import Edit, Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.editor import EditResult, checked_edits, combine_results, encode_edits
from peft_baft.editing.train import STOP_TERM, Terms


def require_raw(method: str, template: Template, facts: Iterable[Edit] = ()) -> None:
    """Raise a ValueError unless facts are taught, and prompts given, as raw text: the method compares prompts as a whole."""
    if template.name != "raw" or not all(isinstance(fact.prompt, str) for fact in facts):
        raise ValueError(
            f"{method} compares prompts as raw text, and a chat template would be part of them: give prompts as texts, and take "
            "--template raw."
        )


class InTurnEditor(ABC):
    """Makes the edits of a batch one after another; an `Editor` of which a method gives the learning of one edit.

    template: the form in which facts are taught.
    """

    def __init__(self, model: Any, tokenizer: Any, template: Template = RAW) -> None:
        self.model, self.tokenizer, self._template = model, tokenizer, template

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Make the edits, or none of them; as `Editor.edit`."""
        facts = checked_edits(edits)
        encode_edits(self.model, self.tokenizer, facts, (self._template,))  # their check
        before = self.state_dict()
        try:
            with frozen(self.model):
                return combine_results([self._learn(fact) for fact in facts])
        except BaseException:
            self.load_state_dict(before)
            raise

    def _encode(self, prompt: Prompt, answer: str, end: bool = False) -> Tokens:
        """Tokenise a prompt with its answer, in the form in which facts are taught; as `encode_fitting`."""
        return encode_fitting(
            self.model, self.tokenizer, prompt, answer, template=self._template, end=end
        )

    @abstractmethod
    def _learn(self, fact: Edit) -> EditResult:
        """Learn one fact. What `state_dict` gave before must not be written into."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """As `Editor.state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As `Editor.load_state_dict`."""

    @abstractmethod
    def remove(self) -> None:
        """As `Editor.remove`."""


def below(stop_loss: float) -> Callable[[Sequence[float]], bool]:
    """Make a rule that ends a search once the whole loss is below this."""
    return lambda totals: totals[-1] < stop_loss


def settled(stop_loss: float, change: float = 1e-4) -> Callable[[Sequence[float]], bool]:
    """Make the rule of WISE and MEMOIR: the loss is at most this, and its last step changed it by at most `change`."""
    return lambda totals: (
        len(totals) > 1 and totals[-1] <= stop_loss and abs(totals[-1] - totals[-2]) <= change
    )


def minimise(
    optimizer: torch.optim.Optimizer,
    terms: Callable[[], Terms],
    max_steps: int,
    is_over: Callable[[Sequence[float]], bool],
    *,
    learned_below: float,
    clip_norm: float | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> EditResult:
    """Minimise the sum of some terms with an optimiser of the method's own; `editing.train.descend` has AdamW alone.

    Args:
        terms: gives the terms at the present parameters; `teacher_forcing` is among them.
        is_over: given the sums so far, tells whether it may end before the last step.
        learned_below: the answer is learned if `teacher_forcing` is below this.
        clip_norm: bound on the norm of all gradients together; None for no bound.
        after_step: called after each step, to keep parameters within bounds.

    Raises:
        FloatingPointError: a term became NaN or infinite.
    """
    begin = time.perf_counter()
    totals: list[float] = []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(max_steps + 1):
        now = terms()
        total = torch.stack(list(now.values())).sum()
        totals.append(total.item())
        if not total.isfinite():
            raise FloatingPointError(f"the loss became {totals[-1]} at step {step}.")
        if is_over(totals) or step == max_steps:
            break
        optimizer.zero_grad()
        total.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        with torch.no_grad():
            after_step()
    losses = {name: term.item() for name, term in now.items()}
    learned = losses[STOP_TERM] < learned_below
    return EditResult(step, losses, time.perf_counter() - begin, learned)
