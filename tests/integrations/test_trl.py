"""TRL's trainers edit, in training, the tokens that generation edits, and train the adapter that they were given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# Until 1.14, DPO and GRPO passed no labels.
trl = pytest.importorskip("trl", minversion="1.15", reason="needs TRL 1.15")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and Trainer warn of their own

from datasets import Dataset  # noqa: E402

import facts  # noqa: E402
from facts import CAPITALS, MEALS, FactModel  # noqa: E402
from peft_baft.adapter.model import find_context  # noqa: E402
from peft_baft.adapter.state import adapter_state_dict  # noqa: E402
from peft_baft.span import edited  # noqa: E402

fact_model = facts.fact_model
PROMPT_POSITIONS, PADDING, END = 2, 0, 2
# Prompts and answers of unequal length.
PAIRS = [
    (CAPITALS[0].prompt, f" {CAPITALS[8].answer}"),
    (MEALS[0].rephrase, f" {CAPITALS[3].answer}"),
    (CAPITALS[2].rephrase, f" {MEALS[5].answer}"),
    (CAPITALS[4].prompt, f" {CAPITALS[7].answer}"),
]
COMPLETIONS = [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS]
PREFERENCES = [
    {"prompt": prompt, "chosen": answer, "rejected": PAIRS[(number + 1) % 4][1]}
    for number, (prompt, answer) in enumerate(PAIRS)
]


class EditedText(NamedTuple):
    """What one forward edited of one text.

    Attributes:
        adapter: which adapter edited it. learned: whether the forward was one with gradients. tokens: those that were edited.
    """

    adapter: str
    learned: bool
    tokens: list[int]


def model_of(fact_model: FactModel, **config: Any) -> Any:
    return facts.adapted(fact_model.base, prompt_positions=PROMPT_POSITIONS, **config)


@contextmanager
def watched(model: Any) -> Iterator[list[EditedText]]:
    """Note what the forwards inside edit.

    Padding is left out, and a row of several texts, which begin at position 0, is noted as several.
    """
    context: Any = find_context(model)
    layer = next(m for m in model.modules() if getattr(m, "context", None) is context)
    stack = model.get_base_model().model
    seen: list[EditedText] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        (name,) = layer.active_adapters
        ids, chosen = (
            kwargs["input_ids"],
            edited(context.relative_positions, PROMPT_POSITIONS),
        )
        positions = kwargs.get("position_ids")
        for row in range(len(ids)):
            starts = [] if positions is None else (positions[row] == 0).nonzero()[1:, 0].tolist()
            for text, mask in zip(
                ids[row].tensor_split(starts), chosen[row].tensor_split(starts), strict=True
            ):
                if (text != PADDING).any():
                    tokens = text[mask & (text != PADDING)].tolist()
                    seen.append(EditedText(name, torch.is_grad_enabled(), tokens))

    handle = stack.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def in_generation(model: Any, fact_model: FactModel, prompt: str, answer: str) -> list[int]:
    """The tokens that generation edits while it is made to say the answer and the end of the text.

    The end itself is the last token: it is not fed back, so that generation neither edits it nor reads what follows.
    """
    asked, said = (fact_model.tokenizer(text)["input_ids"] for text in (prompt, answer))
    said = [*said, END]
    with watched(model) as seen:
        model.generate(
            input_ids=torch.tensor([asked]),
            attention_mask=torch.ones(1, len(asked), dtype=torch.long),
            max_new_tokens=len(said),
            prefix_allowed_tokens_fn=lambda _row, ids: [said[len(ids) - len(asked)]],
        )
    return [token for text in seen for token in text.tokens]


def settings(kind: Any, folder: Path, **more: Any) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return kind(**(common | more))


def tensors(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model, name).items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def sft(
    model: Any, fact_model: FactModel, folder: Path, rows: list[dict[str, str]], **more: Any
) -> Any:
    return trl.SFTTrainer(
        model=model,
        args=settings(trl.SFTConfig, folder, **more),
        train_dataset=Dataset.from_list(rows),
        processing_class=fact_model.tokenizer,
    )


@pytest.mark.parametrize(
    "way",
    [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 24}],
    ids=["padded", "padding-free", "packed"],
)
def test_sft_on_completions_edits_what_generation_does(
    fact_model: FactModel, tmp_path: Path, way: dict[str, Any]
) -> None:
    model = model_of(fact_model)
    expected = [[*in_generation(model, fact_model, *pair), END] for pair in PAIRS]
    before = tensors(model)
    trainer = sft(model, fact_model, tmp_path, COMPLETIONS, **way)
    with watched(model) as seen:
        trainer.train()
    assert sorted(seen) == sorted(("default", True, tokens) for tokens in expected)
    assert not equal(before, tensors(model))


@pytest.mark.parametrize("way", [{}, {"packing": True, "max_length": 24}], ids=["padded", "packed"])
def test_sft_on_plain_text_edits_every_token(
    fact_model: FactModel, tmp_path: Path, way: dict[str, Any]
) -> None:
    model = model_of(fact_model)
    trainer = sft(model, fact_model, tmp_path, [{"text": "".join(pair)} for pair in PAIRS], **way)
    with watched(model) as seen:
        trainer.train()
    texts = [[*fact_model.tokenizer("".join(pair))["input_ids"], END] for pair in PAIRS]
    assert sorted(seen) == sorted(("default", True, text) for text in texts)


def test_sft_computes_its_own_loss_which_is_said_where_a_balance_term_is_asked_for(
    fact_model: FactModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {}
    for weight in (0.0, 1.0):
        caplog.clear()
        model = model_of(fact_model, gate_offset=0.0, balance_weight=weight)
        result = sft(model, fact_model, tmp_path, COMPLETIONS).train()
        losses[weight] = result.training_loss
        assert ("balance" in caplog.text) == bool(weight)
    assert losses[0.0] == losses[1.0]


def test_dpo_edits_what_generation_does_also_in_its_reference(
    fact_model: FactModel, tmp_path: Path
) -> None:
    model = model_of(fact_model, gate_offset=0.0)
    pairs = PAIRS + [(row["prompt"], row["rejected"]) for row in PREFERENCES]
    expected = [[*in_generation(model, fact_model, *pair), END] for pair in pairs]
    before = tensors(model)
    trainer = trl.DPOTrainer(
        model=model,
        args=settings(trl.DPOConfig, tmp_path),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=fact_model.tokenizer,
    )
    with watched(model) as seen:
        result = trainer.train()
    for adapter, learned in (("default", True), ("ref", False)):
        assert sorted(text for text in seen if text.adapter == adapter) == sorted(
            (adapter, learned, tokens) for tokens in expected
        )
    # At the first step the model is its own reference; the control is any other one.
    assert result.training_loss == pytest.approx(-torch.tensor(0.5).log().item(), abs=1e-6)
    assert equal(before, dict(zip(before, tensors(model, "ref").values(), strict=True)))
    assert not equal(before, tensors(model))


def test_grpo_generates_and_trains_at_the_same_tokens(
    fact_model: FactModel, tmp_path: Path
) -> None:
    model = model_of(fact_model, gate_offset=0.0)
    before, answers, rows = tensors(model), 3, 4
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(i) for i in range(len(completion_ids))],
        args=settings(
            trl.GRPOConfig,
            tmp_path,
            num_generations=2,
            max_completion_length=answers,
            temperature=5.0,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, _ in PAIRS[:2]]),
        processing_class=fact_model.tokenizer,
    )
    with watched(model) as seen:
        trainer.train()
    generated, learned = (
        [text.tokens for text in seen if text.learned is learns] for learns in (False, True)
    )
    # Generation passes the prompt and then one token at a time, of all rows together; the last one is never passed.
    texts = [[token for part in generated[row::rows] for token in part] for row in range(rows)]
    assert len({tuple(text) for text in texts}) == rows
    assert [len(text) for text in texts] == [PROMPT_POSITIONS + answers - 1] * rows
    assert sorted(tokens[:-1] for tokens in learned) == sorted(texts)
    assert not equal(before, tensors(model))
