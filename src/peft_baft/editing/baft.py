"""BaFT's own objective (Sec. 2.4): teacher forcing, load balance of the gates, locality margins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, RecordedGates, baft_layers, find_context
from peft_baft.data.batching import Tokens, encode_fitting, padding_id
from peft_baft.data.cases import Unrelated
from peft_baft.editing.descent import DescentConfig, Outcome, descend
from peft_baft.editing.editor import AdapterEditor
from peft_baft.editing.session import Session, open_session
from peft_baft.losses import load_balance, locality_margin, mean_over_blocks, rescaled, teacher_forcing


@dataclass(frozen=True)
class Objective:
    """The regularisers' settings.

    The two regularisers are brought to the magnitude of the teacher forcing loss (Eq. 4) by a factor that is constant to
    the gradient: teacher forcing / term, at most `ceiling`.

    Args:
        alpha: gates stay below this on unrelated text. beta: gates stay above this on the edit. gamma: margin between the
            most open gate on the edit and on unrelated text.
        balance: weight of the load balance, locality: weight of the margins; 0 leaves a term out.
        balance_ceiling, locality_ceiling: the largest factor of the rescaling.
    """

    alpha: float = 0.01
    beta: float = 0.05
    gamma: float = 0.02
    balance: float = 1.0
    locality: float = 1.0
    balance_ceiling: float = 1.0
    locality_ceiling: float = 10.0


class BaftEditor(AdapterEditor):
    """Teaches facts to a BaFT adapter: teacher forcing + incremental load balance + locality margins.

    After each edit the gates' use is added to the adapter's statistics, which are saved with it: a reloaded adapter
    goes on with its history. With `weighting="none"` there are no gates and nothing to regularise: that is ReFT.

    Args:
        model: a PeftModel whose active adapter is a BaFT adapter.
        tokenizer: the model's own, a fast one.
        unrelated: text that edits should leave alone; each fact is trained beside the next of this list, which starts
            again at its end. Empty for none, as in the paper's single editing: then nothing closes the gates.
        unrelated_per_edit: how many of them each fact is trained beside.
        objective: the regularisers' settings.
        descent, batch_descent: how one fact, and a batch of facts, is trained.

    Attributes:
        unrelated_used: how many unrelated texts have been shown so far. A new editor begins at the first text again;
            set this to what it was to go on with a reloaded adapter exactly as the old editor would have.

    Raises:
        TypeError, ValueError: as `AdapterEditor`, or the active adapter is not a BaFT adapter.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        unrelated: Sequence[Unrelated] = (),
        objective: Objective | None = None,
        descent: DescentConfig | None = None,
        batch_descent: DescentConfig | None = None,
        unrelated_per_edit: int = 1,
    ) -> None:
        super().__init__(model, tokenizer, descent, batch_descent)
        self.layers = [layer for layer in baft_layers(model) if self.adapter_name in layer.configs]
        if not self.layers:
            raise ValueError(
                f"The active adapter {self.adapter_name!r} is not a BaFT adapter; use AdapterEditor for it."
            )
        if unrelated_per_edit < 1:
            raise ValueError(
                f"unrelated_per_edit must be at least 1, not {unrelated_per_edit}; for none, leave `unrelated` empty."
            )
        self.objective, self.unrelated_per_edit, self.unrelated_used = objective or Objective(), unrelated_per_edit, 0
        rows = [encode_fitting(model, tokenizer, text.prompt, text.answer) for text in unrelated]
        self._unrelated = rows if self._gated() else []

    def _gated(self) -> list[BaftLayer]:
        return [layer for layer in self.layers if self.adapter_name in layer.baft_gate]

    def _train(self, rows: list[Tokens], parameters: list[nn.Parameter], descent: DescentConfig) -> Outcome:
        unrelated = self._next_unrelated(len(rows) * self.unrelated_per_edit)
        session = open_session(self.model, [*rows, *unrelated], padding_id(self.tokenizer), self._positions(parameters))
        context = find_context(self.model)
        assert context is not None, "a BaFT adapter has a context"
        with context.recording() as recorded:
            outcome = descend(parameters, lambda: self._terms(session, len(rows), recorded), descent)
            self._remember_use(recorded, len(rows))
        self.unrelated_used += len(unrelated)
        return outcome

    def _next_unrelated(self, count: int) -> list[Tokens]:
        first, texts = self.unrelated_used, self._unrelated
        return [texts[i % len(texts)] for i in range(first, first + count)] if texts else []

    def _positions(self, parameters: list[nn.Parameter]) -> int | None:
        """How many of the last prompt tokens may change; None if what is trained reaches further than the edited blocks."""
        own = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        if any(id(parameter) not in own for parameter in parameters):
            return None
        return self.layers[0].configs[self.adapter_name].prompt_positions

    def _terms(self, session: Session, edits: int, recorded: dict[str, RecordedGates]) -> dict[str, Tensor]:
        """The objective's terms; the first `edits` rows of the session are the facts, the others unrelated text."""
        logits = session.logits()
        fit = teacher_forcing(logits[:edits], session.labels[:edits])
        terms, settings = {"teacher_forcing": fit}, self.objective
        layers = self._gated()
        if not layers:
            return terms
        if not all(recorded[layer.name].w.requires_grad for layer in layers):
            raise ValueError(WITHOUT_GRADIENT)
        on_edit = {layer.name: _at_edited_tokens(recorded[layer.name], slice(None, edits)) for layer in layers}
        loads = {layer.name: layer.baft_load[self.adapter_name] for layer in layers}
        if settings.balance and self.layers[0].configs[self.adapter_name].gate_count > 1:
            balance = mean_over_blocks([load_balance(w, loads[n][:-1], loads[n][-1]) for n, w in on_edit.items()])
            terms["balance"] = settings.balance * rescaled(balance, fit, settings.balance_ceiling)
        if settings.locality and self._unrelated:
            margins = (settings.alpha, settings.beta, settings.gamma)
            off_edit = {n: _at_edited_tokens(recorded[n], slice(edits, None)) for n in on_edit}
            locality = mean_over_blocks([locality_margin(w, off_edit[n], *margins) for n, w in on_edit.items()])
            terms["locality"] = settings.locality * rescaled(locality, fit, settings.locality_ceiling)
        return terms

    def _remember_use(self, recorded: dict[str, RecordedGates], edits: int) -> None:
        """Add the gates of the learned edit to the running sums of the load balance."""
        for layer in self._gated():
            w = _at_edited_tokens(recorded[layer.name], slice(None, edits)).detach()
            load = layer.baft_load[self.adapter_name]
            load += torch.cat([w.sum(0), w.new_tensor([w.shape[0]])]).to(load)


WITHOUT_GRADIENT = (
    "The gates were computed without gradients, so the regularisers would not act: the model runs its blocks under "
    "no_grad, as reentrant gradient checkpointing does. Use gradient_checkpointing_enable("
    'gradient_checkpointing_kwargs={"use_reentrant": False}), or none.'
)


def _at_edited_tokens(gates: RecordedGates, rows: slice) -> Tensor:
    """The gates (n, k) at the edited tokens of some rows of the batch."""
    return gates.w[rows][gates.mask[rows]]
