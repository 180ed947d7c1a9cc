"""Decisions by prompt: made where a prompt ends, kept while its answer is decoded, refused where they cannot be made."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

import facts
from facts import CAPITALS, FactModel
from peft_baft.data.batching import encode
from peft_baft.editing.module_patches import FixedBlocks
from peft_baft.running import call_with_cache
from peft_baft_bench.methods.prompts import PromptTracker, TrainingTexts, mean_over

fact_model = facts.fact_model
NAME = "model.layers.2.mlp.down_proj"
CPU = torch.device("cpu")


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def watched(toy: FactModel) -> tuple[PromptTracker, list[list[float]]]:
    """A watch that decides 1, 2, … for the rows of each prompt, and what it said in each forward."""
    watch, said = PromptTracker(toy.base, NAME), []

    def ask(*_: object) -> None:
        decided = watch.decide_once(lambda prompts: torch.arange(len(prompts)) + 1.0, CPU)
        said.append(decided.tolist())

    toy.base.get_submodule(NAME).register_forward_hook(ask)
    return watch, said


def test_a_decision_stays_while_an_answer_is_decoded(toy: FactModel) -> None:
    _, said = watched(toy)
    batch = toy.tokenizer([fact.prompt for fact in CAPITALS[:3]], return_tensors="pt", padding=True)
    toy.base.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said == [[1.0, 2.0, 3.0]] * 4


def test_what_cannot_be_decided_is_refused(toy: FactModel) -> None:
    _, said = watched(toy)
    ids = torch.tensor([toy.tokenizer(CAPITALS[0].prompt)["input_ids"]])
    with torch.no_grad():
        with pytest.raises(ValueError, match="contained part of one"):
            toy.base(ids, prompt_lengths=torch.tensor([ids.shape[1] + 1]))
        _, cache = call_with_cache(toy.base, toy.base, {"input_ids": ids})
        assert said == [[1.0]]
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match=r"2 rows continue from a cache, but 1 prompts were"):
            call_with_cache(toy.base, toy.base, {"input_ids": torch.tensor([[5], [6]])}, cache)


def test_losses_are_those_of_whole_logits_and_blocks_run_once(toy: FactModel) -> None:
    rows = [encode(toy.tokenizer, fact.prompt, fact.answer) for fact in CAPITALS[:4]]
    PromptTracker(toy.base, NAME)
    runs: list[str] = []
    first, second = (toy.base.model.layers[i] for i in (0, 2))
    first.mlp.register_forward_hook(lambda *_: runs.append("fixed"))
    second.mlp.register_forward_hook(lambda *_: runs.append("free"))
    taught = TrainingTexts(
        toy.base, toy.tokenizer, rows, FixedBlocks(list(toy.base.model.layers)[:2])
    )
    with torch.no_grad():
        found = taught.losses()
        again = taught.losses()
        for row, losses, once_more in zip(rows, found, again, strict=True):
            ids = torch.tensor([row.ids])
            logits = toy.base(ids).logits[0, row.prompt_length - 1 : -1].log_softmax(-1)
            expected = -logits.gather(1, ids[0, row.prompt_length :, None])[:, 0]
            torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(losses, once_more)
    assert runs[:3] == ["fixed", "free", "free"]


def test_a_mean_is_taken_over_the_marked_tokens_alone() -> None:
    hidden: Tensor = torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [False, False, True]])
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1, 2]])
    torch.testing.assert_close(mean_over(hidden, mask), expected)
