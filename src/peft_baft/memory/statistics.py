"""What belongs to a base model and is the same for every memory on it: where its states lie, and which tokens are common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.model_call import full_logits, input_device
from peft_baft.baselines.locating import captured
from peft_baft.baselines.second_moments import written_texts
from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.acceleration.module_patches import no_logits

SHRINKAGE = 0.1  # of the spread in each direction, towards the mean spread


@dataclass(frozen=True)
class KeyStatistics:
    """How states of a block become keys.

    Attributes:
        mean: (d,). whitening: (d, k): the k directions of the largest spread, each divided by it.
        documents: (vocabulary,) in how many of `count` texts each token is.
    """

    mean: Tensor
    whitening: Tensor
    documents: Tensor
    count: int

    def keys(self, states: Tensor) -> Tensor:
        """Make keys of length 1, (…, k), of states (…, d)."""
        white = (states.float() - self.mean) @ self.whitening
        return torch.nn.functional.normalize(white, dim=-1)


@torch.no_grad()
def key_statistics(
    model: Any, tokenizer: Any, block_name: str, dimensions: int, seed: int = 0
) -> KeyStatistics:
    """Measure states of the unedited model over the package's neutral texts and over texts that it writes.

    Args:
        block_name: of the block whose outputs become keys. dimensions: k, at most d.
    """
    rows = [*_brought(tokenizer), *written_texts(model, tokenizer, seed)]
    device = input_device(model)
    states, documents = [], torch.zeros(model.get_input_embeddings().num_embeddings)
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        batch = collate(part, padding_id(tokenizer))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        block = model.get_submodule(block_name)
        with captured(block, len(part)) as seen, no_logits(model):
            full_logits(model, **inputs)
        real = inputs["attention_mask"].bool()
        real[:, 0] = False  # the first token's states are of another size than all others
        states.append(seen[0].output[real.to(seen[0].output.device)].float())
        for row in part:
            documents[list(set(row.ids))] += 1
    every = torch.cat(states)
    mean = every.mean(0)
    spread, directions = torch.linalg.eigh((every - mean).mT @ (every - mean) / len(every))
    dimensions = min(dimensions, len(spread))
    kept = spread[-dimensions:]
    kept = (1 - SHRINKAGE) * kept + SHRINKAGE * kept.mean()
    return KeyStatistics(
        mean, directions[:, -dimensions:] / kept.sqrt(), documents.to(mean.device), len(rows)
    )


def _brought(tokenizer: Any) -> list[Tokens]:
    """Tokenise the package's neutral texts."""
    texts = [f"{text.prompt} {text.answer}" for text in GENERAL]
    for context in (*CHAT_CONTEXTS, *RAW_CONTEXTS):
        texts += [context.system, context.before, context.after]
    found = [tuple(tokenizer(text)["input_ids"]) for text in texts if text]
    return [Tokens(ids, len(ids)) for ids in found if len(ids) > 1]
