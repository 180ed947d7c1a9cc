"""Combine adapters of the same blocks into one, exactly, by concatenating the rows of their bases, updates and gates.

Adapters that are active together add their updates of the same hidden vector:

    h + Σᵢ λᵢ Rᵢᵀ Wᵢ(h) (Dᵢ h + bᵢ)  =  h + Rᵀ W(h) (D h + b)

where R, D, b and the gates W have the rows of all adapters, D and b scaled by λᵢ: one pass of rank Σ rᵢ. The rows of R are
orthonormal within each adapter only, which is all that the formula requires.
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

SHARED_SETTINGS = (
    "prompt_positions",
    "answer_positions",
    "weighting",
    "gate_norm",
    "gate_bias",
    "gate_offset",
)
INSTEAD = "Make them active together instead: model.base_model.set_adapter([...])."


def combined_config(configs: Sequence[BaftConfig]) -> BaftConfig:
    """Return the config of the combination.

    Raises:
        ValueError: the adapters differ in a setting that an adapter has only once, or have gates that cannot be concatenated.
    """
    first = configs[0]
    if any(config.kind is not PLAIN for config in configs):
        raise ValueError(
            f"add_weighted_adapter combines plain BaFT adapters. For other kinds: {INSTEAD}"
        )
    for name in SHARED_SETTINGS:
        values = {getattr(config, name) for config in configs}
        if len(values) > 1:
            raise ValueError(
                f"Adapters can be combined if they agree in {name}; these have {sorted(map(str, values))}. {INSTEAD}"
            )
    learned = GATE_NORMS[first.gate_norm].learned_vectors
    if first.weighting not in ("basis", "none") or (first.gate_count and learned):
        raise ValueError(
            f"Adapters with weighting={first.weighting!r} and gate_norm={first.gate_norm!r} cannot be combined: each has a gate "
            f"for all of its rows, or a learned vector for the input of its gates. {INSTEAD}"
        )
    if len({tuple(sorted(config.target_modules or ())) for config in configs}) > 1:
        raise ValueError("Adapters can be combined if they edit the same blocks; these do not.")
    if any(config.modules_to_save for config in configs):
        raise ValueError(
            "An adapter that saves modules of the model (modules_to_save) cannot be combined."
        )
    ranks: list[int] = []
    for config in configs:
        ranks += config.pack_ranks or [config.r]
    formats = {config.template for config in configs}
    template = "both" if None not in formats else None
    hashes = {config.template_hash for config in configs if config.template_hash}
    return replace(
        first,
        r=sum(ranks),
        pack_ranks=ranks,
        baft_format=None,
        peft_version=None,
        template=formats.pop() if len(formats) == 1 else template,
        template_hash=hashes.pop() if len(hashes) == 1 else None,
    )


@torch.no_grad()
def fill_combined(
    layer: BaftLayer, adapters: Sequence[str], weights: Sequence[float], name: str
) -> None:
    """Write the rows of some adapters of a block into another one, which has the sum of their ranks."""
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
    """Join the statistics of gates, (k + 1,) each: sums of gates over edited tokens, and the number of these tokens.

    The combination counts the tokens of all adapters; each gate keeps its mean.
    """
    total = torch.stack([usage[-1] for usage in usages]).sum()
    means = [usage[:-1] / usage[-1].clamp(min=1) for usage in usages]
    return torch.cat([torch.cat(means) * total, total[None]])
