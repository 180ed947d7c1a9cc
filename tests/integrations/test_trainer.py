"""transformers' Trainer: an interrupted run ends where an uninterrupted one does, and smoothed labels move no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from transformers.trainer_pt_utils import LabelSmoother

import facts
from facts import CAPITALS, FactModel
from peft_baft.adapter.state import adapter_state_dict
from peft_baft.data.batching import encode

fact_model = facts.fact_model
pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer warns of its own


def rows(fact_model: FactModel, stated: bool = False) -> list[dict[str, Any]]:
    """Facts of one length, with labels on their answers; where prompts end is stated beside them if asked."""
    found = []
    for number in range(8):
        fact = CAPITALS[number]
        tokens = encode(fact_model.tokenizer, fact.prompt, CAPITALS[(number + 8) % 24].answer)
        ids, length = list(tokens.ids[: tokens.prompt_length + 1]), tokens.prompt_length
        row = {"input_ids": ids, "labels": [-100] * length + ids[length:]}
        found.append(row | ({"prompt_lengths": length} if stated else {}))
    return found


def trainer(model: Any, folder: Path, data: list[dict[str, Any]], **more: Any) -> tr.Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "max_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 3,
    }
    arguments = tr.TrainingArguments(str(folder), **(settings | more))
    return tr.Trainer(model=model, args=arguments, train_dataset=data)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state_dict(model, "default").items()}


def test_a_resumed_run_ends_bit_for_bit_where_a_whole_one_does(
    fact_model: FactModel, tmp_path: Path
) -> None:
    data = rows(fact_model)
    whole = facts.adapted(fact_model.base)
    begun = trained(whole)
    trainer(whole, tmp_path, data).train()
    expected = trained(whole)
    assert any(not torch.equal(expected[name], begun[name]) for name in expected)
    # Another first adapter: all that counts comes out of the checkpoint.
    resumed = facts.adapted(fact_model.base, seed=7)
    trainer(resumed, tmp_path, data).train(str(tmp_path / "checkpoint-2"))
    found = trained(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The control: the checkpoint is not the end.
    halfway = facts.adapted(fact_model.base, seed=7)
    trainer(halfway, tmp_path, data, max_steps=2).train(str(tmp_path / "checkpoint-2"))
    assert any(not torch.equal(trained(halfway)[name], expected[name]) for name in expected)


def test_smoothed_labels_are_learned_at_the_tokens_of_generation(
    fact_model: FactModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = facts.adapted(fact_model.base, gate_offset=0.0, init_weights=False).train()

    def loss(stated: bool) -> torch.Tensor:
        smoothing = trainer(model, tmp_path, rows(fact_model), label_smoothing_factor=0.1)
        batch = smoothing.data_collator(rows(fact_model, stated)[:4])
        found: Any = smoothing.compute_loss(model, batch)
        return found

    # Trainer takes the labels away from the model, so that only stated lengths tell where prompts end.
    found = loss(stated=True)
    assert not caplog.records
    batch = {
        name: torch.tensor([row[name] for row in rows(fact_model)[:4]])
        for name in ("input_ids", "labels")
    }
    expected = LabelSmoother(epsilon=0.1)(model(**batch), batch["labels"], shift_labels=True)
    torch.testing.assert_close(found, expected)
    assert (loss(stated=False) - expected).abs() > 1e-3  # the control
    assert "without labels and without prompt lengths" in caplog.text
