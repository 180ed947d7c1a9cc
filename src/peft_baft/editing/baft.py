"""Editing with BaFT (Sec. 2.4): teacher forcing, load balance of the gates, locality margins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, EditContext, baft_layers, find_context
from peft_baft.adapter.rollback import restored_on_error
from peft_baft.adapter.state import evaluating, is_baft_peft_model, trainable
from peft_baft.data.batching import Tokens, encode_fitting, padding_id
from peft_baft.data.cases import Edit, Unrelated
from peft_baft.data.templates import Template, is_chat
from peft_baft.editing.acceleration.repeated_texts import open_forward
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.answers import AnswerForward
from peft_baft.editing.contrasts import HeldVectors, contrast_rows, hold
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import CURSOR, EditResult, checked_edits
from peft_baft.editing.lanes import Gates, Lane, LaneBatch, LaneOutput, train_lanes
from peft_baft.editing.objective import Objective
from peft_baft.editing.presets import DEFAULT
from peft_baft.editing.scope import MOST_CONTRASTS, NARROW, Scope
from peft_baft.editing.train import CONTRAST_TERM, Descent, DescentConfig, Terms
from peft_baft.processes import Processes

UNRELATED_USED = f"{CURSOR}unrelated_used"


class BaftEditor(AdapterEditor):
    """Teaches facts to a BaFT adapter: teacher forcing + incremental load balance + locality margins.

    After each edit the gates' use is added to the adapter's statistics, which are saved with it: a reloaded adapter
    goes on with its history. With `weighting="none"` there are no gates and nothing to regularise: that is ReFT.

    Args:
        model: a PeftModel whose active adapter is a BaFT adapter.
        tokenizer: the model's own, a fast one.
        unrelated: text that edits should leave alone; each fact is trained beside the next of this list, which starts
            again at its end. Empty for none, as in the paper's single editing: then nothing closes the gates.
        objective: the regularisers' settings.
        descent, batch_descent: how one fact, and a batch of facts, is trained.
        unrelated_per_edit: how many unrelated texts each fact is trained beside.
        processes: as for `AdapterEditor`.
        unrelated_used: how many unrelated texts earlier edits of a reloaded adapter have been trained beside; this editor goes
            on with the next one, exactly as the earlier one would have.
        prepared: what edits of the same base model have found out and prepared before; by default the model's own.
        scope: in which surroundings each fact is taught, and beside which contrast texts; `NARROW` for neither.
        template, template_options: as for `AdapterEditor`; of `both`, unrelated texts take them in turn.

    Raises:
        TypeError, ValueError: as `AdapterEditor`, or the active adapter is not a BaFT adapter.
    """

    holds_contrasts = True

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        unrelated: Sequence[Unrelated] = (),
        objective: Objective | None = None,
        descent: DescentConfig | None = None,
        batch_descent: DescentConfig | None = None,
        unrelated_per_edit: int = 1,
        *,
        processes: Processes | None = None,
        unrelated_used: int = 0,
        prepared: EditCache | None = None,
        template: str | Template = "auto",
        template_options: Mapping[str, Any] | None = None,
        scope: Scope | None = None,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            descent or DEFAULT.descent,
            batch_descent or DEFAULT.batch_descent,
            processes=processes,
            template=template,
            template_options=template_options,
            scope=DEFAULT.scope if scope is None else scope,
        )
        config: Any = model.peft_config[self.adapter_name]
        if not is_baft_peft_model(model) or not config.kind.trains:
            raise ValueError(
                f"The active adapter {self.adapter_name!r} is not a plain BaFT adapter; peft_baft.editor_for(model, tokenizer) "
                "makes the editor that fits it."
            )
        self.layers = [layer for layer in baft_layers(model) if self.adapter_name in layer.configs]
        if self.layers[0].configs[self.adapter_name].answer_positions is not None:
            raise ValueError(
                "BaftEditor trains adapters that edit every answer token. Make one with answer_positions=None, or train this one "
                "with Trainer or a loop of your own."
            )
        if unrelated_per_edit < 1:
            raise ValueError(
                f"unrelated_per_edit must be at least 1, not {unrelated_per_edit}; for none, leave `unrelated` empty."
            )
        self.objective, self.unrelated_per_edit = objective or DEFAULT.objective, unrelated_per_edit
        self.unrelated_used, self._prepared = unrelated_used, prepared
        self._gated = [layer for layer in self.layers if self.adapter_name in layer.baft_gate]
        self._gated_blocks = [layer.name for layer in self._gated]
        rows = []
        for i, text in enumerate(unrelated):
            form = self.templates[i % len(self.templates)]
            rows.append(encode_fitting(model, tokenizer, text.prompt, text.answer, template=form))
        self._unrelated = rows if self._gated else []
        self._context.cursors.add(self)

    def edit_each(
        self, edits: Iterable[Edit], parallel: int = 16
    ) -> Iterator[tuple[str, EditResult]]:
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
            self._encode([fact], self.descent, NARROW)
        by_adapter = {f"{self.adapter_name}-{i}": fact for i, fact in enumerate(facts)}
        taken = [name for name in by_adapter if name in self.model.peft_config]
        if taken:
            raise ValueError(f"The model has an adapter {taken[0]!r} already; use delete_adapter.")
        return self._edit_groups(by_adapter, parallel)

    def _edit_groups(
        self, by_adapter: dict[str, Edit], parallel: int
    ) -> Iterator[tuple[str, EditResult]]:
        """Make the edits of `edit_each`, one group that shares its forwards after another."""
        names = list(by_adapter)
        for start in range(0, len(names), parallel):
            group = {name: by_adapter[name] for name in names[start : start + parallel]}
            copies: list[str] = []
            try:
                for name in group:
                    self._copy_adapter(name)
                    copies.append(name)
                results = self.edit_side_by_side(group)
            except BaseException:
                for name in copies:
                    self.model.delete_adapter(name)
                raise
            yield from results.items()

    def edit_side_by_side(self, edits: Mapping[str, Edit]) -> dict[str, EditResult]:
        """Teach each edit to the adapter it stands under, all in the same forwards.

        Args:
            edits: by name of an adapter of the model, made with the same config as this editor's.

        Raises:
            FloatingPointError: as `edit_each`; the adapters are left where they were at that moment.
        """
        edits = dict(zip(edits, self._with_subjects(list(edits.values())), strict=True))
        facts = {name: self._encode([edit], self.descent)[0] for name, edit in edits.items()}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(self.model),
            trainable(self.model),
            restored_on_error(self._context.cursors.snapshot),
        ):
            lanes = []
            for name, rows in facts.items():
                parameters = self._parameters_of(name)
                # `trainable` has frozen all adapters but the active one.
                for parameter in parameters:
                    parameter.requires_grad_()
                descent = Descent(parameters, self.descent, self._bounds)
                lanes.append(Lane(name, rows, self._take_unrelated(1), descent))
            # It finds out whether going on from a cache is right for this model, which contrast texts rely on.
            batch = self._batch(lanes, one_adapter_per_row=True)
            for lane in lanes:
                lane.displacements = self._held(lane.adapter_name, [edits[lane.adapter_name]])
            results = train_lanes(lanes, batch, self._terms, self._gated_blocks)
            for lane in lanes:
                self._add_gate_usage(lane)
        for name, edit in edits.items():
            self.remember_form(name, [edit])
        return dict(zip(edits, results, strict=True))

    def edit_fresh(
        self, edits: Mapping[str, Edit], seeds: Mapping[str, int]
    ) -> dict[str, EditResult]:
        """Make an adapter for each name, initialised with its seed, and teach it the edit of that name.

        Each comes out as if it had been edited alone. Raises as `edit_side_by_side`.
        """
        for name in edits:
            # PEFT initialises an adapter when it adds it, from torch's global random numbers.
            torch.manual_seed(seeds[name])
            self.model.add_adapter(name, deepcopy(self.model.peft_config[self.adapter_name]))
        return self.edit_side_by_side(edits)

    def answering(self, adapter_names: list[str]) -> AbstractContextManager[None]:
        """Let row i of the batches inside be answered by adapter `adapter_names[i]`."""
        return self._context.rows(adapter_names)

    def use(self, adapter_name: str) -> None:
        """Let the model answer with this adapter from now on."""
        self.model.set_adapter(adapter_name)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the adapter's tensors, and how many unrelated texts were used."""
        return {**super().state_dict(), UNRELATED_USED: torch.tensor(self.unrelated_used)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        if UNRELATED_USED not in state:
            raise ValueError(
                f"The state of a BaftEditor has {UNRELATED_USED!r}; this one, of an adapter alone, does not say which unrelated "
                "text comes next. Load it with PEFT, and make a BaftEditor with unrelated_used=...."
            )
        super().load_state_dict(state)
        self.unrelated_used = int(state[UNRELATED_USED])

    def described(self) -> dict[str, str]:
        """Say what decides how edits come out, besides the adapter's config; unrelated texts as a hash of their tokens."""
        texts = json.dumps([row.ids for row in self._unrelated])
        return {
            **super().described(),
            "objective": repr(self.objective),
            "unrelated_per_edit": repr(self.unrelated_per_edit),
            "unrelated": hashlib.sha256(texts.encode()).hexdigest()[:16],
        }

    @property
    def cursor(self) -> int:
        """How many unrelated texts were used."""
        return self.unrelated_used

    @cursor.setter
    def cursor(self, used: int) -> None:
        self.unrelated_used = used

    @property
    def _context(self) -> EditContext:
        context = find_context(self.model)
        assert context is not None, "a BaFT adapter has a context"
        return context

    @property
    def _bounds(self) -> dict[str, float]:
        return {CONTRAST_TERM: self.scope.bound}

    @property
    def _prompt_positions(self) -> int:
        return self.layers[0].configs[self.adapter_name].prompt_positions

    def _train(
        self, edits: Sequence[Edit], facts: list[list[Tokens]], descent: Descent
    ) -> EditResult:
        """Train the active adapter on one batch of facts, of which each process takes its part with its unrelated texts."""
        per_edit = self.unrelated_per_edit if self._unrelated else 0
        texts = self._take_unrelated(len(facts))
        own_facts = self.processes.share(range(len(facts)))
        own_texts: list[Tokens] = []
        for i in own_facts:
            own_texts += texts[i * per_edit : (i + 1) * per_edit]
        own_rows = [row for i in own_facts for row in facts[i]]
        lane = Lane(self.adapter_name, own_rows, own_texts, descent)
        # It finds out whether going on from a cache is right for this model, which contrast texts rely on.
        batch = self._batch([lane]) if lane.rows else None
        own_edits = [edits[i] for i in own_facts]
        lane.displacements = self._held(self.adapter_name, own_edits, len(edits))
        (result,) = train_lanes([lane], batch, self._terms, self._gated_blocks, self.processes)
        self._add_gate_usage(lane)
        return result

    def _batch(self, lanes: Sequence[Lane], one_adapter_per_row: bool = False) -> LaneBatch:
        return LaneBatch(
            lanes,
            self._open,
            self._context,
            self._gated_blocks,
            self._prompt_positions,
            one_adapter_per_row,
        )

    def _open(self, rows: Sequence[Tokens], learned: Sequence[int]) -> AnswerForward:
        """Make the forward for some texts: the fast one, unless what is trained reaches further than the edited blocks."""
        in_adapters = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        reaches_further = any(id(parameter) not in in_adapters for parameter in trained)
        positions = None if reaches_further else self._prompt_positions
        return open_forward(
            self.model, rows, learned, padding_id(self.tokenizer), positions, self._prepared
        )

    def _held(
        self, adapter_name: str, edits: Sequence[Edit], batch: int = 1
    ) -> Callable[[], Tensor] | None:
        """Make the contrast texts of some facts, and what computes how far an adapter moves them, weighted.

        Args:
            batch: how many facts are learned together.
        """
        most = max(1, MOST_CONTRASTS // batch)
        make = partial(contrast_rows, self.model, self.tokenizer, scope=self.scope)
        positions = self._prompt_positions
        held: list[tuple[float, HeldVectors]] = []
        for form in self.templates:
            for chat in (False, True):  # messages are a chat in either form
                of_form = [edit for edit in edits if is_chat(edit.prompt, form) == chat]
                rows = [row for edit in of_form for row in make(edit, form)[:most]]
                if rows:
                    vectors = hold(
                        self.model,
                        self.tokenizer,
                        self.layers,
                        rows,
                        self.scope,
                        positions,
                        adapter_name,
                        self._prepared,
                    )
                    weight = self.scope.weight if chat else self.scope.weight_in_text
                    held.append((weight, vectors))

        def displacements() -> Tensor:
            found = [w * vectors.displacements(self.layers, adapter_name) for w, vectors in held]
            return torch.cat(found)

        return displacements if held else None

    def _take_unrelated(self, facts: int) -> list[Tokens]:
        """Take the next unrelated texts for so many facts."""
        texts = self._unrelated
        if not texts:
            return []
        first, count = self.unrelated_used, facts * self.unrelated_per_edit
        self.unrelated_used += count
        return [texts[i % len(texts)] for i in range(first, first + count)]

    def _terms(self, lane: Lane, output: LaneOutput) -> Terms:
        """Give the objective's terms for one adapter."""
        several = self.layers[0].configs[self.adapter_name].gate_count > 1
        terms = self.objective.terms(
            output.answer_losses.mean(),
            output.gates,
            self._gate_usage(lane.adapter_name),
            several_gates=several,
            unrelated=bool(self._unrelated),
        )
        if output.displacements.numel():
            terms[CONTRAST_TERM] = output.displacements.mean()
        return terms

    def _gate_usage(self, adapter_name: str) -> dict[str, Tensor]:
        """Get the statistics of an adapter's gates, (k + 1,), by the name of the block."""
        return {layer.name: layer.baft_gate_usage[adapter_name] for layer in self._gated}

    def _add_gate_usage(self, lane: Lane) -> None:
        """Add the gates of the facts just learned to the running sums of the load balance."""
        if lane.output is None:
            return
        gates: Gates = lane.output.gates
        for name, usage in self._gate_usage(lane.adapter_name).items():
            w = gates[name][0].detach()
            usage += torch.cat([w.sum(0), w.new_tensor([w.shape[0]])]).to(usage)

    def _copy_adapter(self, name: str) -> None:
        """Give the model one more adapter, `name`, that is as this editor's own is now."""
        source = self.adapter_name
        self.model.add_adapter(name, deepcopy(self.model.peft_config[source]))
        for layer in self.layers:
            for container in containers_of(layer):
                if source in container:
                    container[name].load_state_dict(container[source].state_dict())
            if source in layer.baft_gate_usage:
                layer.baft_gate_usage[name] = layer.baft_gate_usage[source].clone()

    def _parameters_of(self, name: str) -> list[nn.Parameter]:
        """List the parameters of one adapter."""
        parameters: list[nn.Parameter] = []
        for layer in self.layers:
            for container in containers_of(layer):
                if name in container:
                    parameters += container[name].parameters()
        return parameters


def containers_of(layer: BaftLayer) -> tuple[nn.ModuleDict, ...]:
    """List the dictionaries of a block's modules by adapter."""
    return layer.baft_basis, layer.baft_source, layer.baft_gate
