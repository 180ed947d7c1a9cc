"""Fluency: entropy of n-grams by hand, and sampling that concerns nobody else."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from peft import PeftModel

import facts
from conftest import randomise
from facts import CAPITALS, WINDOW, FactModel, adapted
from peft_baft import Case, Edit
from peft_baft.data.templates import RAW
from peft_baft_bench.metrics.fluency import SeededTopK, fluency, n_gram_entropy, sampled_texts
from peft_baft_bench.metrics.metrics import METRICS

fact_model = facts.fact_model
PROMPTS = [fact.prompt for fact in CAPITALS[:3]] + [
    "the",
    "people of Arvia call their capital Kasgrad the food of",
]


@pytest.fixture(scope="module")
def edited(fact_model: FactModel) -> PeftModel:
    model = adapted(fact_model.base, gate_offset=0.0, prompt_positions=1).eval()
    randomise(model, scale=0.3)
    return model


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("", 0.0),
        ("one", 0.0),
        ("one two", 0.0),  # one pair, no triple
        ("one two three", 1 / 3),  # two pairs: 1 bit, one triple
        (
            "a b a b a",
            (2 / 3 * 1.0 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2,
        ),  # ab ba ab ba; aba bab aba
        ("so so so so so so", 0.0),
        ("Yes, yes.", (2 / 3 * math.log2(3) + 4 / 3 * 1.0) / 2),  # four words: Yes , yes .
        ("don't", (2 / 3 * 1.0) / 2),
    ],
)
def test_n_gram_entropy_on_hand_worked_texts(text: str, bits: float) -> None:
    assert n_gram_entropy(text) == pytest.approx(bits)


def test_the_draw_is_among_the_likeliest_and_as_likely_as_they_are() -> None:
    p = torch.tensor([0.05, 0.3, 0.05, 0.6])
    draw = SeededTopK([str(i) for i in range(4000)], seed=0, top_k=2)
    left = draw(torch.zeros(0), p.log().expand(4000, -1))
    assert ((left == 0).sum(1) == 1).all() and ((left == -torch.inf).sum(1) == 3).all()
    shares = torch.bincount(left.argmax(1), minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0, 1 / 3, 0, 2 / 3], abs=0.03)
    assert (draw(torch.zeros(0), torch.full((4000, 4), torch.nan)).argmax(1) < 4).all()


def test_texts_begin_with_their_prompt_and_end_at_the_length_or_the_window(
    fact_model: FactModel,
) -> None:
    count = lambda text: len(fact_model.tokenizer(text)["input_ids"])  # noqa: E731
    for length, wanted in ((8, 8), (100, WINDOW)):
        texts = sampled_texts(
            fact_model.base, fact_model.tokenizer, [*PROMPTS[:4], "the " * 20], length=length
        )
        assert [count(text) for text in texts] == [wanted] * 4 + [max(wanted, 20)]
        assert all(
            text.startswith(prompt) for prompt, text in zip(PROMPTS[:4], texts[:4], strict=True)
        )


def test_a_text_goes_on_past_its_end(fact_model: FactModel) -> None:
    ends = fact_model.base.generation_config
    ends.eos_token_id = list(range(len(fact_model.tokenizer)))  # any token ends a text
    try:
        assert (
            len(sampled_texts(fact_model.base, fact_model.tokenizer, ["the"], length=8)[0].split())
            >= 7
        )
    finally:
        ends.eos_token_id = None


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_texts_depend_neither_on_the_batch_nor_on_its_order(
    edited: PeftModel, fact_model, batch_size: int
) -> None:
    alone = [
        sampled_texts(edited, fact_model.tokenizer, [prompt], length=14)[0] for prompt in PROMPTS
    ]
    assert (
        sampled_texts(edited, fact_model.tokenizer, PROMPTS[::-1], 0, 14, batch_size=batch_size)[
            ::-1
        ]
        == alone
    )


def test_seeds_differ_and_an_adapter_acts(edited: PeftModel, fact_model: FactModel) -> None:
    base, tokenizer = fact_model
    texts = [sampled_texts(base, tokenizer, PROMPTS, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert sampled_texts(edited, tokenizer, PROMPTS) != texts[0]


def test_one_likeliest_token_is_greedy_decoding_with_the_adapter_where_it_belongs(
    edited, fact_model
) -> None:
    prompt = CAPITALS[0].prompt
    ids = fact_model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    while ids.shape[1] < 10:
        with torch.no_grad():
            logits = edited(
                input_ids=ids, prompt_lengths=torch.tensor([length]), use_cache=False
            ).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    text = fact_model.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert sampled_texts(edited, fact_model.tokenizer, [prompt], length=10, top_k=1) == [text]


def test_the_callers_random_numbers_stay_as_they_are(fact_model: FactModel) -> None:
    before: Any = torch.get_rng_state(), random.getstate()
    first = fluency(fact_model.base, fact_model.tokenizer, PROMPTS)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    torch.manual_seed(123)
    assert fluency(fact_model.base, fact_model.tokenizer, PROMPTS) == first and max(first) > 1


def test_fluency_is_measured_after_the_edits_prompt(
    edited: PeftModel, fact_model: FactModel
) -> None:
    case = Case(Edit(CAPITALS[0].prompt, "Kasgrad"))
    (wanted,) = fluency(edited, fact_model.tokenizer, [CAPITALS[0].prompt])
    assert METRICS["fluency"](edited, fact_model.tokenizer, case, RAW) == {"fluency": wanted}
