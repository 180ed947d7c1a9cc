"""GRACE: a codebook at one MLP down projection (arXiv 2211.11031), as EasyEdit runs it on language models.

The key of an edit is what enters the projection at the last prompt token, its value replaces what leaves it there. A prompt
whose own key lies within an entry's radius gets that entry's value; every other prompt is computed as without edits. Radii
are moved when keys come near each other, so that different answers keep apart and equal ones share an entry.

Differences from EasyEdit on purpose: it compares the mean of the answers' token ids, and finds it under the wrong entry from
the second key on, where this compares the answers; it serves one row at a time, where this serves any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.data.cases import Edit
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import STOP_TERM, Descent, DescentConfig, Terms, descend
from peft_baft.evaluation.forward import answer_ids
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection, require_layer
from peft_baft_bench.methods.prompts import ProjectionEditor

EASYEDIT_BLOCK = 27  # of a model of 32, counted from 0
GAP = 1e-5  # between the radii of two entries with different answers
NO_TOKEN = -1


@dataclass(frozen=True)
class Grace(MethodSettings):
    """Keep edits in a codebook (GRACE), by default with EasyEdit's settings and the BaFT paper's 100 steps.

    Args:
        radius: of a new entry that lies far from all others (Euclidean distance of keys).
        layer: block whose down projection has the codebook, counted from 0; by default EasyEdit's 27 of 32 scaled.
        descent: how the value of an entry is learned.

    Raises:
        TypeError: layer is no integer. ValueError: the radius is not above 0.
    """

    radius: float = 1.0
    layer: int | None = None
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(lr=1.0, max_steps=100, weight_decay=0.0)
    )

    def __post_init__(self) -> None:
        require_layer(self.layer, "grace")
        if not 0 < self.radius < float("inf"):
            raise ValueError(f"grace: radius must be above 0 and finite, not {self.radius!r}.")

    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> GraceEditor:
        """Make an editor of `base`. GRACE takes no unrelated text; values begin at random numbers of the setup's seed.

        Where several processes share the facts of a batch, each one learns all of them, and they come out alike.
        """
        setup = setup or EditorSetup()
        return GraceEditor(base, tokenizer, self, setup.template, setup.seed)


class GraceEditor(ProjectionEditor):
    """Edits a model by a codebook; an `Editor`. The edits of a batch are made one after another.

    template: the form in which facts are taught. seed: of the values' first numbers.

    Raises:
        ValueError: the block does not exist, or has not one down projection under a known name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Grace,
        template: Template = RAW,
        seed: int = 0,
    ) -> None:
        name = down_projection(model, settings.layer, EASYEDIT_BLOCK, "grace")
        super().__init__(model, tokenizer, template, name)
        self.settings, self._seed, device = settings, seed, self._device
        # Keys (n, f), values (n, d), radii (n,), and answers (n, longest) filled up with NO_TOKEN; widths are those of the
        # first edit.
        self._keys = self._values = torch.zeros(0, 0, device=device)
        self._radii = torch.zeros(0, device=device)
        self._answers = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._key: Tensor | None = None  # of the last forward's last row
        self._width = 0  # of what leaves the projection
        self._attach()

    def _learn(self, fact: Edit) -> EditResult:
        """Give one fact an entry, or the one that it shares, and learn the entry's value."""
        row = self._encode(fact.prompt, fact.target, end=self.settings.descent.learn_end)
        taught = self._taught([row])
        with torch.no_grad():
            taught.losses()
        assert self._key is not None, "the model was given a prompt"
        entry = self._entry_for(self._key, answer_ids(row).to(self._keys.device))
        value = nn.Parameter(self._values[entry].clone())
        others = self._values
        mine = torch.arange(len(others), device=others.device)[:, None] == entry

        def losses(_: Sequence[Descent]) -> list[Terms]:
            self._values = torch.where(mine, value, others)
            return [{STOP_TERM: taught.loss()}]

        (result,) = descend([Descent([value], self.settings.descent)], losses)
        self._values = torch.where(mine, value.detach(), others)
        return result

    def _entry_for(self, key: Tensor, answer: Tensor) -> int:
        """Find the entry of an edit, a new one or a shared one, and move radii for it (Algorithm 1 of the paper)."""
        if not len(self._keys):
            return self._add(key, answer, self.settings.radius)
        distance, nearest = distances(key[None], self._keys)[0].min(0)
        if distance > self.settings.radius + self._radii[nearest]:
            return self._add(key, answer, self.settings.radius)
        its_answer = self._answers[nearest]
        if torch.equal(its_answer[its_answer != NO_TOKEN], answer):
            self._radii = self._radii.index_fill(
                0, nearest, max(distance.item(), self._radii[nearest].item())
            )
            return int(nearest)
        self._radii = self._radii.index_fill(0, nearest, max(0.0, distance.item() / 2 - GAP))
        return self._add(key, answer, distance.item() / 2)

    def _add(self, key: Tensor, answer: Tensor, radius: float) -> int:
        """Add an entry with a random value, which depends on the seed and the entry's number alone."""
        number, device = len(self._keys), self._keys.device
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        value = torch.rand(self._width, generator=generator).to(device)
        self._keys = torch.cat([self._keys.reshape(number, len(key)), key[None]])
        self._values = torch.cat([self._values.reshape(number, self._width), value[None]])
        self._radii = torch.cat([self._radii, torch.tensor([radius], device=device)])
        self._answers = with_answer(self._answers, answer)
        return number

    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """After the projection: put the values of matching entries where the prompts' last tokens are."""
        last = self._watch.ends(output.device)
        if not last.any():
            return None
        keys = hidden[last].float()
        self._key, self._width = keys[-1].detach(), output.shape[-1]
        if not len(self._keys):
            return None
        distance, nearest = distances(keys, self._keys).min(1)
        matches = (distance <= self._radii[nearest])[:, None]
        replaced = torch.where(matches, self._values[nearest].to(output.dtype), output[last])
        return output.masked_scatter(last[..., None].expand_as(output), replaced)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the codebook: keys, values, radii and answers, one row an entry."""
        return {
            "keys": self._keys,
            "values": self._values,
            "radii": self._radii,
            "answers": self._answers,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        device = self._radii.device
        self._keys, self._values = state["keys"].to(device), state["values"].to(device)
        self._radii, self._answers = state["radii"].to(device), state["answers"].to(device)


def with_answer(answers: Tensor, answer: Tensor) -> Tensor:
    """Put one more answer (m,) under others (n, longest), all filled up with `NO_TOKEN`."""
    number, width = answers.shape
    longest = max(width, len(answer))
    more = torch.full((number + 1, longest), NO_TOKEN, device=answers.device)
    more[:number, :width] = answers
    more[number, : len(answer)] = answer
    return more


def distances(keys: Tensor, others: Tensor) -> Tensor:
    """Compute Euclidean distances (n, m) entry by entry: by a matrix product an entry is not at 0 from itself."""
    return torch.cdist(keys, others, compute_mode="donot_use_mm_for_euclid_dist")
