"""MEMOIR: edits in a residual memory added to one down projection (arXiv 2506.07899).

Each edit is learned in the columns that its prompt selects.

    y ← W x + W_m (M ⊙ x)         at every token, with W_m initially zero

The mask M of an edit marks the k inputs of the projection with the largest difference between their mean over
the prompt's tokens and their mean over unrelated prompts, followed by a fixed permutation. A prompt whose
mask overlaps sufficiently with that of an edit is answered with this edit's mask; all other prompts give the
output of the unedited model.

Deliberate differences: the mask is selected once per prompt and kept while the answer is decoded with a
cache, where the authors decode without one; weight decay applies only to the trained columns. What the paper
leaves open: the unrelated prompts are the package's own and those of the setup; the copies of an edit with
random prefixes use the mask of the bare prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.batching import Tokens, collate, encode_prompt, padding_id
from peft_baft.data.cases import Edit, Unrelated
from peft_baft.data.templates import Template
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.editor import EditResult
from peft_baft.editing.module_patches import no_logits
from peft_baft.editing.train import STOP_TERM, DescentConfig, Terms
from peft_baft.running import full_logits, input_device
from peft_baft_bench.methods.in_place import minimise, stop_when_settled
from peft_baft_bench.methods.locating import cached_prefixes, capture, with_prefixes
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection, weight_of
from peft_baft_bench.methods.prompts import ProjectionEditor, mean_over
from peft_baft_bench.methods.validation import require_fraction, require_integer, require_layer

PUBLISHED_BLOCK = 27  # of a model of 32, counted from 0
PREFIX_TOKENS = 10
NO_EDIT = -1


@dataclass(frozen=True)
class Memoir(MethodSettings):
    """Store edits in a residual memory (MEMOIR), by default with its settings for Llama-3.

    Args:
        share: the fraction of the projection's inputs in a mask; 4096 of 14336.
        overlap: a prompt is answered by an edit if at least this fraction of their masks is common.
        layer: the block whose down projection has the memory, counted from 0; by default 27 of 32, scaled to
            the model.
        contexts: how many model-generated texts of 10 tokens are used as prefixes of the prompt; 0 for none.
        descent: how an edit is learned, by plain gradient descent.

    Raises:
        TypeError: layer is not an integer.
        ValueError: a value is out of range.
    """

    share: float = 4096 / 14336
    overlap: float = 0.4
    layer: int | None = None
    contexts: int = 10
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(
            lr=1.0, max_steps=30, stop_loss=0.02, weight_decay=1e-5, clip_norm=1.0
        )
    )

    def __post_init__(self) -> None:
        require_layer(self.layer, "memoir")
        for name in ("share", "overlap"):
            require_fraction(f"memoir: {name}", getattr(self, name))
        require_integer("memoir: contexts", self.contexts, 0)

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> MemoirEditor:
        """Create an editor of `base`; masks are computed relative to unrelated prompts, those of the setup included."""
        setup = setup or EditorSetup()
        return MemoirEditor(base, tokenizer, self, setup)


class MemoirEditor(ProjectionEditor):
    """Edits a model with a residual memory; an `Editor`.

    Raises:
        ValueError: the block does not exist, is quantised, or does not have exactly one down projection with
            a known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Memoir,
        setup: EditorSetup,
    ) -> None:
        name = down_projection(model, settings.layer, PUBLISHED_BLOCK, "memoir")
        super().__init__(model, tokenizer, setup.template, name)
        self.settings, device = settings, self._device
        out, into = weight_of(self._projection).shape
        self._chosen = max(1, round(settings.share * into))
        generator = torch.Generator().manual_seed(setup.seed)
        self._permutation = torch.randperm(into, generator=generator).to(device)
        self._background = self._mean_of_prompts(setup.unrelated, setup.template)
        lengths = ((PREFIX_TOKENS, settings.contexts),)
        self._prefixes = cached_prefixes(model, tokenizer, lengths, setup.prepared or EditCache())
        self._memory = torch.zeros(out, into, device=device)
        self._masks = torch.zeros(0, into, dtype=torch.bool, device=device)  # (edits, f)
        self._learning: Tensor | None = (
            None  # during training: the trained columns and their indices
        )
        self._places: Tensor | None = None
        self._attach()

    @torch.no_grad()
    def _mean_of_prompts(self, unrelated: Sequence[Unrelated], template: Template) -> Tensor:
        """Average the projection's input over the tokens of unrelated prompts, then over the prompts: (f,)."""
        texts = dict.fromkeys(text.prompt for text in (*GENERAL, *unrelated))
        rows = [encode_prompt(self.tokenizer, text, template=template) for text in texts]
        return self._prompt_means(rows).mean(0)

    @torch.no_grad()
    def _prompt_means(self, rows: Sequence[Tokens]) -> Tensor:
        """Average the projection's input over the prompt tokens of each row, (rows, f)."""
        device = input_device(self.model)
        prompts = [Tokens(row.ids[: row.prompt_length], row.prompt_length) for row in rows]
        batch = collate(prompts, padding_id(self.tokenizer))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with capture(self._projection, len(rows)) as seen, no_logits(self.model):
            full_logits(self.model, **inputs)
        return mean_over(seen[0].input, inputs["attention_mask"].bool().to(seen[0].input.device))

    def _learn(self, fact: Edit) -> EditResult:
        """Learn one fact in the columns that its prompt selects."""
        rows = [
            self._encode(text, fact.target) for text in with_prefixes(fact.prompt, self._prefixes)
        ]
        mask = self.compute_masks(self._prompt_means(rows[:1]))[0]
        places = mask.nonzero()[:, 0]
        columns = nn.Parameter(self._memory[:, places].clone())
        texts, descent = self._training_texts(rows), self.settings.descent

        def terms() -> Terms:
            return {STOP_TERM: texts.loss()}

        self._learning, self._places = columns, places
        try:
            result = minimise(
                torch.optim.SGD([columns], lr=descent.lr, weight_decay=descent.weight_decay),
                terms,
                descent.max_steps,
                stop_when_settled(descent.stop_loss),
                learned_below=2 * descent.stop_loss,
                clip_norm=descent.clip_norm,
            )
        finally:
            self._learning = self._places = None
        self._memory = self._memory.index_copy(1, places, columns.detach())
        self._masks = torch.cat([self._masks, mask[None]])
        return result

    def compute_masks(self, means: Tensor) -> Tensor:
        """Compute masks, (n, f) bool, from the mean inputs of the projection, (n, f)."""
        largest = (means - self._background).abs().topk(self._chosen).indices
        return torch.zeros_like(means, dtype=torch.bool).scatter(
            1, self._permutation[largest], True
        )

    def nearest(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Find for each mask (n, f) the edit with the largest overlap, and the overlap as a fraction: two tensors (n,)."""
        common = (masks.float() @ self._masks.float().mT) / self._chosen
        share, edit = common.max(1)
        return edit, share

    def _change(self, hidden: Tensor, output: Tensor) -> Tensor | None:
        """Add the memory's output for the masked inputs to the projection's output."""
        if self._learning is not None:
            added = hidden[..., self._places].float() @ self._learning.mT
            return output + added.to(output.dtype)
        if not len(self._masks):
            return None

        def decide(prompts: Tensor) -> Tensor:
            edit, share = self.nearest(self.compute_masks(mean_over(hidden, prompts)))
            return torch.where(share >= self.settings.overlap, edit, NO_EDIT)

        edits = self._tracker.decide_once(decide, output.device)
        answered = edits != NO_EDIT
        if not answered.any():
            return None
        masked = hidden.float() * self._masks[edits.clamp(min=0)][:, None]
        added = (masked @ self._memory.mT).to(output.dtype)
        return torch.where(answered[:, None, None], output + added, output)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the memory, the masks with one row per edit, and the mean over unrelated prompts."""
        return {"memory": self._memory, "masks": self._masks, "background": self._background}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        device = self._memory.device
        self._memory, self._masks = state["memory"].to(device), state["masks"].to(device)
        self._background = state["background"].to(device)
