"""MEMIT (arXiv 2210.07229) and AlphaEdit (arXiv 2410.02355): many facts at once, spread over the down projections of some blocks.

For each fact z is searched for, what should leave the last of the blocks at the subject's last token. Block by block, what is
still missing of it is shared among the blocks that are left:

    R = (z - h) / (blocks left),   Δ = R Kᵀ (λ C + K Kᵀ)⁻¹                                        MEMIT, Eq. 14 and 20
                                   Δ = R Kᵀ P (Kₚ Kₚᵀ P + K Kᵀ P + L₂ I)⁻¹                         AlphaEdit, Eq. 12

with K the facts' keys in columns, C the second moments of keys, P the projection onto the directions in which C is small, and
Kₚ the keys of earlier edits. Each fact adds rank 1 to each block.

Differences from EasyEdit on purpose: second moments come from text that the model writes (`second_moments.py`), and contexts are
written once an editor, with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.blocks import find_stack
from peft_baft.adapter.state import frozen
from peft_baft.data.cases import Edit
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import EditResult, checked_edits, combine_results, encode_edits
from peft_baft_bench.methods.locating import (
    Located,
    Search,
    keys_and_outputs,
    locate,
    search_target,
    written_once,
)
from peft_baft_bench.methods.low_rank import LowRankChanges
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import EASYEDIT_DEPTH, down_projection
from peft_baft_bench.methods.second_moments import second_moments

EASYEDIT_BLOCKS = (4, 5, 6, 7, 8)  # of a model of 32, counted from 0
PREFIX_TOKENS = 10


@dataclass(frozen=True)
class Memit(MethodSettings):
    """Write facts into the down projections of some blocks, by default with EasyEdit's settings for Llama models.

    Args:
        null_space: whether the change is kept out of the directions that keys usually have, which is AlphaEdit.
        moment_weight: λ of MEMIT. threshold: AlphaEdit's directions are those whose second moment is below this.
        ridge: L₂ of AlphaEdit.
        layers: the blocks, counted from 0; by default EasyEdit's 4 to 8 of 32 scaled to the model.
        contexts: how many texts of 10 tokens, which the model writes, stand before the prompt in turn; 0 for none.
        moment_tokens: over how many tokens second moments are taken. moment_folder: where they are kept; None for nowhere.
        search: how the vectors that say the answers are found.

    Raises:
        TypeError: layers are no integers. ValueError: a value is out of its range.
    """

    null_space: bool = False
    moment_weight: float = 15000.0
    threshold: float = 0.02
    ridge: float = 1.0
    layers: tuple[int, ...] | None = None
    contexts: int = 5
    moment_tokens: int = 20_000
    moment_folder: str | None = None
    search: Search = field(default_factory=Search)

    seeded = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            blocks = tuple(self.layers)
            if not blocks or any(type(block) is not int for block in blocks):
                raise TypeError(
                    f"{self.name}: layers must be a list of integers, not {self.layers!r}."
                )
            object.__setattr__(self, "layers", tuple(sorted(set(blocks))))
        for name, least in (("contexts", 0), ("moment_tokens", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"{self.name}: {name} must be an integer of at least {least}, not {value!r}."
                )
        for name in ("moment_weight", "threshold", "ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{self.name}: {name} must be above 0 and finite, not {getattr(self, name)!r}."
                )

    @property
    def name(self) -> str:
        """The method's name in errors."""
        return "alphaedit" if self.null_space else "memit"

    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> MemitEditor:
        """Make an editor of `base`, which takes no unrelated text.

        Where several processes share the facts of a batch, each one makes all of them, and they come out alike.
        """
        setup = setup or EditorSetup()
        return MemitEditor(base, tokenizer, self, setup.template, setup.prepared)


ALPHA_EDIT = Memit(null_space=True, search=replace(Search(), lr=0.1, weight_decay=0.5, clamp=0.75))


class MemitEditor:
    """Changes the down projections of some blocks; an `Editor`. Its edits need a subject.

    template: the form in which facts are taught. prepared: what editors of one base model share.

    Raises:
        ValueError: a block does not exist, has not one down projection under a known name, or a quantised one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Memit,
        template: Template = RAW,
        prepared: EditCache | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._template, stack = template, find_stack(model)
        depth = len(model.get_submodule(stack))
        blocks = settings.layers
        if blocks is None:
            scaled = {round(block * depth / EASYEDIT_DEPTH) for block in EASYEDIT_BLOCKS}
            blocks = tuple(sorted(scaled))
        self.module_names = [
            down_projection(model, block, block, settings.name) for block in blocks
        ]
        self._last_name = f"{stack}.{blocks[-1]}"
        self._last_block = model.get_submodule(self._last_name)
        self.changes = LowRankChanges(model, self.module_names, settings.name)
        self._past_keys: dict[str, Tensor] = {
            name: rows.clone() for name, rows in self.changes.right.items()
        }  # (edits, f)
        self._prepared = prepared or EditCache()

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Write the facts into the blocks, all at once; as `Editor.edit`."""
        facts = checked_edits(edits)
        encode_edits(self.model, self.tokenizer, facts, (self._template,))  # their check
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        try:
            with frozen(self.model):
                return self._write(facts, *self._prepare())
        except BaseException:
            self.load_state_dict(before)
            raise

    def _prepare(self) -> tuple[list[str], dict[str, Tensor]]:
        """Let the unedited model write contexts; compute for each block λ C, or P, (f, f) in float64."""
        settings, computed = self.settings, self._prepared.computed
        lengths = ((PREFIX_TOKENS, settings.contexts),)
        of_moments = ("moments", *self.module_names, settings.moment_tokens)
        by = settings.threshold if settings.null_space else settings.moment_weight
        of_matrices = (*of_moments, settings.null_space, by)
        parts = self.model, self.tokenizer
        try:
            self.changes.take_off()
            before = written_once(*parts, lengths, self._prepared)
            if of_moments not in computed:
                folder = settings.moment_folder
                computed[of_moments] = second_moments(
                    *parts, self.module_names, settings.moment_tokens, folder=folder
                )
        finally:
            self.changes.put_on()
        if of_matrices not in computed:
            of_block = null_space if settings.null_space else torch.mul
            computed[of_matrices] = {
                name: of_block(moment.double(), by) for name, moment in computed[of_moments].items()
            }
        return before, computed[of_matrices]

    def _write(
        self, facts: Sequence[Edit], before: list[str], matrices: Mapping[str, Tensor]
    ) -> EditResult:
        """Write facts into all blocks, the first one first: what enters a block depends on those before it."""
        parts = self.model, self.tokenizer
        located = [
            locate(*parts, fact, before, self.settings.name, self._template) for fact in facts
        ]
        found = [
            search_target(*parts, self._last_name, one, self.settings.search) for one in located
        ]
        wanted = torch.stack([one.target for one in found])
        for number, name in enumerate(self.module_names):
            keys, missing = self._keys_and_missing(name, located, wanted)
            share = missing / (len(self.module_names) - number)
            matrix = matrices[name].to(keys.device)
            if self.settings.null_space:
                past = self._past_keys[name].double()
                right = alpha_edit_keys(keys, past, matrix, self.settings.ridge)
                self._past_keys[name] = torch.cat([self._past_keys[name], keys.float()])
            else:
                right = memit_keys(keys, matrix)
            self.changes.add(name, share, right)
        results = [one.result for one in found]
        losses = {
            name: sum(one.losses[name] for one in results) / len(results)
            for name in results[0].losses
        }
        return replace(combine_results(results), losses=losses)

    def _keys_and_missing(
        self, name: str, located: Sequence[Located], wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the facts' present keys at a projection, (n, f) float64, and what the last block lacks, (n, d)."""
        parts, module = (self.model, self.tokenizer), self.model.get_submodule(name)
        found = [keys_and_outputs(*parts, module, self._last_block, one) for one in located]
        keys = torch.stack([_mean_key(of_fact) for of_fact, _ in found])
        return keys.double(), wanted - torch.stack([present for _, present in found])

    def save_lora(self, folder: str | Path) -> None:
        """Save the edits as a LoRA of rank 1 an edit; as `LowRankChanges.save_lora`."""
        self.changes.save_lora(folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the factors of the weights' changes, and of AlphaEdit the keys of the edits so far."""
        keys = {f"{name}.keys": rows for name, rows in self._past_keys.items()}
        return self.changes.state_dict() | (keys if self.settings.null_space else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.changes.load_state_dict(state)
        if self.settings.null_space:
            for name, rows in self._past_keys.items():
                self._past_keys[name] = state[f"{name}.keys"].to(rows.device)

    def remove(self) -> None:
        """Write the original weights back."""
        self.changes.take_off()


def _mean_key(keys: Tensor) -> Tensor:
    """Average a fact's keys (texts, f): the bare prompt's counts as much as those of all contexts together."""
    return keys[0] if len(keys) == 1 else (keys[0] + keys[1:].mean(0)) / 2


def memit_keys(keys: Tensor, weighted_moments: Tensor) -> Tensor:
    """Compute the rows that multiply R in MEMIT's change: Kᵀ (λ C + K Kᵀ)⁻¹.

    Args:
        keys: (n, f), one key a row. weighted_moments: λ C, (f, f).

    Returns:
        (n, f).
    """
    return torch.linalg.solve(weighted_moments + keys.mT @ keys, keys.mT).mT


def alpha_edit_keys(keys: Tensor, past: Tensor, projection: Tensor, ridge: float) -> Tensor:
    """Compute the rows that multiply R in AlphaEdit's change: Kᵀ P (Kₚ Kₚᵀ P + K Kᵀ P + L₂ I)⁻¹.

    Args:
        keys: (n, f). past: (m, f) keys of earlier edits. projection: P, (f, f). ridge: L₂.

    Returns:
        (n, f).
    """
    covariance = past.mT @ past + keys.mT @ keys
    identity = torch.eye(len(projection), dtype=keys.dtype, device=keys.device)
    return torch.linalg.solve(projection @ covariance + ridge * identity, projection @ keys.mT).mT


def null_space(moments: Tensor, threshold: float) -> Tensor:
    """Compute the projection P (f, f) onto the directions whose second moment is below a threshold.

    Raises:
        ValueError: there is none.
    """
    sizes, directions = torch.linalg.eigh(moments)
    small = directions[:, sizes < threshold]
    if not small.shape[1]:
        raise ValueError(
            f"alphaedit: no direction of the keys has a second moment below threshold={threshold}; the smallest has "
            f"{sizes.min().item():.2g}. Set a larger threshold."
        )
    return small @ small.mT
