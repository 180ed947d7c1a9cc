"""MEMIT (arXiv 2210.07229) and AlphaEdit (arXiv 2410.02355): many facts at once in several blocks.

The update is distributed over the down projections of these blocks.

For each fact, a target z is searched for: the output of the last of these blocks at the subject's last token.
Then, block by block, the remaining difference is divided among the blocks that are left:

    R = (z - h) / (blocks left),   Δ = R Kᵀ (λ C + K Kᵀ)⁻¹                                        MEMIT, Eq. 14 and 20
                                   Δ = R Kᵀ P (Kₚ Kₚᵀ P + K Kᵀ P + L₂ I)⁻¹                         AlphaEdit, Eq. 12

The columns of K are the facts' keys, C is the second moment of keys, P the projection onto the directions in
which C is small, and Kₚ are the keys of earlier edits. Each fact adds rank 1 to each block.

Deliberate differences from EasyEdit: second moments are computed from model-generated text
(`second_moments.py`), and the contexts are generated once per editor, with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter.blocks import find_stack
from peft_baft.adapter.state import frozen
from peft_baft.data.cases import Edit
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import EditResult, checked_edits, combine_results, encode_edits
from peft_baft_bench.methods.locating import (
    LocatedFact,
    Search,
    cached_prefixes,
    keys_and_outputs,
    locate_fact,
    search_target,
)
from peft_baft_bench.methods.low_rank import LowRankChanges
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import EASYEDIT_DEPTH, block_count, down_projection
from peft_baft_bench.methods.second_moments import second_moments
from peft_baft_bench.methods.validation import require_integer, require_positive

EASYEDIT_BLOCKS = (4, 5, 6, 7, 8)  # of a model of 32, counted from 0
PREFIX_TOKENS = 10


@dataclass(frozen=True)
class Memit(MethodSettings):
    """Write facts into the down projections of several blocks, by default with EasyEdit's Llama settings.

    Args:
        null_space: whether the update is restricted to directions that keys rarely have (AlphaEdit).
        moment_weight: λ of MEMIT.
        threshold: AlphaEdit uses the directions whose second moment is below this.
        ridge: L₂ of AlphaEdit.
        layers: the blocks, counted from 0; by default EasyEdit's 4 to 8 of 32, scaled to the model.
        contexts: how many model-generated texts of 10 tokens are used as prefixes of the prompt; 0 for none.
        moment_tokens: the number of tokens over which second moments are computed.
        moment_folder: where second moments are saved; None does not save them.
        search: how the target outputs are searched for.

    Raises:
        TypeError: layers are not integers.
        ValueError: a value is out of range.
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
            require_integer(f"{self.name}: {name}", getattr(self, name), least)
        for name in ("moment_weight", "threshold", "ridge"):
            require_positive(f"{self.name}: {name}", getattr(self, name))

    @property
    def name(self) -> str:
        """The method's name in error messages."""
        return "alphaedit" if self.null_space else "memit"

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> MemitEditor:
        """Create an editor of `base`. Unrelated text is not used.

        If several processes share the facts of a batch, each of them makes all edits, with identical results.
        """
        setup = setup or EditorSetup()
        return MemitEditor(base, tokenizer, self, setup.template, setup.prepared)


ALPHA_EDIT = Memit(null_space=True, search=replace(Search(), lr=0.1, weight_decay=0.5, clamp=0.75))


class MemitEditor:
    """Changes the down projections of several blocks; an `Editor`. Edits must name a subject.

    Args:
        template: the prompt format in which facts are taught.
        prepared: what editors of the same base model share.

    Raises:
        ValueError: a block does not exist, is quantised, or does not have exactly one down projection with a
            known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Memit,
        template: Template = RAW,
        prepared: EditCache | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._template, stack = template, find_stack(model)
        blocks = settings.layers
        if blocks is None:
            depth = block_count(model)
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
        """Write all facts into the blocks together; see `Editor.edit`."""
        facts = checked_edits(edits)
        encode_edits(
            self.model, self.tokenizer, facts, (self._template,)
        )  # raises for invalid edits
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        try:
            with frozen(self.model):
                return self._write(facts, *self._prepare())
        except BaseException:
            self.load_state_dict(before)
            raise

    def _prepare(self) -> tuple[list[str], dict[str, Tensor]]:
        """Generate contexts with the unedited model, and compute λ C or P for each block, (f, f) in float64."""
        settings, cache = self.settings, self._prepared.computed
        model, tokenizer = self.model, self.tokenizer
        lengths = ((PREFIX_TOKENS, settings.contexts),)
        moments_key = ("moments", *self.module_names, settings.moment_tokens)
        parameter = settings.threshold if settings.null_space else settings.moment_weight
        matrices_key = (*moments_key, settings.null_space, parameter)
        try:
            self.changes.revert()
            prefixes = cached_prefixes(model, tokenizer, lengths, self._prepared)
            if moments_key not in cache:
                cache[moments_key] = second_moments(
                    model,
                    tokenizer,
                    self.module_names,
                    settings.moment_tokens,
                    folder=settings.moment_folder,
                )
        finally:
            self.changes.apply()
        if matrices_key not in cache:
            transform = null_space if settings.null_space else torch.mul
            cache[matrices_key] = {
                name: transform(moment.double(), parameter)
                for name, moment in cache[moments_key].items()
            }
        return prefixes, cache[matrices_key]

    def _write(
        self, facts: Sequence[Edit], prefixes: list[str], matrices: Mapping[str, Tensor]
    ) -> EditResult:
        """Write facts into all blocks, from first to last, since the input of each block depends on those before it."""
        model, tokenizer, settings = self.model, self.tokenizer, self.settings
        located = [
            locate_fact(model, tokenizer, fact, prefixes, settings.name, self._template)
            for fact in facts
        ]
        found = [
            search_target(model, tokenizer, self._last_name, one, settings.search)
            for one in located
        ]
        targets = torch.stack([one.target for one in found])
        for number, name in enumerate(self.module_names):
            keys, missing = self._keys_and_missing(name, located, targets)
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
        self, name: str, located: Sequence[LocatedFact], targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the facts' current keys at a projection, and what the last block's output lacks.

        Returns:
            Keys (n, f) in float64, and the missing part of the output (n, d).
        """
        module = self.model.get_submodule(name)
        found = [
            keys_and_outputs(self.model, self.tokenizer, module, self._last_block, one)
            for one in located
        ]
        keys = torch.stack([_mean_key(fact_keys) for fact_keys, _ in found])
        return keys.double(), targets - torch.stack([output for _, output in found])

    def save_lora(self, folder: str | Path) -> None:
        """Save the edits as a LoRA, with rank 1 per edit; see `LowRankChanges.save_lora`."""
        self.changes.save_lora(folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the factors of the weights' updates, and for AlphaEdit the keys of the edits so far."""
        keys = {f"{name}.keys": rows for name, rows in self._past_keys.items()}
        return self.changes.state_dict() | (keys if self.settings.null_space else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.changes.load_state_dict(state)
        if self.settings.null_space:
            for name, rows in self._past_keys.items():
                self._past_keys[name] = state[f"{name}.keys"].to(rows.device)

    def remove(self) -> None:
        """Restore the original weights."""
        self.changes.revert()


def _mean_key(keys: Tensor) -> Tensor:
    """Average a fact's keys (texts, f): the bare prompt has the same weight as all contexts together."""
    return keys[0] if len(keys) == 1 else (keys[0] + keys[1:].mean(0)) / 2


def memit_keys(keys: Tensor, weighted_moments: Tensor) -> Tensor:
    """Compute the rows that R is multiplied with in MEMIT's update: Kᵀ (λ C + K Kᵀ)⁻¹.

    Args:
        keys: (n, f), one key per row.
        weighted_moments: λ C, (f, f).

    Returns:
        (n, f).
    """
    rows: Tensor = torch.linalg.solve(weighted_moments + keys.mT @ keys, keys.mT).mT
    return rows


def alpha_edit_keys(keys: Tensor, past: Tensor, projection: Tensor, ridge: float) -> Tensor:
    """Compute the rows that R is multiplied with in AlphaEdit's update: Kᵀ P (Kₚ Kₚᵀ P + K Kᵀ P + L₂ I)⁻¹.

    Args:
        keys: (n, f).
        past: keys of earlier edits, (m, f).
        projection: P, (f, f).
        ridge: L₂.

    Returns:
        (n, f).
    """
    covariance = past.mT @ past + keys.mT @ keys
    identity = torch.eye(len(projection), dtype=keys.dtype, device=keys.device)
    rows: Tensor = torch.linalg.solve(
        projection @ covariance + ridge * identity, projection @ keys.mT
    ).mT
    return rows


def null_space(moments: Tensor, threshold: float) -> Tensor:
    """Compute the projection P (f, f) onto the directions whose second moment is below `threshold`.

    Raises:
        ValueError: there is no such direction.
    """
    sizes, directions = torch.linalg.eigh(moments)
    small: Tensor = directions[:, sizes < threshold]
    if not small.shape[1]:
        raise ValueError(
            f"alphaedit: no direction of the keys has a second moment below threshold={threshold}; the smallest has "
            f"{sizes.min().item():.2g}. Set a larger threshold."
        )
    return small @ small.mT
