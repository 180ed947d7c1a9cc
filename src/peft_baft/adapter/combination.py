"""Combine adapters of the same blocks into one, exactly: their bases, updates and gates stand one below the other.

Adapters that are active together add up what each one does to the same hidden vector:

    h + Σᵢ λᵢ Rᵢᵀ Wᵢ(h) (Dᵢ h + bᵢ)  =  h + Rᵀ W(h) (D h + b)

where R, D, b and the gates W hold the rows of all, D and b scaled by λᵢ. This is one pass of rank Σ rᵢ. The rows of R
are orthonormal within each adapter alone, which the formula does not ask of different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.layer import BaftLayer
from peft_baft.adapter.parameters import GATE_NORMS
from peft_baft.adapter.plain import PLAIN


def combined_config(configs: Sequence[BaftConfig]) -> BaftConfig:
    """Make the config of a combination.

    Raises:
        ValueError: the adapters differ in what one adapter has once, or have gates that cannot stand below each other.
    """
    first = configs[0]
    if any(config.kind is not PLAIN for config in configs):
        raise ValueError(
            "add_weighted_adapter combines plain BaFT adapters. Make adapters of other kinds active together instead: "
            "model.base_model.set_adapter([...])."
        )
    for name in (
        "prompt_positions",
        "answer_positions",
        "weighting",
        "gate_norm",
        "gate_bias",
        "gate_offset",
    ):
        values = {getattr(config, name) for config in configs}
        if len(values) > 1:
            raise ValueError(
                f"Adapters can be combined where they agree in {name}; these have {sorted(map(str, values))}. Make them active "
                "together instead: model.base_model.set_adapter([...])."
            )
    learned = GATE_NORMS[first.gate_norm].learned_vectors
    if first.weighting not in ("basis", "none") or (first.gate_count and learned):
        raise ValueError(
            f"Adapters with weighting={first.weighting!r} and gate_norm={first.gate_norm!r} cannot be combined: each has gates "
            "that weigh its own rows alike, or vectors of its own that its gates look at. Make them active together instead: "
            "model.base_model.set_adapter([...])."
        )
    if len({tuple(sorted(config.target_modules or ())) for config in configs}) > 1:
        raise ValueError("Adapters can be combined where they edit the same blocks; these do not.")
    if any(config.modules_to_save for config in configs):
        raise ValueError(
            "An adapter that saves modules of the model (modules_to_save) cannot be combined."
        )
    ranks: list[int] = []
    for config in configs:
        ranks += config.pack_ranks or [config.r]
    forms = {config.template for config in configs}
    hashes = {config.template_hash for config in configs if config.template_hash}
    return replace(
        first,
        r=sum(ranks),
        pack_ranks=ranks,
        baft_format=None,
        peft_version=None,
        template=forms.pop() if len(forms) == 1 else None if None in forms else "both",
        template_hash=hashes.pop() if len(hashes) == 1 else None,
    )


@torch.no_grad()
def fill_combined(
    layer: BaftLayer, adapters: Sequence[str], weights: Sequence[float], name: str
) -> None:
    """Write the rows of some adapters of a block into another one, which has room for them."""
    bases, sources = layer.baft_basis, layer.baft_source
    scaled = list(zip(weights, _modules(sources, adapters), strict=True))
    new_basis, new_source = _modules(bases, [name])[0], _modules(sources, [name])[0]
    _write(new_basis.weight, [basis.weight for basis in _modules(bases, adapters)])
    _write(new_source.weight, [weight * source.weight for weight, source in scaled])
    _write(new_source.bias, [weight * source.bias for weight, source in scaled])
    if name not in layer.baft_gate:
        return
    gates, (new_gate,) = _modules(layer.baft_gate, adapters), _modules(layer.baft_gate, [name])
    _write(new_gate.weight, [gate.weight for gate in gates])
    if new_gate.bias is not None:
        _write(new_gate.bias, [gate.bias for gate in gates])
    layer.baft_gate_usage[name] = _joined_usage([layer.baft_gate_usage[a] for a in adapters])


def _modules(container: nn.ModuleDict, names: Sequence[str]) -> list[Any]:
    return [container[name] for name in names]


def _write(target: Tensor, parts: Sequence[Tensor]) -> None:
    target.copy_(torch.cat(list(parts)))


def _joined_usage(usages: Sequence[Tensor]) -> Tensor:
    """Join the statistics of gates, (k + 1,) each: sums of gates over edited tokens, and the number of these.

    The combination counts the tokens of all; each gate keeps the mean that it had over its own.
    """
    total = torch.stack([usage[-1] for usage in usages]).sum()
    means = [usage[:-1] / usage[-1].clamp(min=1) for usage in usages]
    return torch.cat([torch.cat(means) * total, total[None]])
