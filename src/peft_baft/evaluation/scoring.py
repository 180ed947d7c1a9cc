"""Asking a model: teacher-forced token match and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_baft.data.batching import collate, encode, padding_id


@torch.no_grad()
def predicted_tokens(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 16
) -> list[tuple[Tensor, Tensor]]:
    """What the model would say at each answer token of (prompt, answer) pairs, given the answer so far.

    The prompt's end is told to the adapter by the labels, so an edit acts here on the tokens it acts on in `generate`.

    Returns:
        For each pair, the model's and the answer's token ids, both (answer tokens,).
    """
    device = model.get_input_embeddings().weight.device
    rows = [encode(tokenizer, prompt, answer) for prompt, answer in pairs]
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = {name: t.to(device) for name, t in collate(part, padding_id(tokenizer)).items()}
        said = model(**batch, use_cache=False).logits.argmax(-1).cpu()
        for row, predicted in zip(part, said, strict=True):
            answer = slice(row.prompt_length, len(row.ids))
            found.append((predicted[answer.start - 1 : answer.stop - 1], torch.tensor(row.ids[answer])))
    return found


def token_match(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 16) -> list[float]:
    """Share of each answer's tokens that the model would say itself: reliability, generality, portability."""
    return [
        (said == wanted).float().mean().item() for said, wanted in predicted_tokens(model, tokenizer, pairs, batch_size)
    ]


def agreement(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Locality: share of the answer tokens at which the model says what it said before, right or wrong.

    Args:
        before, after: `predicted_tokens` of the same pairs, of the unedited and the edited model.
    """
    return [(said == now).float().mean().item() for (said, _), (now, _) in zip(before, after, strict=True)]


@torch.no_grad()
def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 12) -> list[str]:
    """The model's own greedy continuation of each prompt, up to its first line break."""
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt.strip(), return_tensors="pt").to(model.get_input_embeddings().weight.device)
        tokens = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding_id(tokenizer)
        )
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(text.lstrip().split("\n")[0].strip())
    return answers
