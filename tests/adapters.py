"""Small adapted models, and what is left of an adapter: shared by the tests of the PEFT side."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from conftest import make_model, randomise
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft.intervention import update


def intervene(h: Tensor, R: Tensor, A: Tensor, b: Tensor, w: Tensor | None = None) -> Tensor:
    """Φ(h) = h + Rᵀ diag(w) (A h + b - R h), Eq. 3 as it is printed; Eq. 1 (ReFT) where w is None.

    Args:
        h: (..., d); R: (r, d) orthonormal rows; A: (r, d); b: (r,); w: (..., r) or (..., 1) gates.
    """
    return h + update(torch.nn.functional.linear(h, A - R, b), R, w)


def config(**settings: Any) -> BaftConfig:
    return BaftConfig(**{"r": 4, "gate_offset": 0.0, "task_type": "CAUSAL_LM", **settings})


def edited_model(seed: int = 1, **settings: Any) -> PeftModel:
    model = get_peft_model(make_model(), config(**settings)).eval()
    randomise(model, seed=seed)
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def is_bare(model: torch.nn.Module) -> bool:
    """Nothing of an adapter is left on the model."""
    hooks = [
        *(
            h
            for m in model.modules()
            for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        )
    ]
    ours = [h for h in hooks if "peft_baft" in getattr(h, "__module__", "")]
    return not baft_layers(model) and not ours and "generate" not in model.__dict__
