"""Retrieval without training: the edit that a prompt is most like is put before it as a sentence.

Prompts are compared by the cosine of their words, weighted by how rare each is (tf-idf). A prompt matches if it is more like an
edit's than any of the package's neutral texts is like an edit's, or like another of these texts: no data are needed for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

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
        form: what is put before, with {prompt} and {target} for those of the edit.

    Raises:
        ValueError: the form has not both.
    """

    form: str = "New fact: {prompt} {target}\n"
    seeded = False

    def __post_init__(self) -> None:
        if "{prompt}" not in self.form or "{target}" not in self.form:
            raise ValueError(
                f"in-context: form must hold {{prompt}} and {{target}}, and does not: {self.form!r}."
            )

    def start(self, base: Any, tokenizer: Any, setup: EditorSetup | None = None) -> InContextEditor:
        """Make an editor of `base`.

        Raises:
            ValueError: facts are to be taught in a chat template.
        """
        require_raw("in-context", (setup or EditorSetup()).template)
        return InContextEditor(base, tokenizer, self)


class InContextEditor:
    """Keeps edits as texts; an `Editor`, whose model puts them before prompts."""

    def __init__(self, model: Any, tokenizer: Any, settings: InContext) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.model = ModelWithFacts(model, tokenizer, settings.form)

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        """Keep the edits; one replaces an earlier one of the same prompt. Nothing is trained."""
        facts = checked_edits(edits)
        require_raw("in-context", RAW, facts)
        encode_edits(self.model, self.tokenizer, facts)  # their check
        before = self.model.facts
        new = {prompt_words(fact.prompt): fact.target.strip() for fact in facts}
        self.model.keep(before | new)
        try:
            losses, right = self._look(facts)
        except BaseException:
            self.model.keep(before)
            raise
        return EditResult(0, {STOP_TERM: losses}, 0.0, right)

    @torch.no_grad()
    def _look(self, facts: Sequence[Edit]) -> tuple[float, bool]:
        """Tell the mean cross entropy of the answers now, and whether each of their tokens is predicted."""
        losses, right = [], True
        for fact in facts:
            row = encode_fitting(self.model.base, self.tokenizer, fact.prompt, fact.target)
            batch = collate([row], padding_id(self.tokenizer))
            logits = answer_logits(row, full_logits(self.model, **batch)[0])
            wanted = answer_ids(row).to(logits.device)
            losses.append(answer_losses(logits, wanted).mean().item())
            right &= bool((logits.argmax(-1) == wanted).all())
        return sum(losses) / len(losses), right

    def state_dict(self) -> dict[str, Tensor]:
        """Give the edits as the bytes of a JSON text."""
        text = json.dumps(self.model.facts).encode()
        return {"facts": torch.tensor(list(text), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.model.keep(json.loads(bytes(state["facts"].tolist())))

    def remove(self) -> None:
        """Forget the edits; the base model was never changed."""
        self.model.keep({})


class ModelWithFacts:
    """A causal language model that gets the matching edit before each prompt, and else is as it is.

    Where no prompt of a batch matches, the model computes what it computes without edits, bit for bit.
    """

    def __init__(self, model: Any, tokenizer: Any, form: str) -> None:
        self.base, self._tokenizer, self._form = model, tokenizer, form
        self.keep({})

    def keep(self, facts: Mapping[str, str]) -> None:
        """Take these facts, targets by prompt, in the place of the former ones."""
        self.facts, self._index = dict(facts), WordIndex(facts)

    def __getattr__(self, name: str) -> Any:
        """Give what the model has."""
        if name == "base":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Compute the logits (rows, tokens, vocabulary) of whole texts, for their own tokens alone.

        Args:
            labels: tell where prompts end; without them a row is a prompt as a whole. No loss is computed.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given, before = self._before(input_ids, mask, labels)
        if not any(before):
            return self.base(input_ids=input_ids, attention_mask=attention_mask, **settings)
        rows = [
            _inserted(row, start, tokens)
            for (row, start), tokens in zip(given, before, strict=True)
        ]
        logits = full_logits(self.base, **self._batch(rows, "right"))
        own = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        for i, ((row, start), tokens) in enumerate(zip(given, before, strict=True)):
            real = mask[i].bool()
            kept = [j if j < start else j + len(tokens) for j in range(len(row))]
            own[i, real] = logits[i, kept]
        return SimpleNamespace(logits=own)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """Generate: (rows, tokens) of the prompts as they were given, and of what was said."""
        given, before = self._before(input_ids, attention_mask, None)
        if not any(before):
            return self.base.generate(
                input_ids=input_ids, attention_mask=attention_mask, **settings
            )
        rows = [
            _inserted(row, start, tokens)
            for (row, start), tokens in zip(given, before, strict=True)
        ]
        batch = self._batch(rows, "left")
        said = self.base.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
        return torch.cat([input_ids.to(said.device), said], 1)

    def _before(
        self, input_ids: Tensor, mask: Tensor, labels: Tensor | None
    ) -> tuple[list[tuple[list[int], int]], list[tuple[int, ...]]]:
        """Find the real tokens of each row, behind how many special ones its text begins, and what is put there."""
        positions = relative_positions_of_input(mask.bool(), labels=labels)
        special = special_ids(self._tokenizer)
        given, before = [], []
        for ids, of_row in zip(input_ids, positions, strict=True):
            row = ids[of_row != OUTSIDE].tolist()
            start = next((i for i, token in enumerate(row) if token not in special), len(row))
            prompt = ids[(of_row < 0) & (of_row != OUTSIDE)]
            match = self._index.match(self._tokenizer.decode(prompt, skip_special_tokens=True))
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
                f"A prompt has {longest} tokens with the fact before it, but the model reads at most {window}."
            )
        device = input_device(self.base)
        tokens = [Tokens(tuple(row), len(row)) for row in rows]
        batch = collate(tokens, padding_id(self._tokenizer), side)
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def _inserted(row: list[int], start: int, tokens: tuple[int, ...]) -> list[int]:
    return [*row[:start], *tokens, *row[start:]]
