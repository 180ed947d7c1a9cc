"""Shared by methods that edit one fact after another: the editor's base class and the optimisation loop."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter.state import frozen
from peft_baft.data.batching import Tokens, encode_fitting
from peft_baft.data.cases import Edit, Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.editor import EditResult, checked_edits, combine_results, encode_edits
from peft_baft.editing.train import STOP_TERM, Terms


def require_raw(method: str, template: Template, facts: Iterable[Edit] = ()) -> None:
    """Raise a ValueError unless the template is raw and prompts are texts, for methods that compare whole prompts."""
    if template.name != "raw" or not all(isinstance(fact.prompt, str) for fact in facts):
        raise ValueError(
            f"{method} compares prompts as raw text, and a chat template would be part of them: give prompts as texts, and use "
            "--template raw."
        )


class InTurnEditor(ABC):
    """Base class of `Editor`s that make the edits of a batch one after another.

    Subclasses implement `_learn` for one edit.

    Args:
        template: the prompt format in which facts are taught.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template = RAW
    ) -> None:
        self.model, self.tokenizer, self._template = model, tokenizer, template

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Make all edits, or none if one fails; see `Editor.edit`."""
        facts = checked_edits(edits)
        encode_edits(
            self.model, self.tokenizer, facts, (self._template,)
        )  # raises for invalid edits
        before = self.state_dict()
        try:
            with frozen(self.model):
                return combine_results([self._learn(fact) for fact in facts])
        except BaseException:
            self.load_state_dict(before)
            raise

    def _encode(self, prompt: Prompt, answer: str, end: bool = False) -> Tokens:
        """Tokenise a prompt with its answer, in the format in which facts are taught; see `encode_fitting`."""
        return encode_fitting(
            self.model, self.tokenizer, prompt, answer, template=self._template, end=end
        )

    @abstractmethod
    def _learn(self, fact: Edit) -> EditResult:
        """Learn one fact. Must not write into tensors that `state_dict` returned before."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """See `Editor.state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Editor.load_state_dict`."""

    @abstractmethod
    def remove(self) -> None:
        """See `Editor.remove`."""


def stop_below(stop_loss: float) -> Callable[[Sequence[float]], bool]:
    """Return a stopping rule: the total loss is below `stop_loss`."""
    return lambda totals: totals[-1] < stop_loss


def stop_when_settled(stop_loss: float, change: float = 1e-4) -> Callable[[Sequence[float]], bool]:
    """Return the stopping rule of WISE and MEMOIR.

    The loss must be at most `stop_loss`, and the last step must have changed it by at most `change`.
    """
    return lambda totals: (
        len(totals) > 1 and totals[-1] <= stop_loss and abs(totals[-1] - totals[-2]) <= change
    )


def minimise(
    optimizer: torch.optim.Optimizer,
    terms: Callable[[], Terms],
    max_steps: int,
    should_stop: Callable[[Sequence[float]], bool],
    *,
    learned_below: float,
    clip_norm: float | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> EditResult:
    """Minimise a sum of loss terms with any optimiser; `editing.train.descend` only supports AdamW.

    Args:
        terms: computes the loss terms at the current parameters; `teacher_forcing` must be one of them.
        should_stop: decides whether to stop early, given the totals so far.
        learned_below: the answer counts as learned if `teacher_forcing` is below this.
        clip_norm: bound on the global gradient norm; None for no bound.
        after_step: called after each step, for example to clamp parameters.

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
        if should_stop(totals) or step == max_steps:
            break
        optimizer.zero_grad()
        torch.autograd.backward(total)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        with torch.no_grad():
            after_step()
    losses = {name: term.item() for name, term in now.items()}
    learned = losses[STOP_TERM] < learned_below
    return EditResult(step, losses, time.perf_counter() - begin, learned)
