"""Retrieval without training: the edit most similar to a prompt is put before it as a sentence.

Prompts are compared by the cosine of their tf-idf vectors. A prompt matches if its similarity to an edit's
prompt exceeds every similarity between one of the package's neutral texts and an edit's prompt or another
neutral text; this needs no data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.batching import (
    Tokens,
    collate,
    context_window,
    encode_fitting,
    padding_id,
    special_ids,
)
from peft_baft.data.cases import Edit, prompt_words
from peft_baft.data.templates import RAW
from peft_baft.editing.editor import EditResult, checked_edits, encode_edits
from peft_baft.editing.train import STOP_TERM
from peft_baft.evaluation.forward import answer_ids, answer_logits
from peft_baft.losses import answer_losses
from peft_baft.running import full_logits, input_device
from peft_baft.span import OUTSIDE, relative_positions_of_input
from peft_baft_bench.methods.in_place import require_raw
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.word_index import WordIndex

NO_TOKENS: tuple[int, ...] = ()


@dataclass(frozen=True)
class InContext(MethodSettings):
    """Put the matching edit before a prompt.

    Args:
        form: the text put before the prompt, with placeholders {prompt} and {target} for those of the edit.

    Raises:
        ValueError: a placeholder is missing.
    """

    form: str = "New fact: {prompt} {target}\n"
    seeded = False

    def __post_init__(self) -> None:
        if "{prompt}" not in self.form or "{target}" not in self.form:
            raise ValueError(
                f"in-context: form must contain {{prompt}} and {{target}}, but is {self.form!r}."
            )

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> InContextEditor:
        """Create an editor of `base`.

        Raises:
            ValueError: the setup has a chat template.
        """
        require_raw("in-context", (setup or EditorSetup()).template)
        return InContextEditor(base, tokenizer, self)


class InContextEditor:
    """Stores edits as texts; an `Editor` whose model puts them before prompts."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: InContext
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.model = ModelWithFacts(model, tokenizer, settings.form)

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Store the edits without training; an edit replaces an earlier one with the same prompt."""
        facts = checked_edits(edits)
        require_raw("in-context", RAW, facts)
        encode_edits(self.model, self.tokenizer, facts)  # raises for invalid edits
        before = self.model.facts
        new = {prompt_words(fact.prompt): fact.target.strip() for fact in facts}
        self.model.set_facts(before | new)
        try:
            loss, learned = self._evaluate(facts)
        except BaseException:
            self.model.set_facts(before)
            raise
        return EditResult(0, {STOP_TERM: loss}, 0.0, learned)

    @torch.no_grad()
    def _evaluate(self, facts: Sequence[Edit]) -> tuple[float, bool]:
        """Return the mean cross entropy of the answers, and whether all of their tokens are predicted."""
        losses, all_predicted = [], True
        for fact in facts:
            row = encode_fitting(self.model.base, self.tokenizer, fact.prompt, fact.target)
            batch = collate([row], padding_id(self.tokenizer))
            logits = answer_logits(row, full_logits(self.model, **batch)[0])
            answer = answer_ids(row).to(logits.device)
            losses.append(answer_losses(logits, answer).mean().item())
            all_predicted &= bool((logits.argmax(-1) == answer).all())
        return sum(losses) / len(losses), all_predicted

    def state_dict(self) -> dict[str, Tensor]:
        """Return the edits as the bytes of a JSON text."""
        text = json.dumps(self.model.facts).encode()
        return {"facts": torch.tensor(list(text), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.model.set_facts(json.loads(bytes(state["facts"].tolist())))

    def remove(self) -> None:
        """Drop the edits; the base model was never changed."""
        self.model.set_facts({})


class ModelWithFacts:
    """A causal language model that puts the matching edit before each prompt.

    If no prompt of a batch matches, the output is bit-for-bit that of the unedited model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str
    ) -> None:
        self.base, self._tokenizer, self._form = model, tokenizer, form
        self.set_facts({})

    def set_facts(self, facts: Mapping[str, str]) -> None:
        """Replace the facts (targets by prompt)."""
        self.facts, self._index = dict(facts), WordIndex(facts)

    def __getattr__(self, name: str) -> Any:
        """Forward other attributes to the base model."""
        if name == "base":  # not set yet while the object is copied
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Compute the logits (rows, tokens, vocabulary) of whole texts, only at the texts' own tokens.

        Args:
            labels: mark where prompts end; without them, a whole row is a prompt. No loss is computed.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given, before = self._find_insertions(input_ids, mask, labels)
        if not any(before):
            return self.base(input_ids=input_ids, attention_mask=attention_mask, **settings)
        rows = [
            _insert(row, start, tokens) for (row, start), tokens in zip(given, before, strict=True)
        ]
        logits = full_logits(self.base, **self._batch(rows, "right"))
        result = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        for i, ((row, start), tokens) in enumerate(zip(given, before, strict=True)):
            real = mask[i].bool()
            columns = [j if j < start else j + len(tokens) for j in range(len(row))]
            result[i, real] = logits[i, columns]
        return SimpleNamespace(logits=result)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """Generate continuations; returns the prompts as given and the new tokens, (rows, tokens)."""
        given, before = self._find_insertions(input_ids, attention_mask, None)
        if not any(before):
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            return cast(Tensor, self.base.generate(**inputs, **settings))
        rows = [
            _insert(row, start, tokens) for (row, start), tokens in zip(given, before, strict=True)
        ]
        batch = self._batch(rows, "left")
        new_tokens = self.base.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
        return torch.cat([input_ids.to(new_tokens.device), new_tokens], 1)

    def _find_insertions(
        self, input_ids: Tensor, mask: Tensor, labels: Tensor | None
    ) -> tuple[list[tuple[list[int], int]], list[tuple[int, ...]]]:
        """Find the matching edit of each row.

        Returns:
            The real tokens of each row with the number of special tokens at its start, and the tokens to
                insert after these.
        """
        positions = relative_positions_of_input(mask.bool(), labels=labels)
        special = special_ids(self._tokenizer)
        given, before = [], []
        for ids, row_positions in zip(input_ids, positions, strict=True):
            row = ids[row_positions != OUTSIDE].tolist()
            start = next((i for i, token in enumerate(row) if token not in special), len(row))
            prompt = ids[(row_positions < 0) & (row_positions != OUTSIDE)]
            text = str(self._tokenizer.decode(prompt, skip_special_tokens=True))
            match = self._index.match(text)
            given.append((row, start))
            before.append(NO_TOKENS if match is None else self._sentence(match))
        return given, before

    def _sentence(self, number: int) -> tuple[int, ...]:
        prompt, target = list(self.facts.items())[number]
        text = self._form.format(prompt=prompt, target=target)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _batch(self, rows: Sequence[list[int]], side: str) -> dict[str, Tensor]:
        window, longest = context_window(self.base), max(map(len, rows))
        if window is not None and longest > window:
            raise ValueError(
                f"A prompt has {longest} tokens with the fact before it, but the model's context window has {window}."
            )
        device = input_device(self.base)
        tokens = [Tokens(tuple(row), len(row)) for row in rows]
        batch = collate(tokens, padding_id(self._tokenizer), side)
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def _insert(row: list[int], start: int, tokens: tuple[int, ...]) -> list[int]:
    return [*row[:start], *tokens, *row[start:]]
