"""WISE: edits in a copy of one down projection; each prompt uses the copy or the original (arXiv 2405.14768).

    y = W' x  where |act(W' x) - act(W x)|, averaged over the prompt's tokens, is large enough, else  y = W x

W' differs from W only at random entries. An edit is learned after model-generated prefixes, together with one
unrelated text, so that this distance is large for the edit and small for the unrelated text. After a number
of edits, W' is stored as a shard and a new one is started; after several shards, they are merged with TIES. A
prompt is answered by the shard with the largest distance, if that exceeds a fraction of the smallest distance
of the shard's own edits.

Deliberate differences from EasyEdit: the distance is averaged only over the prompt's tokens, so that it does
not depend on whether an answer is given or decoded, and the decision is made once per prompt, row by row;
labels begin with the answer, where EasyEdit's begin one token early; weight decay applies to the change of
the trained entries, where EasyEdit's shrinks all of W'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from peft_baft.adapter.blocks import text_config
from peft_baft.data.cases import Edit, Unrelated
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import CURSOR, EditResult
from peft_baft.editing.train import STOP_TERM, DescentConfig, Terms
from peft_baft_bench.methods.in_place import minimise, stop_when_settled
from peft_baft_bench.methods.locating import cached_prefixes, with_prefixes
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection, weight_of
from peft_baft_bench.methods.prompts import ProjectionEditor, mean_over
from peft_baft_bench.methods.validation import (
    require_fraction,
    require_integer,
    require_layer,
    require_non_negative,
)

EASYEDIT_BLOCK = 27  # of a model of 32, counted from 0
PREFIX_TOKENS = (5, 10)
NO_SHARD = -1
COUNT = f"{CURSOR}edits"


@dataclass(frozen=True)
class Wise(MethodSettings):
    """Learn edits in a copy of one down projection (WISE), by default with EasyEdit's settings for Llama-2.

    Args:
        mask_share: the fraction of the changeable entries that one shard changes.
        subset: the fraction of all entries that may be changed; 1/8 is the BaFT paper's "WISE light".
        near, far, gap: α, β and γ: distances of unrelated text should be below `near`, those of the edit
            above `far`, and their difference above `gap`.
        threshold: a prompt is answered by a shard if its distance exceeds this fraction of the smallest one
            of the shard's edits.
        largest_change: bound on the change of each entry.
        edits_a_shard: the number of edits per shard.
        shards_a_merge: the number of shards that are merged together.
        density: the fraction of a shard's largest changes that TIES keeps.
        layer: the block whose down projection is copied, counted from 0; by default EasyEdit's 27 of 32,
            scaled to the model.
        contexts: how many model-generated texts of 5 and of 10 tokens are used as prefixes of the prompt; 0
            for none.
        descent: how an edit is learned, by plain gradient descent.

    Raises:
        TypeError: layer is not an integer.
        ValueError: a value is out of range.
    """

    mask_share: float = 0.2
    subset: float = 1.0
    near: float = 5.0
    far: float = 20.0
    gap: float = 10.0
    threshold: float = 0.88
    largest_change: float = 1.0
    edits_a_shard: int = 500
    shards_a_merge: int = 2
    density: float = 0.53
    layer: int | None = None
    contexts: int = 5
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(
            lr=1.0, max_steps=70, stop_loss=0.02, weight_decay=1e-5
        )
    )

    def __post_init__(self) -> None:
        require_layer(self.layer, "wise")
        for name in ("mask_share", "subset", "density"):
            require_fraction(f"wise: {name}", getattr(self, name))
        for name in ("near", "far", "gap", "threshold", "largest_change"):
            require_non_negative(f"wise: {name}", getattr(self, name))
        for name, least in (("edits_a_shard", 1), ("shards_a_merge", 2), ("contexts", 0)):
            require_integer(f"wise: {name}", getattr(self, name), least)

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> WiseEditor:
        """Create an editor of `base`. Each edit uses one unrelated text, from the setup or else the package."""
        return WiseEditor(base, tokenizer, self, setup or EditorSetup())


class Shard(NamedTuple):
    """A change of some entries of a weight.

    Attributes:
        places: indices into the flattened weight, (n,).
        values: the changes, (n,).
        smallest: the smallest distance of the shard's edits.
    """

    places: Tensor
    values: Tensor
    smallest: float


class WiseEditor(ProjectionEditor):
    """Learns edits in a copy of one weight; an `Editor`.

    Raises:
        ValueError: the block does not exist, is quantised, or does not have exactly one down projection with
            a known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Wise,
        setup: EditorSetup,
    ) -> None:
        name = down_projection(model, settings.layer, EASYEDIT_BLOCK, "wise")
        super().__init__(model, tokenizer, setup.template, name)
        self.settings, self._seed = settings, setup.seed
        self._unrelated: Sequence[Unrelated] = setup.unrelated or GENERAL
        self._weight = weight_of(self._projection)
        self._bias = getattr(self._projection, "bias", None)
        self._act = ACT2FN[_activation(model)]
        lengths = tuple((tokens, settings.contexts) for tokens in PREFIX_TOKENS)
        self._prefixes = cached_prefixes(model, tokenizer, lengths, setup.prepared or EditCache())
        self._edits = 0
        self._closed: list[Shard] = []
        self._open = self._new_shard(0)
        self._copies: list[Tensor] | None = None  # full weights of the shards, closed ones first
        self._learning: Tensor | None = None  # the full weight during training
        self._distances = torch.zeros(0)  # (rows,) of the last forward during training
        self._attach()

    def _new_shard(self, number: int) -> Shard:
        """Draw the entries that a shard changes; they depend only on the seed and the shard's number."""
        generator, size = torch.Generator().manual_seed(self._seed), self._weight.numel()
        allowed = torch.rand(size, generator=generator) < self.settings.subset
        generator.manual_seed(self._seed * 1_000_003 + number + 1)
        drawn = torch.rand(size, generator=generator) < self.settings.mask_share
        places = (allowed & drawn).nonzero()[:, 0].to(self._weight.device)
        values = torch.zeros(len(places), device=places.device)
        return Shard(places, values, float("inf"))

    def _with(self, places: Tensor, values: Tensor) -> Tensor:
        """Return the full weight of a shard, (d, f)."""
        return self._weight.flatten().index_add(0, places, values).view_as(self._weight)

    def _learn(self, fact: Edit) -> EditResult:
        """Learn one fact in the open shard, together with one unrelated text."""
        other = self._unrelated[self._edits % len(self._unrelated)]
        rows = [
            self._encode(text, fact.target) for text in with_prefixes(fact.prompt, self._prefixes)
        ]
        texts = self._training_texts([*rows, self._encode(other.prompt, other.answer)])
        settings, descent, places = self.settings, self.settings.descent, self._open.places
        values = nn.Parameter(self._open.values.clone())

        def terms() -> Terms:
            self._learning = self._with(places, values)
            losses = texts.losses()[:-1]
            near, far = self._distances[-1:], self._distances[:-1]
            return {
                STOP_TERM: torch.stack([row_losses.mean() for row_losses in losses]).mean(),
                "near": positive_mean(near - settings.near),
                "far": positive_mean(settings.far - far),
                "gap": positive_mean(near - far + settings.gap),
            }

        def bound() -> None:
            values.clamp_(-settings.largest_change, settings.largest_change)

        try:
            result = minimise(
                torch.optim.SGD([values], lr=descent.lr, weight_decay=descent.weight_decay),
                terms,
                descent.max_steps,
                stop_when_settled(descent.stop_loss),
                learned_below=2 * descent.stop_loss,
                clip_norm=descent.clip_norm,
                after_step=bound,
            )
        finally:
            self._learning = None
        smallest = min(self._open.smallest, self._distances[:-1].mean().item())
        self._open, self._copies = Shard(places, values.detach(), smallest), None
        self._edits += 1
        self._close_and_merge()
        return result

    def _close_and_merge(self) -> None:
        """Close the open shard if it is full, and merge closed shards if there are enough."""
        settings = self.settings
        if self._edits % settings.edits_a_shard:
            return
        closed = [*self._closed, self._open]
        if self._edits % (settings.edits_a_shard * settings.shards_a_merge) == 0:
            merged = merge(
                closed[-settings.shards_a_merge :], settings.density, self._weight.numel()
            )
            closed = [*closed[: -settings.shards_a_merge], merged]
        self._closed, self._copies = closed, None
        self._open = self._new_shard(self._edits // settings.edits_a_shard)

    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """Replace the projection's output in each row by that of the shard that answers it."""
        if self._learning is not None:
            changed = self._output(hidden, self._learning)
            prompts = self._tracker.prompt_mask(output.device)
            self._distances = self._distance(changed, output, prompts)
            return changed.to(output.dtype)
        shards = [*self._closed, self._open]
        if all(shard.smallest == float("inf") for shard in shards):
            return None
        if self._copies is None:
            self._copies = [self._with(shard.places, shard.values) for shard in shards]
        outputs = [self._output(hidden, copy) for copy in self._copies]

        def decide(prompts: Tensor) -> Tensor:
            distances = torch.stack([self._distance(one, output, prompts) for one in outputs])
            least = self.settings.threshold * torch.tensor([s.smallest for s in shards])
            above = distances > least.to(distances.device)[:, None]
            largest, shard = distances.masked_fill(~above, -1.0).max(0)
            return torch.where(largest >= 0, shard, NO_SHARD)

        chosen = self._tracker.decide_once(decide, output.device)
        for number, changed in enumerate(outputs):
            selected = (chosen == number)[:, None, None]
            output = torch.where(selected, changed.to(output.dtype), output)
        return output

    def _output(self, hidden: Tensor, weight: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias.float()
        return F.linear(hidden.float(), weight, bias)

    def _distance(self, changed: Tensor, output: Tensor, prompts: Tensor) -> Tensor:
        """Average the distance between changed and original activations over each prompt's tokens, (rows,)."""
        distance = (self._act(changed) - self._act(output.float())).norm(dim=-1, keepdim=True)
        return mean_over(distance, prompts)[:, 0]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the changes of all shards, their smallest distances, and the number of edits.

        The entries of the open shard follow from the seed; those of closed shards are included, since merging
        mixes them.
        """
        state = {"open": self._open.values, COUNT: torch.tensor(self._edits)}
        state["smallest"] = torch.tensor([s.smallest for s in (*self._closed, self._open)])
        for number, shard in enumerate(self._closed):
            state[f"closed.{number}.places"] = shard.places.int()
            state[f"closed.{number}.values"] = shard.values
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        device, self._edits = self._weight.device, int(state[COUNT])
        *smallest, smallest_of_open = state["smallest"].tolist()
        self._closed = [
            Shard(
                state[f"closed.{number}.places"].long().to(device),
                state[f"closed.{number}.values"].to(device),
                value,
            )
            for number, value in enumerate(smallest)
        ]
        places = self._new_shard(self._edits // self.settings.edits_a_shard).places
        self._open, self._copies = Shard(places, state["open"].to(device), smallest_of_open), None


def merge(shards: Sequence[Shard], density: float, size: int) -> Shard:
    """Merge shards with TIES (arXiv 2306.01708).

    Only the largest changes of each shard are kept; those with the prevailing sign are averaged.

    Args:
        density: the maximum fraction of all `size` entries of the weight that each shard keeps.
    """
    device = shards[0].places.device
    total, votes = torch.zeros(size, device=device), []
    for shard in shards:
        count = min(len(shard.values), round(density * size))
        order = shard.values.abs().topk(count).indices
        votes.append((shard.places[order], shard.values[order]))
        total.index_add_(0, *votes[-1])
    sign = torch.where(total >= 0, 1.0, -1.0)
    sums, counts = torch.zeros_like(total), torch.zeros_like(total)
    for places, values in votes:
        agrees = values.sign() == sign[places]
        sums.index_add_(0, places[agrees], values[agrees])
        counts.index_add_(0, places[agrees], torch.ones_like(values[agrees]))
    places = counts.nonzero()[:, 0]
    smallest = min(shard.smallest for shard in shards)
    return Shard(places, sums[places] / counts[places], smallest)


def positive_mean(values: Tensor) -> Tensor:
    """Average the positive values; 0 if there are none."""
    positive = values.clamp(min=0.0)
    return positive.sum() / (values > 0).sum().clamp(min=1)


def _activation(model: PreTrainedModel) -> str:
    """Return the name of the activation function of the model's MLPs."""
    config = text_config(model)
    for name in ("hidden_act", "activation_function", "hidden_activation"):
        if isinstance(getattr(config, name, None), str):
            return str(getattr(config, name))
    raise ValueError(f"wise: the config of {type(model).__name__} does not name its activation.")
