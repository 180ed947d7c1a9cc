"""MELO: a pool of LoRAs, and clusters of prompts that select one (arXiv 2312.11795), as EasyEdit runs it.

The output of one block's up projection at the last prompt token is compared with the clusters. Within the
radius of a cluster, the LoRA of its nearest edit is applied; all other prompts give the output of the
unedited model. Clusters grow, shrink and split like GRACE's entries.

Deliberate differences from EasyEdit: answers are compared, where it compares the sum of their token ids; the
query is taken at the last prompt token, where it uses the last column of the batch. The published settings
are for GPT-2 XL; block numbers are scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter.blocks import blocks_before
from peft_baft.adapter.state import frozen
from peft_baft.data.batching import Tokens
from peft_baft.data.cases import Edit
from peft_baft.editing.editor import EditResult, checked_edits, combine_results, encode_edits
from peft_baft.editing.module_patches import FixedBlocks
from peft_baft.editing.train import STOP_TERM, DescentConfig, Terms
from peft_baft.evaluation.forward import answer_ids
from peft_baft_bench.methods.grace import GAP, NO_TOKEN, append_answer, distances
from peft_baft_bench.methods.in_place import minimise, stop_below
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import scale_block, up_projection, weight_of
from peft_baft_bench.methods.prompts import PromptTracker, TrainingTexts
from peft_baft_bench.methods.validation import require_integer, require_layer, require_positive

PUBLISHED_BLOCK, PUBLISHED_DEPTH = 35, 48  # of GPT-2 XL, counted from 0
ADAPTED = 2  # blocks with LoRAs, directly after the query block
HALVED_EVERY = 20  # steps between halvings of the learning rate
NO_LORA = -1


@dataclass(frozen=True)
class Melo(MethodSettings):
    """Store edits in a pool of LoRAs (MELO), by default with its settings for GPT-2 XL.

    Args:
        rank: the rank of one LoRA.
        scaling: the factor of a LoRA's output; by default the number of LoRAs in the published pool, 350.
        edits_a_lora: how many edits of a batch share a LoRA.
        radius: the radius of a new cluster (Euclidean distance).
        layer: the block whose output is the query, counted from 0; the two blocks after it have LoRAs. By
            default 35 of 48, scaled to the model.
        descent: how a LoRA is learned, by Adam with a learning rate that is halved every 20 steps.

    Raises:
        TypeError, ValueError: a value is invalid.
    """

    rank: int = 2
    scaling: float = 350.0
    edits_a_lora: int = 4
    radius: float = 0.5
    layer: int | None = None
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(
            lr=1e-3, max_steps=50, stop_loss=0.01, weight_decay=0.0
        )
    )

    def __post_init__(self) -> None:
        for name in ("rank", "edits_a_lora"):
            require_integer(f"melo: {name}", getattr(self, name), 1)
        for name in ("scaling", "radius"):
            require_positive(f"melo: {name}", getattr(self, name))
        require_layer(self.layer, "melo")

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> MeloEditor:
        """Create an editor of `base`. Unrelated text is not used; LoRAs are initialised randomly with the setup's seed."""
        return MeloEditor(base, tokenizer, self, setup or EditorSetup())


class MeloEditor:
    """Edits a model with a pool of LoRAs; an `Editor`. The edits of a batch share LoRAs.

    Raises:
        ValueError: a block does not exist, is quantised, or does not have exactly one up projection with a
            known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Melo,
        setup: EditorSetup,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._template, self._seed = setup.template, setup.seed
        layer = settings.layer
        if layer is None:
            layer = scale_block(model, PUBLISHED_BLOCK, PUBLISHED_DEPTH, blocks_after=ADAPTED)
        self._name = up_projection(model, layer, "melo")
        adapted = [up_projection(model, layer + 1 + i, "melo") for i in range(ADAPTED)]
        query_module = model.get_submodule(self._name)
        device = next(query_module.parameters()).device
        # For each adapted module, (LoRAs, rank, inputs) and (LoRAs, outputs, rank).
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        for name in adapted:
            out, into = weight_of(model.get_submodule(name)).shape
            self._a[name] = torch.zeros(0, settings.rank, into, device=device)
            self._b[name] = torch.zeros(0, out, settings.rank, device=device)
        width = len(weight_of(query_module))
        # Clusters: centres (n, f), radii (n,), answers (n, longest). Edits: keys (m, f), clusters (m,), LoRAs (m,).
        self._centres = torch.zeros(0, width, device=device)
        self._radii = torch.zeros(0, device=device)
        self._answers = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._keys = torch.zeros(0, width, device=device)
        self._clusters = torch.zeros(0, dtype=torch.long, device=device)
        self._loras = torch.zeros(0, dtype=torch.long, device=device)
        self._queries = torch.zeros(0)  # of the last forward that contained prompts
        self._learning: dict[str, tuple[Tensor, Tensor]] = {}
        self._chosen: Tensor | None = None
        self._tracker = PromptTracker(model, self._name)
        self._handles = [self._tracker.modify_output(query_module, self._look_up)]
        for name in adapted:
            module = model.get_submodule(name)
            self._handles.append(self._tracker.modify_output(module, self._lora_hook(name)))

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Learn the edits, with a new LoRA for every `edits_a_lora` of them; see `Editor.edit`."""
        facts = encode_edits(
            self.model,
            self.tokenizer,
            checked_edits(edits),
            (self._template,),
            end=self.settings.descent.learn_end,
        )
        rows, step = [forms[0] for forms in facts], self.settings.edits_a_lora
        before = self.state_dict()
        try:
            with frozen(self.model):
                groups = [rows[start : start + step] for start in range(0, len(rows), step)]
                return combine_results([self._learn(group) for group in groups])
        except BaseException:
            self.load_state_dict(before)
            raise

    def _learn(self, rows: list[Tokens]) -> EditResult:
        """Learn some facts in a new LoRA."""
        fixed = FixedBlocks(blocks_before(self.model, self._name))
        texts = TrainingTexts(self.model, self.tokenizer, rows, fixed)
        with torch.no_grad():
            texts.losses()
        number = len(next(iter(self._a.values())))
        for query, row in zip(self._queries, rows, strict=True):
            self._assign_to_cluster(query, answer_ids(row).to(query.device), number)
        pairs = self._new_lora(number)
        parameters = [part for pair in pairs.values() for part in pair]
        descent = self.settings.descent
        optimizer = torch.optim.Adam(parameters, lr=descent.lr, weight_decay=descent.weight_decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, HALVED_EVERY, gamma=0.5)

        def terms() -> Terms:
            return {STOP_TERM: texts.loss()}

        self._learning = pairs
        try:
            result = minimise(
                optimizer,
                terms,
                descent.max_steps,
                stop_below(descent.stop_loss),
                learned_below=descent.stop_loss,
                clip_norm=descent.clip_norm,
                after_step=schedule.step,
            )
        finally:
            self._learning = {}
        for name, (a, b) in pairs.items():
            self._a[name] = torch.cat([self._a[name], a.detach()[None]])
            self._b[name] = torch.cat([self._b[name], b.detach()[None]])
        return result

    def _new_lora(self, number: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Create the factors of a LoRA: random ones that depend only on the seed and the LoRA's number, and zeros."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, a in self._a.items():
            _, rank, into = a.shape
            first = (2 * torch.rand(rank, into, generator=generator) - 1) / into**0.5
            second = torch.zeros(self._b[name].shape[1], rank)
            pairs[name] = nn.Parameter(first.to(a.device)), nn.Parameter(second.to(a.device))
        return pairs

    def _assign_to_cluster(self, key: Tensor, answer: Tensor, lora: int) -> None:
        """Add an edit to the nearest cluster, or create a cluster for it and adjust radii."""
        radius, nearest, distance = self.settings.radius, 0, float("inf")
        if len(self._centres):
            found, place = distances(key[None], self._centres)[0].min(0)
            distance, nearest = found.item(), int(place)
            if distance <= self._radii[nearest] + radius:
                known_answer = self._answers[nearest]
                if torch.equal(known_answer[known_answer != NO_TOKEN], answer):
                    self._add_key(key, nearest, lora)
                    self._grow(nearest)
                    return
                self._shrink(nearest, distance / 2 - GAP)
                radius = distance / 2 + GAP
        self._centres = torch.cat([self._centres, key[None]])
        self._radii = torch.cat([self._radii, torch.tensor([radius], device=key.device)])
        self._answers = append_answer(self._answers, answer)
        self._add_key(key, len(self._centres) - 1, lora)

    def _add_key(self, key: Tensor, cluster: int, lora: int) -> None:
        self._keys = torch.cat([self._keys, key[None]])
        self._clusters = torch.cat([self._clusters, torch.tensor([cluster], device=key.device)])
        self._loras = torch.cat([self._loras, torch.tensor([lora], device=key.device)])

    def _grow(self, cluster: int) -> None:
        """Move a cluster's centre to the mean of its keys, and extend its radius to all of them."""
        keys, centres = self._keys[self._clusters == cluster], self._centres.clone()
        centres[cluster] = keys.mean(0)
        farthest = distances(keys, centres[cluster][None]).max().item()
        self._centres = centres
        self._set_radius(cluster, max(farthest, self.settings.radius))

    def _shrink(self, cluster: int, radius: float) -> None:
        """Reduce a cluster's radius and drop the edits outside it; if none remain, the cluster selects no LoRA."""
        self._set_radius(cluster, radius)
        centre = self._centres[cluster]
        outside = distances(self._keys, centre[None])[:, 0] > radius
        remaining = ~((self._clusters == cluster) & outside)
        self._keys, self._clusters, self._loras = (
            part[remaining] for part in (self._keys, self._clusters, self._loras)
        )
        if not (self._clusters == cluster).any():
            self._add_key(centre, cluster, NO_LORA)

    def _set_radius(self, cluster: int, radius: float) -> None:
        self._radii = self._radii.clone()
        self._radii[cluster] = radius

    def choose(self, queries: Tensor) -> Tensor:
        """Select the LoRA of each query (n, f), (n,); `NO_LORA` where no cluster is near."""
        distance, cluster = distances(queries, self._centres).min(1)
        away = distances(queries, self._keys)
        away = away.masked_fill(self._clusters[None] != cluster[:, None], float("inf"))
        lora = self._loras[away.argmin(1)]
        return torch.where(distance <= self._radii[cluster], lora, NO_LORA)

    def _look_up(self, _hidden: Tensor, output: Tensor) -> None:
        """Select each row's LoRA from the output of the query projection, in the forward that contains the prompts' ends."""
        self._chosen = None
        ends = self._tracker.end_mask(output.device)
        if ends.any():
            self._queries = (output.float() * ends[..., None]).sum(1).detach()
        if not len(self._centres) or self._learning:
            return
        self._chosen = self._tracker.decide_once(
            lambda _: self.choose(self._queries), output.device
        )

    def _lora_hook(self, name: str) -> Any:
        """Return the function that adds the LoRAs' outputs to the output of a module."""

        def add(entering: Tensor, output: Tensor) -> Tensor | None:
            hidden = entering.float()
            if self._learning:
                a, b = self._learning[name]
                change = hidden @ a.mT @ b.mT
            elif self._chosen is None or (self._chosen == NO_LORA).all():
                return None
            else:
                index = self._chosen.clamp(min=0)
                change = hidden @ self._a[name][index].mT @ self._b[name][index].mT
                change = change * (self._chosen != NO_LORA)[:, None, None]
            return output + (self.settings.scaling * change).to(output.dtype)

        return add

    def state_dict(self) -> dict[str, Tensor]:
        """Return the LoRAs, the clusters, and the edits in them."""
        state = {f"{name}.lora_A": a for name, a in self._a.items()}
        state |= {f"{name}.lora_B": b for name, b in self._b.items()}
        return state | {
            "centres": self._centres,
            "radii": self._radii,
            "answers": self._answers,
            "keys": self._keys,
            "clusters": self._clusters,
            "loras": self._loras,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        tensors = {name: tensor.to(self._radii.device) for name, tensor in state.items()}
        self._a = {name: tensors[f"{name}.lora_A"] for name in self._a}
        self._b = {name: tensors[f"{name}.lora_B"] for name in self._b}
        self._centres, self._radii = tensors["centres"], tensors["radii"]
        self._answers, self._keys = tensors["answers"], tensors["keys"]
        self._clusters, self._loras = tensors["clusters"], tensors["loras"]

    def remove(self) -> None:
        """Remove the LoRAs from the model."""
        for handle in self._handles:
            handle.remove()
        self._tracker.remove()
