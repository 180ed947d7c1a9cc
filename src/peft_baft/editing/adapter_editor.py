"""Editing a model through a PEFT adapter of any method: the part that all of them share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from peft_baft.adapter.state import (
    adapter_tensors,
    evaluating,
    trainable,
)
from peft_baft.adapter.taught_form import warn_of_another
from peft_baft.data.batching import Tokens, padding_id
from peft_baft.data.cases import Edit, prompt_words
from peft_baft.data.templates import Template
from peft_baft.editing.acceleration.repeated_texts import open_forward
from peft_baft.editing.answers import AnswerForward
from peft_baft.editing.attached import AttachedEditor
from peft_baft.editing.contrasts import find_subject
from peft_baft.editing.editor import EditResult, checked_edits, encode_edits
from peft_baft.editing.lanes import Lane, LaneBatch, LaneOutput, train_lanes
from peft_baft.editing.scope import NARROW, Scope
from peft_baft.editing.train import STOP_TERM, Descent, DescentConfig, Terms
from peft_baft.processes import Processes

WITHOUT_SUBJECT = (
    "No subject was found in %r, so this fact is taught without other words and contrast texts, and its neighbours may move. Say "
    "what it is about: Edit(prompt, target, subject=...)."
)
logger = logging.getLogger(__name__)


class AdapterEditor(AttachedEditor):
    """Teaches facts to the active adapter of a PEFT model, of any method, by teacher forcing alone.

    It is an `Editor`. An edit either takes place whole or leaves the adapter as it was, whatever goes wrong.

    Args:
        model: a PeftModel with one active adapter.
        tokenizer: the model's own, a fast one.
        descent: how an edit of one fact is trained; by default the method's own settings.
        batch_descent: how a batch of several facts is trained.
        processes: those that share the facts of each batch; by default this one alone. All of them are given the same edits,
            and end with the same adapter, as if one had made them.
        template: the form in which facts are taught: `raw`; `chat`; `both` at once; `auto`, the form in which the adapter was
            taught before, else the chat template where the tokenizer has one and raw text elsewhere; or a `Template`. Messages
            are always taught as a chat. An edit holds in the form in which it was taught, so ask in the same.
        scope: in which surroundings each fact is taught besides its bare prompt; by default in none.
        template_options: further arguments of `apply_chat_template`, such as `enable_thinking`.

    Raises:
        TypeError: the model is not a PeftModel, its adapter is one that learns a prompt, or the tokenizer is not a fast one.
        ValueError: not exactly one adapter is active; or a chat template is wanted and the tokenizer has none.
    """

    holds_contrasts = False  # whether a subclass can hold contrast texts

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
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
        if scope.has_contrasts and not self.holds_contrasts:
            raise ValueError(
                f"{type(self).__name__} cannot hold contrast texts; leave them out, as Scope(subjects=0, questions=0)."
            )
        self.scope = scope

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Teach `edits` to the adapter at once, as one batch.

        Raises:
            TypeError, ValueError: an edit is unusable, longer than the model can read, stands twice or contradicts
                another one; or the adapter is not the active one, disabled or merged.
            FloatingPointError: a loss became NaN or infinite. In each case the adapter is as it was.
        """
        batch = checked_edits(edits)
        self._require_in_use()
        descent = self.descent if len(batch) == 1 else self.batch_descent
        # What is wrong with an edit is said before the model is asked for its subject.
        self._encode(batch, descent, NARROW)
        batch = self._with_subjects(batch)
        facts = self._encode(batch, descent)
        # The caller may have gradients off, or the model in training mode with an adapter that is frozen.
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
                # Fresh adapters differ where processes were seeded differently: the first one's counts.
                self.processes.broadcast(adapter_tensors(self.model))
                result = self._train(batch, facts, Descent(parameters, descent, self._bounds))
        self.remember_form(self.adapter_name, batch)
        return result

    def _require_usable(self, batches: Sequence[Sequence[Edit]]) -> None:
        for batch in batches:
            self._encode(batch, self.descent, NARROW)

    def described(self) -> dict[str, str]:
        """Say what decides how edits come out, besides the adapter's config, for a journal to compare."""
        return {
            "descent": repr(self.descent),
            "batch_descent": repr(self.batch_descent),
            "templates": repr(self.templates),
            # Journals from before there were scopes go on in a narrow one.
            **({} if self.scope == NARROW else {"scope": repr(self.scope.described())}),
        }

    def _encode(
        self, edits: Sequence[Edit], descent: DescentConfig, scope: Scope | None = None
    ) -> list[list[Tokens]]:
        """Tokenise a batch of edits: for each its rows, in another scope than the editor's if wanted."""
        return encode_edits(
            self.model,
            self.tokenizer,
            edits,
            self.templates,
            end=descent.learn_end,
            scope=scope or self.scope,
        )

    def _with_subjects(self, edits: Sequence[Edit]) -> list[Edit]:
        """Find the subjects that are not given, where the scope needs them."""
        if not self.scope.needs_subject:
            return list(edits)
        form = self.templates[0]
        found = []
        with evaluating(self.model):
            for edit in edits:
                subject = edit.subject or find_subject(
                    self.model, self.tokenizer, edit.prompt, form
                )
                if subject is None:
                    logger.warning(WITHOUT_SUBJECT, prompt_words(edit.prompt))
                found.append(replace(edit, subject=subject))
        return found

    @property
    def _bounds(self) -> dict[str, float]:
        """What further terms must be below for an edit to end before its last step."""
        return {}

    def _train(
        self, edits: Sequence[Edit], facts: list[list[Tokens]], descent: Descent
    ) -> EditResult:
        """Train the active adapter on one batch of facts, of which each process takes its part."""
        own_rows = [row for rows in self.processes.shard(facts) for row in rows]
        lane = Lane(self.adapter_name, own_rows, [], descent)
        batch = LaneBatch([lane], self._open) if lane.rows else None
        (result,) = train_lanes([lane], batch, self._terms, processes=self.processes)
        return result

    def _open(self, rows: Sequence[Tokens], learned: Sequence[int]) -> AnswerForward:
        """Make the forward for some texts, of which those with these numbers are learned."""
        return open_forward(self.model, rows, learned, padding_id(self.tokenizer), None)

    def _terms(self, lane: Lane, output: LaneOutput) -> Terms:
        """Give the named losses of a lane."""
        return {STOP_TERM: output.answer_losses.mean()}
