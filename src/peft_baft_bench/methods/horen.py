"""HoReN: a codebook of unit keys at one down projection, read through one Hopfield step (arXiv 2605.08143).

The query is the normalised mean of the projection's input over the last half of the prompt, moved towards
similar keys. It matches the key with the largest cosine, if that is above a threshold. The entry's value is
added to the projection's output at the last prompt token; all other prompts give the output of the unedited
model.

    q ← unit(.9 q + .1 unit(softmax(20 q Kᵀ) K))

Deliberate differences: an edit shares the entry of an earlier one if their answers are equal, where the
authors compare the mean of the answers' token ids; values are initialised with zeros, which the paper leaves
open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.cases import Edit
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import STOP_TERM, DescentConfig, Terms
from peft_baft.evaluation.forward import answer_ids
from peft_baft_bench.methods.grace import NO_TOKEN, append_answer
from peft_baft_bench.methods.in_place import minimise, stop_below
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection, weight_of
from peft_baft_bench.methods.prompts import ProjectionEditor, mean_over
from peft_baft_bench.methods.validation import require_layer

PUBLISHED_BLOCK = 29  # of a model of 32, counted from 0
SHARPNESS, PULL = 20.0, 0.1  # of the Hopfield step
NO_ENTRY = 0  # the entry of prompts that match no edit


@dataclass(frozen=True)
class Horen(MethodSettings):
    """Store edits in a codebook of unit keys (HoReN), by default with its settings for Llama-3.

    Args:
        threshold: a prompt matches if the cosine of its query and a key is above this.
        layer: the block whose down projection has the codebook, counted from 0; by default 29 of 32, scaled
            to the model.
        descent: how the value of an entry is learned, by Adam.

    Raises:
        TypeError: layer is not an integer.
        ValueError: the threshold is not between -1 and 1.
    """

    threshold: float = 0.85
    layer: int | None = None
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(lr=1.0, max_steps=50, weight_decay=0.0)
    )

    def __post_init__(self) -> None:
        require_layer(self.layer, "horen")
        if not -1 < self.threshold < 1:
            raise ValueError(
                f"horen: threshold must lie between -1 and 1, not be {self.threshold!r}."
            )

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> HorenEditor:
        """Create an editor of `base`, without unrelated text; the setup's seed determines the key of entry 0."""
        return HorenEditor(base, tokenizer, self, setup or EditorSetup())


class HorenEditor(ProjectionEditor):
    """Edits a model with a codebook of unit keys; an `Editor`.

    Raises:
        ValueError: the block does not exist, is quantised, or does not have exactly one down projection with
            a known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Horen,
        setup: EditorSetup,
    ) -> None:
        name = down_projection(model, settings.layer, PUBLISHED_BLOCK, "horen")
        super().__init__(model, tokenizer, setup.template, name)
        self.settings, device = settings, self._device
        out, into = weight_of(self._projection).shape
        generator = torch.Generator().manual_seed(setup.seed)
        # Entry 0 represents no edit: its key is random and its value zero.
        self._keys = F.normalize(torch.randn(1, into, generator=generator), dim=1).to(device)
        self._values = torch.zeros(1, out, device=device)
        self._answers = torch.zeros(1, 0, dtype=torch.long, device=device)
        self._queries = torch.zeros(0)  # of the last forward that contained prompts
        self._value: Tensor | None = None  # during training
        self._attach()

    def _learn(self, fact: Edit) -> EditResult:
        """Find or create the entry for one fact, and learn the entry's value."""
        row = self._encode(fact.prompt, fact.target, end=self.settings.descent.learn_end)
        texts = self._training_texts([row])
        with torch.no_grad():
            texts.losses()
        answer = answer_ids(row).to(self._keys.device)
        entry = int(self.matches(self._queries)[0])
        known_answer = self._answers[entry]
        if entry == NO_ENTRY or not torch.equal(known_answer[known_answer != NO_TOKEN], answer):
            entry = len(self._keys)
            self._keys = torch.cat([self._keys, self._queries[:1]])
            self._values = torch.cat([self._values, torch.zeros_like(self._values[:1])])
            self._answers = append_answer(self._answers, answer)
        value, descent = nn.Parameter(self._values[entry].clone()), self.settings.descent

        def terms() -> Terms:
            return {STOP_TERM: texts.loss()}

        self._value = value
        try:
            result = minimise(
                torch.optim.Adam([value], lr=descent.lr, weight_decay=descent.weight_decay),
                terms,
                descent.max_steps,
                stop_below(descent.stop_loss),
                learned_below=descent.stop_loss,
                clip_norm=descent.clip_norm,
            )
        finally:
            self._value = None
        number = torch.tensor([entry], device=value.device)
        self._values = self._values.index_copy(0, number, value.detach()[None])
        return result

    def matches(self, queries: Tensor) -> Tensor:
        """Find the entry of each query (n, f), (n,); `NO_ENTRY` where no cosine is above the threshold."""
        weights = (SHARPNESS * queries @ self._keys.mT).softmax(1)
        pulled = F.normalize(
            (1 - PULL) * queries + PULL * F.normalize(weights @ self._keys, dim=1), dim=1
        )
        cosine, entry = (pulled @ self._keys.mT).max(1)
        return torch.where(cosine > self.settings.threshold, entry, NO_ENTRY)

    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """Add the values of matching entries to the projection's output at the prompts' last tokens."""
        ends = self._tracker.end_mask(output.device)
        if not ends.any():
            return None
        if self._value is not None:
            change = self._value.expand(len(output), -1)
        else:
            prompts = self._tracker.prompt_mask(output.device)
            self._queries = F.normalize(mean_over(hidden, _last_half(prompts)), dim=1)
            entries = self.matches(self._queries)
            if not entries.any():
                return None
            change = self._values[entries] * ends.any(1)[:, None]
        return output + (ends[..., None] * change[:, None]).to(output.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the codebook: keys, values and answers, one row per entry; the first one represents no edit."""
        return {"keys": self._keys, "values": self._values, "answers": self._answers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        device = self._keys.device
        self._keys, self._values = state["keys"].to(device), state["values"].to(device)
        self._answers = state["answers"].to(device)


def _last_half(prompts: Tensor) -> Tensor:
    """Mark the last half of each prompt's tokens, rounded up; (rows, tokens) bool like `prompts`."""
    # The number of prompt tokens from each token to the end, itself included.
    remaining = prompts.flip(1).cumsum(1).flip(1)
    return prompts & (2 * remaining <= prompts.sum(1, keepdim=True) + 1)
