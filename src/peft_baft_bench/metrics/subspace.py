"""How an edit uses the r dimensions of its subspaces: which of them it needs, and where their gates open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_baft.adapter import BaftLayer, baft_layers
from peft_baft.data.batching import Tokens
from peft_baft.data.cases import Case, Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import teacher_forced
from peft_baft.evaluation.scoring import token_match

Subspace = tuple[BaftLayer, str]  # an edited block and the name of the adapter that acts there


def subspaces(model: nn.Module) -> list[Subspace]:
    """List the edited blocks with the BaFT adapter that is active there; empty if there is none."""
    blocks: list[Subspace] = []
    for layer in baft_layers(model):
        if not layer.disable_adapters:
            # Adapters of other kinds have no subspace.
            blocks += [(layer, name) for name in layer.active_adapters if name in layer.baft_basis]
    return blocks


def has_gates(model: nn.Module) -> bool:
    """Return whether a BaFT adapter with gates is active, as opposed to ReFT."""
    return any(name in layer.baft_gate for layer, name in subspaces(model))


@torch.no_grad()
def removal_ladder(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, case: Case, template: Template = RAW
) -> list[float]:
    """Ask for the edit without the M least used dimensions of every block: the paper's Fig. 1.

    The use of a dimension is the mean absolute coefficient w_k (A h + b - R h)_k over the edited tokens,
    prompt end and answer. A removed dimension no longer moves the hidden vectors; the adapter itself is not
    changed.

    Returns:
        r + 1 token matches of the edit, for M = 0 … r; the last is that of the unedited model.

    Raises:
        TypeError: the model has no BaFT adapter.
        ValueError: not exactly one is active.
    """
    blocks = _require_one_adapter(model)
    edit = [(case.edit.prompt, case.edit.target)]
    first_layer, adapter_name = blocks[0]
    rows = first_layer.configs[adapter_name].r + 1
    # (rows, r) by each block's source: the dimensions that remain in row M.
    remaining: dict[nn.Module, Tensor] = {}
    for (layer, name), (shift, w) in zip(
        blocks, _at_edited_tokens(model, tokenizer, edit, blocks, template), strict=True
    ):
        use = (shift.abs() * w).mean(0)
        rank_of_dimension = use.argsort(stable=True).argsort()  # 0 for the least used
        remaining[layer.baft_source[name]] = rank_of_dimension >= torch.arange(rows)[:, None]

    def remove_dimensions(source: nn.Module, _: Any, shift: Tensor) -> Tensor:
        return torch.where(remaining[source].to(shift.device)[:, None], shift, 0)

    # All r + 1 variants are one batch: row M lacks M dimensions.
    with _hooked(remaining, remove_dimensions):
        return token_match(model, tokenizer, edit * rows, batch_size=rows, template=template)


@torch.no_grad()
def mean_gates(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, case: Case, template: Template = RAW
) -> dict[str, Any]:
    """Average the gates of every block over the edited tokens of the edit and its probes: the paper's Fig. 2.

    Returns:
        blocks: the blocks' names.
        edit, generality, locality: for each block, its r mean gates, or one if the adapter has a single gate.
            Kinds without probes are absent.

    Raises:
        TypeError: the model has no BaFT adapter.
        ValueError: not exactly one is active, or it has no gates.
    """
    blocks = _require_one_adapter(model)
    if not has_gates(model):
        raise ValueError(
            "The active adapter has no gates (weighting='none', which is ReFT); use one with gates."
        )
    pairs: dict[str, list[tuple[Prompt, str]]] = {"edit": [(case.edit.prompt, case.edit.target)]}
    for kind in ("generality", "locality"):
        pairs[kind] = [(probe.prompt, probe.answer) for probe in case.of_kind(kind)]
    means: dict[str, Any] = {"blocks": [layer.name for layer, _ in blocks]}
    for kind, pairs_of_kind in pairs.items():
        if pairs_of_kind:
            by_block = _at_edited_tokens(model, tokenizer, pairs_of_kind, blocks, template)
            means[kind] = [w.mean(0).tolist() for _, w in by_block]
    return means


def _require_one_adapter(model: nn.Module) -> list[Subspace]:
    if not baft_layers(model):
        raise TypeError(
            f"This metric needs the dimensions and gates of a BaFT adapter, but this {type(model).__name__} has none; "
            "load one with PeftModel.from_pretrained(model, folder)."
        )
    blocks = subspaces(model)
    names = {name for _, name in blocks}
    if len(names) != 1:
        raise ValueError(f"One BaFT adapter must be active, not {sorted(names)}; use set_adapter.")
    return blocks


def _at_edited_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str]],
    blocks: Sequence[Subspace],
    template: Template,
) -> list[tuple[Tensor, Tensor]]:
    """Collect the intervention of each block at all n edited tokens of all pairs.

    Returns:
        For each block, A h + b - R h (n, r), and the gates (n, r), or (n, 1) for a single gate.
    """
    with _recorded(blocks) as seen:

        def read(rows: Sequence[Tokens], _: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
            by_block = [_per_row(layer, name, seen) for layer, name in blocks]
            return [list(blocks_of_row) for blocks_of_row in zip(*by_block, strict=True)]

        by_pair = teacher_forced(model, tokenizer, pairs, read, template=template)
    by_block = []
    for shifts_and_gates in zip(*by_pair, strict=True):
        shifts, gates = zip(*shifts_and_gates, strict=True)
        by_block.append((torch.cat(shifts), torch.cat(gates)))
    return by_block


def _per_row(
    layer: BaftLayer, name: str, seen: dict[nn.Module, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shift and gates (1 without gates) of one block at the edited tokens of each row of the last forward."""
    relative_positions = layer.context.relative_positions
    assert relative_positions is not None, "the model was given tokens"
    masks = layer.configs[name].edits(relative_positions).cpu()
    shifts = seen[layer.baft_source[name]]
    gates = (
        seen[layer.baft_gate[name]] if name in layer.baft_gate else torch.ones(*shifts.shape[:2], 1)
    )
    for mask, shift, w in zip(masks, shifts, gates, strict=True):
        yield shift[mask], w[mask]


@contextmanager
def _recorded(blocks: Sequence[Subspace]) -> Iterator[dict[nn.Module, Tensor]]:
    """Record the outputs of the blocks' sources and gates in the last enclosed forward."""
    seen: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        seen[module] = output.float().cpu()

    sources = [layer.baft_source[name] for layer, name in blocks]
    gates = [layer.baft_gate[name] for layer, name in blocks if name in layer.baft_gate]
    with _hooked([*sources, *gates], record):
        yield seen


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Call `hook` after each forward of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
