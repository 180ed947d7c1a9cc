"""Knowledge editing with a PEFT adapter of any method."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from peft_baft.adapter.state import adapter_tensors, evaluating, trainable
from peft_baft.adapter.taught_form import warn_of_another
from peft_baft.data.batching import Tokens, padding_id
from peft_baft.data.cases import Edit, prompt_words
from peft_baft.data.templates import Template
from peft_baft.editing.answers import AnswerForward
from peft_baft.editing.attached import AttachedEditor
from peft_baft.editing.contrasts import find_subject
from peft_baft.editing.editor import EditResult, checked_edits, encode_edits
from peft_baft.editing.fast_paths import open_forward
from peft_baft.editing.lanes import Lane, LaneBatch, LaneOutput, train_lanes
from peft_baft.editing.scope import NARROW, Scope
from peft_baft.editing.train import STOP_TERM, Descent, DescentConfig, Terms
from peft_baft.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WITHOUT_SUBJECT = (
    "No subject was found in %r, so this fact is trained without other wordings and without contrast texts, and answers to "
    "similar questions may change. Name the subject: Edit(prompt, target, subject=...)."
)
logger = logging.getLogger(__name__)


class AdapterEditor(AttachedEditor):
    """Trains facts into the active adapter of a PEFT model, of any method, with teacher forcing only.

    It implements `Editor`. If an edit fails for any reason, the adapter is restored.

    Args:
        model: a PeftModel with one active adapter.
        tokenizer: the model's fast tokenizer.
        descent: the optimiser settings for an edit of one fact.
        batch_descent: the optimiser settings for a batch of several facts.
        processes: the processes that share the facts of each batch; by default only this one. All of them must be given the
            same edits. They end with the same adapter, equal to that of a single process.
        template: the prompt format in which facts are trained: `raw`, `chat`, `both`, `auto` or a `Template`. `auto` is the
            format in which the adapter was trained before; for a new adapter it is `chat` if the tokenizer has a chat template,
            else `raw`. Prompts of messages are always trained as a chat. An edit works only in the format it was trained in.
        scope: the contexts and wordings in which each fact is trained in addition to its bare prompt; by default none.
        template_options: further arguments of `apply_chat_template`, such as `enable_thinking`.

    Raises:
        TypeError: the model is not a PeftModel, the adapter uses prompt learning, or the tokenizer is not a fast one.
        ValueError: the number of active adapters is not one; a chat template is requested and the tokenizer has none; or the
            scope has contrast texts, which this editor does not support.
    """

    supports_contrasts = False

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        descent: DescentConfig | None = None,
        batch_descent: DescentConfig | None = None,
        *,
        processes: Processes | None = None,
        template: str | Template = "auto",
        template_options: Mapping[str, Any] | None = None,
        scope: Scope = NARROW,
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            processes=processes,
            template=template,
            template_options=template_options,
        )
        self.descent = descent or DescentConfig()
        self.batch_descent = batch_descent or DescentConfig(max_steps=70)
        config = model.peft_config[self.adapter_name]
        warn_of_another(config, {form.name for form in self.templates}, tokenizer)
        if scope.has_contrasts and not self.supports_contrasts:
            raise ValueError(
                f"{type(self).__name__} does not support contrast texts; pass scope=Scope(subjects=0, questions=0)."
            )
        self.scope = scope

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Train the adapter on `edits` as one batch.

        On error, the adapter is left unchanged.

        Raises:
            TypeError, ValueError: an edit is invalid or longer than the context window, or two edits have the same prompt; or
                the adapter is inactive, disabled or merged.
            FloatingPointError: a loss or a weight became NaN or infinite.
        """
        batch = checked_edits(edits)
        self._require_in_use()
        descent = self.descent if len(batch) == 1 else self.batch_descent
        # Invalid edits raise here, before the search for subjects runs the model.
        self._encode(batch, descent, NARROW)
        batch = self._with_subjects(batch)
        facts = self._encode(batch, descent)
        # The caller may have disabled gradients, frozen the adapter or left the model in training mode.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(self.model),
            trainable(self.model) as parameters,
        ):
            if not parameters:
                raise ValueError(f"The adapter {self.adapter_name!r} has no trainable parameters.")
            with self._restored_on_error(), self.processes.barrier():
                self.processes.require_equal(facts, "edits")
                # New adapters differ if the processes were seeded differently; use that of the first process.
                self.processes.broadcast(adapter_tensors(self.model))
                result = self._train(batch, facts, Descent(parameters, descent, self._bounds))
        self.remember_form(self.adapter_name, batch)
        return result

    def _require_usable(self, batches: Sequence[Sequence[Edit]]) -> None:
        for batch in batches:
            self._encode(batch, self.descent, NARROW)

    def described(self) -> dict[str, str]:
        """Return the settings that affect the outcome of edits, except the adapter's config, for a journal to compare."""
        settings = {
            "descent": repr(self.descent),
            "batch_descent": repr(self.batch_descent),
            "templates": repr(self.templates),
        }
        # A narrow scope is left out, so that journals from before there were scopes can be resumed.
        if self.scope != NARROW:
            settings["scope"] = repr(self.scope.described())
        return settings

    def _encode(
        self, edits: Sequence[Edit], descent: DescentConfig, scope: Scope | None = None
    ) -> list[list[Tokens]]:
        """Tokenise a batch of edits to the rows of each. scope: used instead of the editor's scope if given."""
        return encode_edits(
            self.model,
            self.tokenizer,
            edits,
            self.templates,
            end=descent.learn_end,
            scope=scope or self.scope,
        )

    def _with_subjects(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return the edits with their subjects filled in, if the scope needs them."""
        if not self.scope.needs_subject:
            return list(edits)
        completed = []
        with evaluating(self.model):
            for edit in edits:
                subject = edit.subject or find_subject(
                    self.model, self.tokenizer, edit.prompt, self.templates[0]
                )
                if subject is None:
                    logger.warning(WITHOUT_SUBJECT, prompt_words(edit.prompt))
                completed.append(replace(edit, subject=subject))
        return completed

    @property
    def _bounds(self) -> dict[str, float]:
        """Upper bounds of terms, by name, that an edit must meet to stop early."""
        return {}

    def _train(
        self, edits: Sequence[Edit], facts: list[list[Tokens]], descent: Descent
    ) -> EditResult:
        """Train the active adapter on one batch of facts, which the processes share."""
        own_rows = [row for rows in self.processes.shard(facts) for row in rows]
        lane = Lane(self.adapter_name, own_rows, [], descent)
        batch = LaneBatch([lane], self._open) if lane.rows else None
        (result,) = train_lanes([lane], batch, self._terms, processes=self.processes)
        return result

    def _open(self, rows: Sequence[Tokens], learned: Sequence[int]) -> AnswerForward:
        """Return the loss computation for some rows. learned: the indices of the rows whose answers are trained."""
        return open_forward(self.model, rows, learned, padding_id(self.tokenizer), None)

    def _terms(self, lane: Lane, output: LaneOutput) -> Terms:
        """Return the named losses of a lane."""
        return {STOP_TERM: output.answer_losses.mean()}
