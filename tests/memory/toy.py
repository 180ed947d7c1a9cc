"""A memory on the toy fact model, and what a reply is, computed without a memory: shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from facts import FactModel, edits
from peft_baft import BaftConfig, MemoryEditor

SETTINGS: dict[str, Any] = {"key_dimensions": 16, "least_subject": 0.98, "strictness": 0.9}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def config(**settings: Any) -> BaftConfig:
    return BaftConfig(memory={**SETTINGS, **settings}, task_type="CAUSAL_LM")


def editor_of(toy: FactModel, **settings: Any) -> MemoryEditor:
    """The editor of an empty memory on a copy of a model."""
    model = get_peft_model(deepcopy(toy.base), config(**settings)).eval()
    return MemoryEditor(model, toy.tokenizer)


def in_chat(toy: FactModel) -> FactModel:
    """A copy of the model whose tokenizer has a chat template."""
    base, tokenizer = deepcopy(toy.base), deepcopy(toy.tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["user", "assistant", "system"])
    base.resize_token_embeddings(len(tokenizer))
    return FactModel(base, tokenizer)


def prompts_of(*numbers: int) -> list[str]:
    return [str(edit.prompt) for edit in edits(*numbers)]


def ids_of(toy: FactModel, text: str) -> list[int]:
    return list(toy.tokenizer(text, add_special_tokens=False)["input_ids"])


def asked_in_chat(toy: FactModel, *messages: tuple[str, str], begun: str = "") -> list[int]:
    turns = [{"role": role, "content": content} for role, content in messages]
    text = toy.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return ids_of(toy, text + begun)


@torch.no_grad()
def continued(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """What a model says next, one token at a time, each from the whole text."""
    text = list(ids)
    for _ in range(count):
        text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]


def reply(base: Any, ids: Sequence[int], answer: Sequence[int], count: int) -> list[int]:
    """A taught answer, and what the unedited model says after it."""
    return [*answer, *continued(base, [*ids, *answer], count - len(answer))][:count]


def generated(model: Any, ids: Sequence[int], count: int, **settings: Any) -> list[int]:
    prompt = torch.tensor([list(ids)])
    given: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    given["attention_mask"] = torch.ones_like(prompt)
    return model.generate(prompt, **{**given, **settings})[0, len(ids) :].tolist()


def logits(model: Any, toy: FactModel, prompts: Sequence[str]) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(torch.tensor([ids_of(toy, prompt)]), logits_to_keep=1).logits
            for prompt in prompts
        ]
