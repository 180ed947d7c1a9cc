"""FT-M and FT-L: fine-tune one MLP down projection.

FT-M learns the answer tokens by teacher forcing (EasyEdit's `objective_optimization: target_new`); it is the
strongest of the simple baselines missing from the BaFT paper. FT-L, which the paper compares with
(`prompt_last`), predicts all answer tokens from the last prompt token, and so cannot learn an answer of
several tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter.blocks import blocks_before
from peft_baft.adapter.state import frozen
from peft_baft.data.batching import collate, padding_id
from peft_baft.data.cases import Edit
from peft_baft.data.templates import RAW, Template
from peft_baft.editing.editor import EditResult, checked_edits, encode_edits
from peft_baft.editing.module_patches import (
    FixedBlocks,
    at_least_four,
    logits_only_at,
)
from peft_baft.editing.train import STOP_TERM, Descent, DescentConfig, Terms, descend
from peft_baft.losses import answer_losses
from peft_baft.running import full_logits, input_device
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.projections import down_projection
from peft_baft_bench.methods.validation import require_layer

EASYEDIT_BLOCK = 21  # of a model of 32, counted from 0
# The method's name in error messages, by objective.
OBJECTIVES = {"answer": "ft-m", "last_prompt_token": "ft-l"}


@dataclass(frozen=True)
class FineTuning(MethodSettings):
    """Fine-tune one MLP down projection, by default with EasyEdit's settings.

    These are AdamW without weight decay, at most 25 steps, and only the answer's tokens, without an end
    token.

    Args:
        objective: `answer` predicts each answer token from the tokens before it (FT-M); `last_prompt_token`
            predicts all of them from the last prompt token (FT-L).
        layer: the block whose down projection is trained, counted from 0; by default EasyEdit's 21 of 32,
            scaled to the model.
        descent: how an edit, or a batch of edits, is trained.

    Raises:
        TypeError: layer is not an integer.
        ValueError: there is no such objective.
    """

    objective: str = "answer"
    layer: int | None = None
    descent: DescentConfig = field(
        default_factory=lambda: DescentConfig(
            lr=5e-4, max_steps=25, weight_decay=0.0, learn_end=False
        )
    )

    seeded = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}."
            )
        require_layer(self.layer, self.name)

    @property
    def name(self) -> str:
        """The method's name in error messages."""
        return OBJECTIVES[self.objective]

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> FineTuningEditor:
        """Create an editor of `base`. Fine-tuning uses neither unrelated text nor random numbers.

        If several processes share the facts of a batch, each of them trains on all facts, with identical
        results.
        """
        template = RAW if setup is None else setup.template
        return FineTuningEditor(base, tokenizer, self, template)


class FineTuningEditor:
    """Fine-tunes one weight of a model; an `Editor`.

    Args:
        template: the prompt format in which facts are taught.

    Raises:
        ValueError: the block does not exist, is quantised, or does not have exactly one down projection with
            a known name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: FineTuning,
        template: Template = RAW,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._template = template
        projection = down_projection(model, settings.layer, EASYEDIT_BLOCK, settings.name)
        self.weight_name = f"{projection}.weight"
        self._weight: nn.Parameter = model.get_parameter(self.weight_name)
        if not self._weight.is_floating_point():
            raise ValueError(
                f"{settings.name} trains a floating-point weight, but {self.weight_name} is "
                f"{self._weight.dtype}: load the model without quantisation."
            )
        self._original = self._weight.detach().clone()

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Train the weight until the answers are learned; see `Editor.edit`."""
        end = self.settings.descent.learn_end
        facts = encode_edits(
            self.model, self.tokenizer, checked_edits(edits), (self._template,), end=end
        )
        rows = [row for forms in facts for row in forms]
        device = input_device(self.model)
        batch = {
            name: tensor.to(device)
            for name, tensor in collate(rows, padding_id(self.tokenizer)).items()
        }
        labels = batch.pop("labels")[:, 1:]
        is_answer = labels >= 0
        answer = labels[is_answer]
        # A token is predicted by the logits before it; in FT-L, all answer tokens by those of the last prompt token.
        rows_of_answers, predicting = is_answer.nonzero(as_tuple=True)
        if self.settings.objective == "last_prompt_token":
            predicting = is_answer.int().argmax(1)[rows_of_answers]
        before = self._weight.detach().clone()
        places, head = (rows_of_answers, predicting), self.model.get_output_embeddings()
        fixed = FixedBlocks(blocks_before(self.model, self.weight_name))

        def losses(_: Sequence[Descent]) -> list[Terms]:
            with fixed.run_once(), logits_only_at(head, at_least_four(places)):
                logits = full_logits(self.model, **batch)[: len(answer)]
            return [{STOP_TERM: answer_losses(logits, answer.to(logits.device)).mean()}]

        try:
            with frozen(self.model):
                self._weight.requires_grad_()
                (result,) = descend([Descent([self._weight], self.settings.descent)], losses)
        except BaseException:
            self._write(before)
            raise
        finally:
            self._weight.grad = None
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained weight under its name."""
        return {self.weight_name: self._weight.detach()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._write(state[self.weight_name])

    def remove(self) -> None:
        """Restore the original weight."""
        self._write(self._original)

    @torch.no_grad()
    def _write(self, value: Tensor) -> None:
        self._weight.copy_(value)
