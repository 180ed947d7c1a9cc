"""Knowledge editing with BaFT (Sec. 2.4): teacher forcing, load balance of the gates, locality margins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import BaftLayer, EditContext, baft_layers, find_context
from peft_baft.adapter.rollback import restored_on_error
from peft_baft.adapter.state import evaluating, is_baft_peft_model, trainable
from peft_baft.data.batching import Tokens, encode_fitting, padding_id
from peft_baft.data.cases import Edit, Unrelated
from peft_baft.data.templates import Template, is_chat
from peft_baft.editing.adapter_editor import AdapterEditor
from peft_baft.editing.answers import AnswerForward
from peft_baft.editing.contrasts import ContrastTargets, contrast_rows, contrast_targets
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import CURSOR, EditResult, checked_edits
from peft_baft.editing.fast_paths import open_forward
from peft_baft.editing.lanes import Gates, Lane, LaneBatch, LaneOutput, train_lanes
from peft_baft.editing.objective import Objective
from peft_baft.editing.presets import DEFAULT
from peft_baft.editing.scope import MOST_CONTRASTS, NARROW, Scope
from peft_baft.editing.train import CONTRAST_TERM, Descent, DescentConfig, Terms
from peft_baft.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNRELATED_USED = f"{CURSOR}unrelated_used"


class BaftEditor(AdapterEditor):
    """Trains facts into a BaFT adapter: teacher forcing + incremental load balance + locality margins.

    After each edit the gate values are added to the adapter's statistics. These are saved with the adapter, so a reloaded
    adapter keeps its history. With `weighting="none"` it has no gates and no regularisers; that is ReFT.

    Args:
        model: a PeftModel whose active adapter is a BaFT adapter.
        tokenizer: the model's fast tokenizer.
        unrelated: texts that edits should not affect. Each fact is trained alongside the next texts of this list, which is
            cycled. With an empty list, as in the paper's single editing, no term closes the gates.
        objective: the settings of the regularisers.
        descent, batch_descent: the optimiser settings for one fact and for a batch of facts.
        unrelated_per_edit: the number of unrelated texts per fact.
        processes: see `AdapterEditor`.
        unrelated_used: for a reloaded adapter, the number of unrelated texts that its earlier edits used. This editor continues
            with the next text.
        prepared: the `EditCache` of the base model; by default the one stored for this model.
        scope: the contexts and wordings in which each fact is trained, and its contrast texts; `NARROW` for none.
        template, template_options: see `AdapterEditor`. With `both`, unrelated texts alternate between the two formats.

    Raises:
        TypeError, ValueError: as `AdapterEditor`, or the active adapter is not a BaFT adapter.
    """

    supports_contrasts = True

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
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
                "returns the right editor for it."
            )
        self.layers = [layer for layer in baft_layers(model) if self.adapter_name in layer.configs]
        if self.layers[0].configs[self.adapter_name].answer_positions is not None:
            raise ValueError(
                "BaftEditor trains adapters that edit every answer token. Create one with answer_positions=None, or train this "
                "one with Trainer or your own training loop."
            )
        if unrelated_per_edit < 1:
            raise ValueError(
                f"unrelated_per_edit must be at least 1, not {unrelated_per_edit}; to train without unrelated texts, leave "
                "`unrelated` empty."
            )
        self.objective, self.unrelated_per_edit = objective or DEFAULT.objective, unrelated_per_edit
        self.unrelated_used, self._prepared = unrelated_used, prepared
        self._gated = [layer for layer in self.layers if self.adapter_name in layer.baft_gate]
        self._gated_blocks = [layer.name for layer in self._gated]
        rows = []
        for i, text in enumerate(unrelated):
            template = self.templates[i % len(self.templates)]
            rows.append(
                encode_fitting(model, tokenizer, text.prompt, text.answer, template=template)
            )
        self._unrelated = rows if self._gated else []
        self._context.cursors.add(self)

    def edit_each(
        self, edits: Iterable[Edit], parallel: int = 16
    ) -> Iterator[tuple[str, EditResult]]:
        """Train each edit in its own copy of this editor's adapter, with the same result as a single `edit` call.

        The results are ordinary adapters of the model, named `NAME-0`, `NAME-1`, … in the order of the edits: use
        `set_adapter`, `save_pretrained(selected_adapters=[...])` and `delete_adapter` with them. The editor's adapter is left
        unchanged.

        Args:
            parallel: the number of edits that are trained together. A group is trained when its first result is requested.

        Raises:
            TypeError, ValueError: as `edit`, for any of the edits and before the first is made; or the model already has an
                adapter of such a name.
            FloatingPointError: a loss of one edit became NaN or infinite; the adapters of its group are deleted.
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
        """Train the edits of `edit_each` group by group."""
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
        """Train each edit in the adapter whose name it is given under, all in the same forward passes.

        Args:
            edits: by adapter name. The adapters must have the same config as this editor's.

        Raises:
            FloatingPointError: a loss became NaN or infinite; the adapters keep their values at that step.
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
                # `trainable` has frozen all adapters except the active one.
                for parameter in parameters:
                    parameter.requires_grad_()
                descent = Descent(parameters, self.descent, self._bounds)
                lanes.append(Lane(name, rows, self._take_unrelated(1), descent))
            # The batch comes first: it tests whether this model's cache can be used, which contrast texts rely on.
            batch = self._batch(lanes, one_adapter_per_row=True)
            for lane in lanes:
                edit = edits[lane.adapter_name]
                lane.displacements = self._contrast_displacements(lane.adapter_name, [edit])
            results = train_lanes(lanes, batch, self._terms, self._gated_blocks)
            for lane in lanes:
                self._add_gate_usage(lane)
        for name, edit in edits.items():
            self.remember_form(name, [edit])
        return dict(zip(edits, results, strict=True))

    def edit_fresh(
        self, edits: Mapping[str, Edit], seeds: Mapping[str, int]
    ) -> dict[str, EditResult]:
        """Add an adapter per name, initialised with its seed, and train it on the edit of that name.

        The result is the same as with one edit at a time. Raises the same errors as `edit_side_by_side`.
        """
        for name in edits:
            # PEFT initialises an adapter when it is added, from torch's global random number generator.
            torch.manual_seed(seeds[name])
            self.model.add_adapter(name, deepcopy(self.model.peft_config[self.adapter_name]))
        return self.edit_side_by_side(edits)

    def answering(self, adapter_names: list[str]) -> AbstractContextManager[None]:
        """Apply adapter `adapter_names[i]` to row i of every batch inside the context."""
        return self._context.rows(adapter_names)

    def use(self, adapter_name: str) -> None:
        """Activate this adapter."""
        self.model.set_adapter(adapter_name)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapter's tensors and the number of unrelated texts used so far."""
        return {**super().state_dict(), UNRELATED_USED: torch.tensor(self.unrelated_used)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that `state_dict` returned."""
        if UNRELATED_USED not in state:
            raise ValueError(
                f"The state of a BaftEditor must contain {UNRELATED_USED!r}; this state has only the adapter's tensors, so it is "
                "not known which unrelated text comes next. Load it with PEFT and create a BaftEditor with unrelated_used=...."
            )
        super().load_state_dict(state)
        self.unrelated_used = int(state[UNRELATED_USED])

    def described(self) -> dict[str, str]:
        """Return the settings that affect the outcome of edits, with a hash of the unrelated texts' tokens."""
        texts = json.dumps([row.ids for row in self._unrelated])
        return {
            **super().described(),
            "objective": repr(self.objective),
            "unrelated_per_edit": repr(self.unrelated_per_edit),
            "unrelated": hashlib.sha256(texts.encode()).hexdigest()[:16],
        }

    @property
    def cursor(self) -> int:
        """The number of unrelated texts used so far."""
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
        """Train the active adapter on one batch of facts; the processes share the facts and their unrelated texts."""
        per_edit = self.unrelated_per_edit if self._unrelated else 0
        texts = self._take_unrelated(len(facts))
        own_facts = self.processes.shard(range(len(facts)))
        own_texts: list[Tokens] = []
        for i in own_facts:
            own_texts += texts[i * per_edit : (i + 1) * per_edit]
        own_rows = [row for i in own_facts for row in facts[i]]
        lane = Lane(self.adapter_name, own_rows, own_texts, descent)
        # The batch comes first: it tests whether this model's cache can be used, which contrast texts rely on.
        batch = self._batch([lane]) if lane.rows else None
        own_edits = [edits[i] for i in own_facts]
        lane.displacements = self._contrast_displacements(self.adapter_name, own_edits, len(edits))
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
        """Return the loss computation for some rows: the fast one only if nothing outside the edited blocks is trained."""
        in_layers = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        only_layers = all(id(parameter) in in_layers for parameter in trained)
        positions = self._prompt_positions if only_layers else None
        return open_forward(
            self.model, rows, learned, padding_id(self.tokenizer), positions, self._prepared
        )

    def _contrast_displacements(
        self, adapter_name: str, edits: Sequence[Edit], batch: int = 1
    ) -> Callable[[], Tensor] | None:
        """Return a function that computes how far an adapter moves the contrast texts of some facts, weighted.

        Args:
            batch: the number of facts in the whole batch.

        Returns:
            A function that returns (m,) with gradient; None if the facts have no contrast texts.
        """
        most = max(1, MOST_CONTRASTS // batch)
        weighted: list[tuple[float, ContrastTargets]] = []
        for template in self.templates:
            for chat in (False, True):  # prompts of messages are a chat under either template
                rows: list[Tokens] = []
                for edit in edits:
                    if is_chat(edit.prompt, template) == chat:
                        rows += contrast_rows(
                            self.model, self.tokenizer, edit, template, self.scope
                        )[:most]
                if rows:
                    targets = contrast_targets(
                        self.model,
                        self.tokenizer,
                        self.layers,
                        rows,
                        self.scope,
                        self._prompt_positions,
                        adapter_name,
                        self._prepared,
                    )
                    weight = self.scope.weight if chat else self.scope.weight_in_text
                    weighted.append((weight, targets))
        if not weighted:
            return None

        def displacements() -> Tensor:
            parts = [
                weight * targets.displacements(self.layers, adapter_name)
                for weight, targets in weighted
            ]
            return torch.cat(parts)

        return displacements

    def _take_unrelated(self, facts: int) -> list[Tokens]:
        """Return the next unrelated texts for this number of facts, and advance the cursor."""
        texts = self._unrelated
        if not texts:
            return []
        first, count = self.unrelated_used, facts * self.unrelated_per_edit
        self.unrelated_used += count
        return [texts[i % len(texts)] for i in range(first, first + count)]

    def _terms(self, lane: Lane, output: LaneOutput) -> Terms:
        """Return the terms of the objective for one lane."""
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
        """Return the gate statistics of an adapter, (k + 1,), by block name."""
        return {layer.name: layer.baft_gate_usage[adapter_name] for layer in self._gated}

    def _add_gate_usage(self, lane: Lane) -> None:
        """Add the gate values of a lane's facts to the running sums of the load balance."""
        if lane.output is None:
            return
        gates: Gates = lane.output.gates
        for name, usage in self._gate_usage(lane.adapter_name).items():
            w = gates[name][0].detach()
            usage += torch.cat([w.sum(0), w.new_tensor([w.shape[0]])]).to(usage)

    def _copy_adapter(self, name: str) -> None:
        """Add an adapter `name` that is a copy of this editor's adapter."""
        source = self.adapter_name
        self.model.add_adapter(name, deepcopy(self.model.peft_config[source]))
        for layer in self.layers:
            for container in containers_of(layer):
                if source in container:
                    container[name].load_state_dict(container[source].state_dict())
            if source in layer.baft_gate_usage:
                layer.baft_gate_usage[name] = layer.baft_gate_usage[source].clone()

    def _parameters_of(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of one adapter."""
        parameters: list[nn.Parameter] = []
        for layer in self.layers:
            for container in containers_of(layer):
                if name in container:
                    parameters += container[name].parameters()
        return parameters


def containers_of(layer: BaftLayer) -> tuple[nn.ModuleDict, ...]:
    """Return a block's dictionaries from adapter names to modules."""
    return layer.baft_basis, layer.baft_source, layer.baft_gate
