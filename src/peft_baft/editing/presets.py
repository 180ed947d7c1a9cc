"""Settings by name: the package's defaults, and the paper's values for its three models (Table 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_baft.editing.objective import Objective
from peft_baft.editing.scope import NARROW, Scope
from peft_baft.editing.train import DescentConfig

# The paper prints 9;18;24;28. These count from 1, since Gemma has 28 blocks.
PAPER_LAYERS = [8, 17, 23, 27]


@dataclass(frozen=True)
class Preset:
    """Arguments of `BaftConfig(**config)` and of `BaftEditor(objective=..., descent=..., batch_descent=..., scope=...)`."""

    config: dict[str, Any] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)
    descent: DescentConfig = field(default_factory=DescentConfig)
    batch_descent: DescentConfig = field(default_factory=lambda: DescentConfig(max_steps=70))
    scope: Scope = NARROW


def _paper(alpha: float, beta: float, gamma: float) -> Preset:
    """Return a preset with the paper's values.

    The learning rate for single and continual editing is illegible in Table 5; 5e-4 is our choice.
    """
    return Preset(
        config={"r": 12, "prompt_positions": 3, "layers_to_transform": PAPER_LAYERS},
        objective=Objective(alpha=alpha, beta=beta, gamma=gamma),
        descent=DescentConfig(lr=5e-4, max_steps=40, stop_loss=0.01, learn_end=False),
        batch_descent=DescentConfig(lr=1e-4, max_steps=70, stop_loss=0.01, learn_end=False),
    )


# The defaults of an editor: a fact works in chats, in contexts and in other words, and does not affect its neighbours.
# Tuned on rows 900-1036 of ZsRE; see docs/log.md.
DEFAULT = Preset(
    descent=DescentConfig(lr=8e-3, max_steps=60, learn_end=True),
    batch_descent=DescentConfig(lr=8e-3, max_steps=70, learn_end=True),
    scope=Scope(),
)

PRESETS = {
    "default": DEFAULT,
    "plain": Preset(),  # only the fact as it is written, as in the paper
    "llama-2-7b": _paper(0.01, 0.05, 0.02),
    "llama-3-8b": _paper(0.01, 0.1, 0.05),
    "gemma-7b": _paper(0.01, 0.1, 0.05),  # the last digit of γ is cut off in Table 5
}


def find_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; known are {', '.join(PRESETS)}.")
    return PRESETS[name]
