"""HoReN: a codebook of unit keys at one down projection, read through one Hopfield step (arXiv 2605.08143).

The query is the unit mean of what enters the projection over the last half of the prompt, moved towards the keys that it is
like, and matches the key of the largest cosine if that is above a threshold. The entry's value is added to what leaves the
projection at the last prompt token; every other prompt is computed as without edits.

    q ← unit(.9 q + .1 unit(softmax(20 q Kᵀ) K))

Differences on purpose: an edit shares the entry of an earlier one where their answers are equal, where the authors compare the
mean of the answers' token ids; entries begin at zero, which the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_baft.data.cases import Edit
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import STOP_TERM, DescentConfig, Terms
from peft_baft.evaluation.forward import answer_ids
from peft_baft_bench.methods.grace import NO_TOKEN, with_answer
from peft_baft_bench.methods.in_place import below, minimise
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection, require_layer, weight_of
from peft_baft_bench.methods.prompts import ProjectionEditor, mean_over

PUBLISHED_BLOCK = 29  # of a model of 32, counted from 0
SHARPNESS, PULL = 20.0, 0.1  # of the Hopfield step
NOTHING = 0  # the entry of prompts that match no edit


@dataclass(frozen=True)
class Horen(MethodSettings):
    """Keep edits in a codebook of unit keys (HoReN), by default with its settings for Llama-3.

    Args:
        threshold: a prompt matches if its query's cosine with a key is above this.
        layer: block whose down projection has the codebook, counted from 0; by default 29 of 32 scaled to the model.
        descent: how the value of an entry is learned, by Adam.

    Raises:
        TypeError: layer is no integer. ValueError: the threshold is no cosine.
    """

    threshold: float = 0.85
    layer: int | None = None
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(lr=1.0, max_steps=50, weight_decay=0.0)
    )

    def __post_init__(self) -> None:
        require_layer(self.layer, "horen")
        if not -1 < self.threshold < 1:
            raise ValueError(f"horen: threshold must lie in -1 … 1, not be {self.threshold!r}.")

    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> HorenEditor:
        """Make an editor of `base`, which takes no unrelated text; the setup's seed makes the key that stands for none."""
        return HorenEditor(base, tokenizer, self, setup or EditorSetup())


class HorenEditor(ProjectionEditor):
    """Edits a model by a codebook of unit keys; an `Editor`.

    Raises:
        ValueError: the block does not exist, has not one down projection under a known name, or a quantised one.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Horen, setup: EditorSetup) -> None:
        name = down_projection(model, settings.layer, PUBLISHED_BLOCK, "horen")
        super().__init__(model, tokenizer, setup.template, name)
        self.settings, device = settings, self._device
        out, into = weight_of(self._projection).shape
        generator = torch.Generator().manual_seed(setup.seed)
        # Entry 0 stands for no edit: a random key and no change.
        self._keys = F.normalize(torch.randn(1, into, generator=generator), dim=1).to(device)
        self._values = torch.zeros(1, out, device=device)
        self._answers = torch.zeros(1, 0, dtype=torch.long, device=device)
        self._queries = torch.zeros(0)  # of the last forward that read prompts
        self._value: Tensor | None = None  # that is learned
        self._attach()

    def _learn(self, fact: Edit) -> EditResult:
        """Give one fact an entry, or the one that it shares, and learn the entry's value."""
        row = self._encode(fact.prompt, fact.target, end=self.settings.descent.learn_end)
        taught = self._taught([row])
        with torch.no_grad():
            taught.losses()
        answer = answer_ids(row).to(self._keys.device)
        entry = int(self.matches(self._queries)[0])
        its_answer = self._answers[entry]
        if entry == NOTHING or not torch.equal(its_answer[its_answer != NO_TOKEN], answer):
            entry = len(self._keys)
            self._keys = torch.cat([self._keys, self._queries[:1]])
            self._values = torch.cat([self._values, torch.zeros_like(self._values[:1])])
            self._answers = with_answer(self._answers, answer)
        value, descent = nn.Parameter(self._values[entry].clone()), self.settings.descent

        def terms() -> Terms:
            return {STOP_TERM: taught.loss()}

        self._value = value
        try:
            result = minimise(
                torch.optim.Adam([value], lr=descent.lr, weight_decay=descent.weight_decay),
                terms,
                descent.max_steps,
                below(descent.stop_loss),
                learned_below=descent.stop_loss,
                clip_norm=descent.clip_norm,
            )
        finally:
            self._value = None
        number = torch.tensor([entry], device=value.device)
        self._values = self._values.index_copy(0, number, value.detach()[None])
        return result

    def matches(self, queries: Tensor) -> Tensor:
        """Find the entry of each query (n, f), (n,); `NOTHING` where no cosine is above the threshold."""
        weights = (SHARPNESS * queries @ self._keys.mT).softmax(1)
        pulled = F.normalize(
            (1 - PULL) * queries + PULL * F.normalize(weights @ self._keys, dim=1), dim=1
        )
        cosine, entry = (pulled @ self._keys.mT).max(1)
        return torch.where(cosine > self.settings.threshold, entry, NOTHING)

    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """After the projection: add the values of matching entries where the prompts' last tokens are."""
        ends = self._watch.ends(output.device)
        if not ends.any():
            return None
        if self._value is not None:
            change = self._value.expand(len(output), -1)
        else:
            prompts = self._watch.prompts(output.device)
            self._queries = F.normalize(mean_over(hidden, _last_half(prompts)), dim=1)
            entries = self.matches(self._queries)
            if not entries.any():
                return None
            change = self._values[entries] * ends.any(1)[:, None]
        return output + (ends[..., None] * change[:, None]).to(output.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the codebook: keys, values and answers, one row an entry; the first stands for none."""
        return {"keys": self._keys, "values": self._values, "answers": self._answers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        device = self._keys.device
        self._keys, self._values = state["keys"].to(device), state["values"].to(device)
        self._answers = state["answers"].to(device)


def _last_half(prompts: Tensor) -> Tensor:
    """Mark the last half of each prompt's tokens, rounded up: (rows, tokens) bool of the like."""
    behind = (
        prompts.flip(1).cumsum(1).flip(1)
    )  # how many of the prompt's tokens follow, itself included
    return prompts & (2 * behind <= prompts.sum(1, keepdim=True) + 1)
