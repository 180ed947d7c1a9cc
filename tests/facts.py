"""A toy model that really learned facts: 24 capitals and 24 foods, each in two phrasings, known by heart.

A random tiny model has no facts to edit, rephrase or spare; this one does, after a few seconds of training on one core.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from peft_baft import BaftConfig, DescentConfig, Edit, Objective, Unrelated
from peft_baft.data.batching import collate, encode
from peft_baft_bench.methods.methods import METHODS

COUNTRIES = [
    a + b
    for a, b in product(("Ar", "Bel", "Cor", "Dan", "El", "Fen"), ("via", "mark", "land", "ona"))
]
CITIES = [
    a + b
    for a, b in product(("Kas", "Lor", "Mir", "Nov", "Ost", "Pel"), ("grad", "ton", "burg", "heim"))
]
ANIMALS = [
    a + b for a, b in product(("bo", "da", "fu", "gi", "ke", "lu"), ("dran", "lop", "mik", "zu"))
]
FOODS = [
    a + b for a, b in product(("ap", "ber", "cit", "dat", "ep", "fil"), ("us", "im", "or", "al"))
]
CITIES[3::4] = [f"Port {name}" for name in CITIES[3::4]]  # every fourth answer has two tokens
CAPITAL, FOOD = dict(zip(COUNTRIES, CITIES, strict=True)), dict(zip(ANIMALS, FOODS, strict=True))
# Settings of tests are spelled out, so that a change of the package's defaults changes no test of editing.
DESCENT = DescentConfig(lr=0.02, max_steps=60, stop_loss=0.02, weight_decay=0.01, learn_end=False)
OBJECTIVE = Objective(
    alpha=0.01,
    beta=0.05,
    gamma=0.02,
    balance=1.0,
    locality=1.0,
    balance_ceiling=1.0,
    locality_ceiling=10.0,
)
ADAPTER: dict[str, Any] = {
    "r": 4,
    "gate_norm": "rms",
    "gate_offset": -5.0,
    "layers_to_transform": [0, 1, 2, 3],
}
# For methods that search for one vector. The toy model's are short, and it never saw a text before its prompts.
_AT_THE_SUBJECT = ";lr=0.5;stop_loss=0.1;clamp=50.0;kl=0;weight_decay=0;contexts=0"
_BY_MOMENTS = ";layers=[0];moment_tokens=300;moment_weight=1e-4;threshold=0.5;ridge=1e-6"
OTHERWISE = {"grace": ";lr=0.5"}
OTHERWISE |= dict.fromkeys(["rome", "r-rome"], f"{_AT_THE_SUBJECT};layer=0")
OTHERWISE |= dict.fromkeys(["memit", "alphaedit"], f"{_AT_THE_SUBJECT}{_BY_MOMENTS}")
OTHERWISE["memory"] = ";key_dimensions=16;least_subject=0.98"
OTHERWISE["melo"] = ";radius=0.5;layer=0;scaling=20;stop_loss=0.03"
OTHERWISE["memoir"] = ";lr=1;contexts=0;overlap=0.9"
OTHERWISE["horen"] = ";lr=0.1;threshold=0.98"
OTHERWISE["wise"] = ";lr=1;contexts=0;near=0.1;far=1;gap=0.5"
OTHERWISE["wise-light"] = ";lr=3;contexts=0;near=0.1;far=0.5;gap=0.3;mask_share=0.8"
UNTRAINED = ("memory",)  # methods that take no steps
# Methods that learn a fact of the toy model so. AdaLoRA has a test of its own; the model cannot read a fact off its context.
LEARNING = [name for name in METHODS if name not in ("adalora", "in-context")]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WINDOW = 32


@dataclass(frozen=True)
class Fact:
    """A known fact: two phrasings of its question, the answer."""

    prompt: str
    rephrase: str
    answer: str


CAPITALS = [
    Fact(f"the capital of {c} is", f"people of {c} call their capital", CAPITAL[c])
    for c in COUNTRIES
]
MEALS = [Fact(f"the food of a {a} is", f"every hungry {a} eats", FOOD[a]) for a in ANIMALS]


def make_tokenizer(bos: bool = False, eos: bool = False) -> tr.PreTrainedTokenizerFast:
    """Words as tokens, each with the space before it, as in byte-level BPE; a line break is a token as well."""
    texts = [f"{p} {f.answer}" for f in (*CAPITALS, *MEALS) for p in (f.prompt, f.rephrase)]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = [*SPECIAL, *words, *(f" {word}" for word in words), " ", "\n"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos or eos:
        pattern, marks = f"{'<s> ' * bos}$A{' </s>' * eos}", [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=marks
        )
    names: dict[str, Any] = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    return tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def train_model(tokenizer: tr.PreTrainedTokenizerFast) -> tr.LlamaForCausalLM:
    """A llama of 4 blocks of width 64 that knows every fact in both phrasings, in evaluation mode."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = tr.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=WINDOW, **shape, **special
    )
    model = tr.LlamaForCausalLM(config)
    batch = collate(
        [
            encode(tokenizer, p, f.answer)
            for f in (*CAPITALS, *MEALS)
            for p in (f.prompt, f.rephrase)
        ],
        0,
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=201)
    for _ in range(200):
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.generation_config.eos_token_id = None  # it never learned to stop
    return model.eval()


class FactModel(NamedTuple):
    """The trained base model, which tests leave as they found it, and its tokenizer."""

    base: tr.LlamaForCausalLM
    tokenizer: tr.PreTrainedTokenizerFast


@cache
def trained() -> FactModel:
    """The fact model, trained once a process."""
    tokenizer = make_tokenizer()
    return FactModel(train_model(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def fact_model() -> FactModel:
    """A tiny llama that knows `CAPITALS` and `MEALS`."""
    return trained()


def saved(toy: FactModel, folder: Path) -> Path:
    """A folder with the toy model in `model`, as the commands take it."""
    toy.base.save_pretrained(folder / "model")
    toy.tokenizer.save_pretrained(folder / "model")
    return folder


def adapted(base: tr.PreTrainedModel, seed: int = 0, **config: Any) -> PeftModel:
    """A copy of `base` with a fresh BaFT adapter on every block."""
    torch.manual_seed(seed)
    return get_peft_model(deepcopy(base), BaftConfig(task_type="CAUSAL_LM", **(ADAPTER | config)))


def edits(*numbers: int) -> list[Edit]:
    """Countries, by number, that move their capital to another country's."""
    return [Edit(CAPITALS[n].prompt, CAPITALS[(n + 8) % 24].answer) for n in numbers]


def edits_with_subjects(*numbers: int) -> list[Edit]:
    """The same with their subjects, which some methods need."""
    pairs = zip(edits(*numbers), numbers, strict=True)
    return [Edit(edit.prompt, edit.target, COUNTRIES[number]) for edit, number in pairs]


def quick(name: str) -> str:
    """A method as `baft bench --method` takes it, with settings by which it soon learns a fact of the toy model."""
    trained = "" if name in UNTRAINED else "lr=0.02;stop_loss=0.02;max_steps=60"
    return f"{name}:{(trained + OTHERWISE.get(name, '')).removeprefix(';')}"


def meals(first: int, last: int) -> list[Unrelated]:
    """Some of the facts about food, as unrelated text."""
    return [Unrelated(fact.prompt, fact.answer) for fact in MEALS[first:last]]


def questions(facts: list[Fact]) -> list[tuple[str, str]]:
    """What scoring takes: prompts and answers."""
    return [(fact.prompt, fact.answer) for fact in facts]
