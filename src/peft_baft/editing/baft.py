"""BaFT's own objective (Sec. 2.4): teacher forcing, load balance of the gates, locality margins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, EditContext, RecordedGates, baft_layers, find_context
from peft_baft.adapter.balance import WITHOUT_GRADIENT
from peft_baft.data.batching import Tokens, encode_fitting, padding_id
from peft_baft.data.cases import Edit, Unrelated
from peft_baft.editing.acceleration.prefix_cache import Session, open_session
from peft_baft.editing.adapter_editor import AdapterEditor, checked_edits, evaluating, trainable
from peft_baft.editing.lanes import Lane, Share, copy_adapter, divide, parameters_of, train_lanes
from peft_baft.editing.objective import Gates, Objective
from peft_baft.editing.train import Descent, DescentConfig, Outcome, Terms, descend


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
        self.objective, self.unrelated_per_edit = objective or Objective(), unrelated_per_edit
        rows = [encode_fitting(model, tokenizer, text.prompt, text.answer) for text in unrelated]
        self._unrelated = rows if self._gated() else []

    def _gated(self) -> list[BaftLayer]:
        return [layer for layer in self.layers if self.adapter_name in layer.baft_gate]

    def _train(self, rows: list[Tokens], parameters: list[nn.Parameter], descent: DescentConfig) -> Outcome:
        texts = self._next_unrelated(len(rows) * self.unrelated_per_edit)
        own = self.processes.share(range(len(rows)))
        beside = [text for i in own for text in texts[i * self.unrelated_per_edit : (i + 1) * self.unrelated_per_edit]]
        gates: dict[str, tuple[Tensor, Tensor]] = {}
        with self._context().recording() as recorded:
            if own:
                learned, positions = range(len(own)), self._positions(parameters)
                session = self._open([*(rows[i] for i in own), *beside], learned, positions)
                share = divide(session, learned, range(len(own), len(session.rows)), self._edited_positions())

            def part() -> list[Tensor]:
                answers = session.losses()
                return [answers, *(w for pair in self._gates(recorded, share).values() for w in pair)]

            def losses() -> Terms:
                answers, *w = self.processes.joined(part if own else list)
                gates.update(zip(self._loads(self.adapter_name), zip(w[::2], w[1::2], strict=True), strict=True))
                return self._terms(self.adapter_name, answers.mean(), gates)

            outcome = descend(parameters, losses, descent, self.processes)
            self._remember_use(self.adapter_name, gates)
        self.unrelated_used += len(texts)
        return outcome

    def _open(self, rows: Sequence[Tokens], learned: Sequence[int], positions: int | None) -> Session:
        return open_session(self.model, rows, learned, padding_id(self.tokenizer), positions)

    def edit_each(self, edits: Iterable[Edit], parallel: int = 16) -> Iterator[tuple[str, Outcome]]:
        """Teach each edit to an adapter of its own, which begins as a copy of this editor's: what `edit` would give alone.

        The results are ordinary adapters of the model, `NAME-0`, `NAME-1`, …, in the order of the edits: use `set_adapter`,
        `save_pretrained(selected_adapters=[...])`, `delete_adapter`. This editor's own adapter stays as it is.

        Args:
            parallel: how many edits share each forward. They are made when the first of them is asked for.

        Raises:
            TypeError, ValueError: as `edit`, for any of the edits, before the first is made; or the model has an adapter of
                such a name.
            FloatingPointError: a loss of one became NaN or infinite; none of those that it shared forwards with is kept.
        """
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, not {parallel}.")
        facts = checked_edits(edits)
        self._require_in_use()
        for fact in facts:
            self._tokens([fact])
        named = {f"{self.adapter_name}-{i}": fact for i, fact in enumerate(facts)}
        taken = [name for name in named if name in self.model.peft_config]
        if taken:
            raise ValueError(f"The model has an adapter {taken[0]!r} already; use delete_adapter.")
        return self._groups(named, parallel)

    def _groups(self, named: dict[str, Edit], parallel: int) -> Iterator[tuple[str, Outcome]]:
        names = list(named)
        for start in range(0, len(names), parallel):
            group = {name: named[name] for name in names[start : start + parallel]}
            made: list[str] = []
            try:
                for name in group:
                    copy_adapter(self.model, self.layers, self.adapter_name, name)
                    made.append(name)
                outcomes = self.edit_side_by_side(group)
            except BaseException:
                for name in made:
                    self.model.delete_adapter(name)
                raise
            yield from outcomes.items()

    def edit_side_by_side(self, edits: Mapping[str, Edit]) -> dict[str, Outcome]:
        """Teach each edit to the adapter it stands under, all in the same forwards.

        Args:
            edits: by name of an adapter of the model, made with the same config as this editor's.

        Raises:
            FloatingPointError: as `edit_each`; the adapters are left where they were at that moment.
        """
        rows = {name: self._tokens([edit])[0] for name, edit in edits.items()}
        positions = self._edited_positions()
        with torch.inference_mode(False), torch.enable_grad(), evaluating(self.model), trainable(self.model):
            lanes = []
            for name, row in rows.items():
                parameters = parameters_of(self.layers, name)
                for parameter in parameters:
                    parameter.requires_grad_()
                texts = self._next_unrelated(self.unrelated_per_edit)
                self.unrelated_used += len(texts)
                lanes.append(Lane(name, [row, *texts], Descent(parameters, self.descent)))
            outcomes = train_lanes(
                lanes,
                self._context(),
                [layer.name for layer in self._gated()],
                lambda rows, learned: self._open(rows, learned, positions),
                positions,
                lambda name, fit, share, recorded: self._terms(name, fit, self._gates(recorded, share)),
            )
            for lane in lanes:
                if lane.share is not None:
                    self._remember_use(lane.adapter_name, self._gates(lane.gates, lane.share))
        return dict(zip(edits, outcomes, strict=True))

    def _context(self) -> EditContext:
        context = find_context(self.model)
        assert context is not None, "a BaFT adapter has a context"
        return context

    def _next_unrelated(self, count: int) -> list[Tokens]:
        first, texts = self.unrelated_used, self._unrelated
        return [texts[i % len(texts)] for i in range(first, first + count)] if texts else []

    def _positions(self, parameters: list[nn.Parameter]) -> int | None:
        """How many of the last prompt tokens may change; None if what is trained reaches further than the edited blocks."""
        own = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        if any(id(parameter) not in own for parameter in parameters):
            return None
        return self._edited_positions()

    def _edited_positions(self) -> int:
        return self.layers[0].configs[self.adapter_name].prompt_positions

    def _loads(self, adapter_name: str) -> dict[str, Tensor]:
        """The statistics of an adapter's gates by the name of the block."""
        return {layer.name: layer.baft_gate_usage[adapter_name] for layer in self._gated()}

    def _gates(self, recorded: Mapping[str, RecordedGates], share: Share) -> Gates:
        """An adapter's gates at its edited tokens and at its unrelated ones, by the name of the block."""
        found = {layer.name: recorded[layer.name] for layer in self._gated()}
        if not all(one.w.requires_grad for one in found.values()):
            raise ValueError(WITHOUT_GRADIENT)
        return {name: (_at(one, share.edit), _at(one, share.unrelated)) for name, one in found.items()}

    def _terms(self, adapter_name: str, fit: Tensor, gates: Gates) -> Terms:
        """The objective's terms for one adapter, given the teacher forcing loss."""
        several = self.layers[0].configs[self.adapter_name].gate_count > 1
        return self.objective.terms(fit, gates, self._loads(adapter_name), several, bool(self._unrelated))

    def _remember_use(self, adapter_name: str, gates: Gates) -> None:
        """Add the gates of the learned edit to the running sums of the load balance."""
        for name, load in self._loads(adapter_name).items():
            w = gates[name][0].detach()
            load += torch.cat([w.sum(0), w.new_tensor([w.shape[0]])]).to(load)


def _at(gates: RecordedGates, places: Tensor) -> Tensor:
    """The gates (n, k) at some tokens."""
    return gates.w.flatten(0, 1)[places.to(gates.w.device)]
