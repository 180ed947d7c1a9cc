"""GRACE: a codebook at one MLP down projection (arXiv 2211.11031), as EasyEdit runs it on language models.

The key of an edit is the projection's input at the last prompt token; its value replaces the projection's
output there. A prompt whose key lies within an entry's radius gets that entry's value; all other prompts give
the output of the unedited model. Radii are adjusted when keys are close to each other, so that edits with
different answers stay separate and edits with the same answer share an entry.

Deliberate differences from EasyEdit: it compares the mean of the answers' token ids, and from the second key
on looks this up for the wrong entry, while this implementation compares the answers; it handles one row at a
time, this one any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.cases import Edit
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.editor import EditResult
from peft_baft.editing.train import STOP_TERM, Descent, DescentConfig, Terms, descend
from peft_baft.evaluation.forward import answer_ids
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection
from peft_baft_bench.methods.prompts import ProjectionEditor
from peft_baft_bench.methods.validation import require_layer, require_positive

EASYEDIT_BLOCK = 27  # of a model of 32, counted from 0
GAP = 1e-5  # between the radii of two entries with different answers
NO_TOKEN = -1


@dataclass(frozen=True)
class Grace(MethodSettings):
    """Store edits in a codebook (GRACE), by default with EasyEdit's settings and the BaFT paper's 100 steps.

    Args:
        radius: the radius of a new entry that is far from all others (Euclidean distance of keys).
        layer: the block whose down projection has the codebook, counted from 0; by default EasyEdit's 27 of
            32, scaled to the model.
        descent: how the value of an entry is learned.

    Raises:
        TypeError: layer is not an integer.
        ValueError: the radius is not above 0.
    """

    radius: float = 1.0
    layer: int | None = None
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(lr=1.0, max_steps=100, weight_decay=0.0)
    )

    def __post_init__(self) -> None:
        require_layer(self.layer, "grace")
        require_positive("grace: radius", self.radius)

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> GraceEditor:
        """Create an editor of `base`, whose values are initialised randomly with the setup's seed.

        GRACE does not use unrelated text.

        If several processes share the facts of a batch, each of them learns all facts, with identical
        results.
        """
        setup = setup or EditorSetup()
        return GraceEditor(base, tokenizer, self, setup.template, setup.seed)


class GraceEditor(ProjectionEditor):
    """Edits a model with a codebook; an `Editor`. The edits of a batch are made one after another.

    Args:
        template: the prompt format in which facts are taught.
        seed: for the initial values.

    Raises:
        ValueError: the block does not exist, or does not have exactly one down projection with a known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Grace,
        template: Template = RAW,
        seed: int = 0,
    ) -> None:
        name = down_projection(model, settings.layer, EASYEDIT_BLOCK, "grace")
        super().__init__(model, tokenizer, template, name)
        self.settings, self._seed, device = settings, seed, self._device
        # Keys (n, f), values (n, d), radii (n,), and answers (n, longest) padded with NO_TOKEN; f and d are set by the first
        # edit.
        self._keys = self._values = torch.zeros(0, 0, device=device)
        self._radii = torch.zeros(0, device=device)
        self._answers = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._key: Tensor | None = None  # of the last row in the last forward
        self._width = 0  # of the projection's output
        self._attach()

    def _learn(self, fact: Edit) -> EditResult:
        """Find or create the entry for one fact, and learn the entry's value."""
        row = self._encode(fact.prompt, fact.target, end=self.settings.descent.learn_end)
        texts = self._training_texts([row])
        with torch.no_grad():
            texts.losses()
        assert self._key is not None, "the model was given a prompt"
        entry = self._entry_for(self._key, answer_ids(row).to(self._keys.device))
        value = nn.Parameter(self._values[entry].clone())
        others = self._values
        is_entry = torch.arange(len(others), device=others.device)[:, None] == entry

        def losses(_: Sequence[Descent]) -> list[Terms]:
            self._values = torch.where(is_entry, value, others)
            return [{STOP_TERM: texts.loss()}]

        (result,) = descend([Descent([value], self.settings.descent)], losses)
        self._values = torch.where(is_entry, value.detach(), others)
        return result

    def _entry_for(self, key: Tensor, answer: Tensor) -> int:
        """Return the entry for an edit, new or shared, and adjust radii for it (Algorithm 1 of the paper)."""
        if not len(self._keys):
            return self._add(key, answer, self.settings.radius)
        distance, nearest = distances(key[None], self._keys)[0].min(0)
        if distance > self.settings.radius + self._radii[nearest]:
            return self._add(key, answer, self.settings.radius)
        known_answer = self._answers[nearest]
        if torch.equal(known_answer[known_answer != NO_TOKEN], answer):
            self._radii = self._radii.index_fill(
                0, nearest, max(distance.item(), self._radii[nearest].item())
            )
            return int(nearest)
        self._radii = self._radii.index_fill(0, nearest, max(0.0, distance.item() / 2 - GAP))
        return self._add(key, answer, distance.item() / 2)

    def _add(self, key: Tensor, answer: Tensor, radius: float) -> int:
        """Add an entry with a random value, which depends only on the seed and the entry's number."""
        number, device = len(self._keys), self._keys.device
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        value = torch.rand(self._width, generator=generator).to(device)
        self._keys = torch.cat([self._keys.reshape(number, len(key)), key[None]])
        self._values = torch.cat([self._values.reshape(number, self._width), value[None]])
        self._radii = torch.cat([self._radii, torch.tensor([radius], device=device)])
        self._answers = append_answer(self._answers, answer)
        return number

    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """Replace the projection's output at the prompts' last tokens by the values of matching entries."""
        last = self._tracker.end_mask(output.device)
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
        """Return the codebook: keys, values, radii and answers, one row per entry."""
        return {
            "keys": self._keys,
            "values": self._values,
            "radii": self._radii,
            "answers": self._answers,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        device = self._radii.device
        self._keys, self._values = state["keys"].to(device), state["values"].to(device)
        self._radii, self._answers = state["radii"].to(device), state["answers"].to(device)


def append_answer(answers: Tensor, answer: Tensor) -> Tensor:
    """Append an answer (m,) to answers (n, longest); rows are padded with `NO_TOKEN`."""
    number, width = answers.shape
    longest = max(width, len(answer))
    extended = torch.full((number + 1, longest), NO_TOKEN, device=answers.device)
    extended[:number, :width] = answers
    extended[number, : len(answer)] = answer
    return extended


def distances(keys: Tensor, others: Tensor) -> Tensor:
    """Compute pairwise Euclidean distances (n, m); not by matrix product, with which a key has distance > 0 to itself."""
    return torch.cdist(keys, others, compute_mode="donot_use_mm_for_euclid_dist")
