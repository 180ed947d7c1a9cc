"""The load balance of the gates in training by others: Trainer, a hand-written loop, gradient checkpointing."""

# mypy: disable-error-code="arg-type, attr-defined, misc, union-attr"
from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor

from adapters import config, is_bare
from conftest import make_model, randomise
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers, find_context
from peft_baft.adapter.balance import LoadBalanceTerm
from peft_baft.losses import load_balance, mean_over_blocks

WEIGHT = 0.5


@pytest.fixture
def labels(tokens: Tensor) -> Tensor:
    """Four prompt tokens a row, three answer tokens."""
    return torch.where(torch.arange(7) < 4, -100, tokens)


def balanced_model(weight: float = WEIGHT, **settings: Any) -> PeftModel:
    """A model in training mode whose gates are of different use, so that there is something to balance."""
    torch.manual_seed(5)
    model = get_peft_model(make_model(), config(balance_weight=weight, **settings)).train()
    randomise(model, scale=0.1)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in baft_layers(model):
            for gate in layer.baft_gate.values():
                gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * 0.3)
            for load in layer.baft_gate_usage.values():
                load.copy_(torch.tensor([3.0, 1.0, 0.5, 2.0, 5.0]))
    return model


def expected_term(model: PeftModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """The load balance by its definition: over all edited tokens, mean over blocks, at most the loss."""
    context = find_context(model)
    with context.recording() as recorded:
        loss = model(tokens, labels=labels).loss
    spreads = []
    for layer in baft_layers(model):
        gates = recorded[layer.name]
        load = layer.baft_gate_usage["default"]
        spreads.append(load_balance(gates.w[gates.mask], load[:-1], load[-1]))
    spread = mean_over_blocks(spreads)
    return spread * min(1.0, float(loss.detach() / spread.detach()))


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and one
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_the_loss_of_a_training_forward_has_the_weighted_load_balance(
    task_type, tokens, labels
) -> None:
    plain, balanced = (balanced_model(weight, task_type=task_type) for weight in (0.0, WEIGHT))
    term = expected_term(plain, tokens, labels)
    assert term > 0.01
    losses = [model(tokens, labels=labels).loss for model in (plain, balanced)]
    torch.testing.assert_close(losses[1] - losses[0], WEIGHT * term)
    for loss in losses:
        loss.backward()
    (
        losses[0].detach() * 0 + WEIGHT * expected_term(plain, tokens, labels)
    ).backward()  # gradients add up
    assert_close(gradients(balanced), gradients(plain))


def test_without_a_weight_the_loss_is_the_plain_one_and_no_hook_is_there(tokens, labels) -> None:
    with_field = balanced_model(0.0)
    logits = with_field(tokens, prompt_lengths=[4, 4]).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(with_field(tokens, labels=labels).loss, plain, rtol=0, atol=1e-6)
    hooks = with_field.get_base_model()._forward_hooks.values()
    assert not any(isinstance(getattr(h, "__self__", None), LoadBalanceTerm) for h in hooks)


@pytest.mark.parametrize("form", ["ModelOutput", "tuple", "dict"])
def test_every_form_of_output_has_the_term(form, tokens, labels, monkeypatch) -> None:
    found = []
    for weight in (0.0, WEIGHT):
        model = balanced_model(weight)
        base = model.get_base_model()
        if form == "dict":
            forward = base.forward
            monkeypatch.setattr(
                base, "forward", lambda forward=forward, **given: dict(forward(**given))
            )
        output = model(
            input_ids=tokens, labels=labels, **({"return_dict": False} if form == "tuple" else {})
        )
        loss = output[0] if form == "tuple" else output["loss"]
        found.append((loss, output[1] if form == "tuple" else output["logits"]))
    assert found[1][0] > found[0][0] + 0.001 and torch.equal(found[0][1], found[1][1])


def test_evaluation_and_forwards_without_gradient_have_the_plain_loss(tokens, labels) -> None:
    plain, balanced = balanced_model(0.0), balanced_model()
    with torch.no_grad():
        assert torch.equal(plain(tokens, labels=labels).loss, balanced(tokens, labels=labels).loss)
    assert torch.equal(
        plain.eval()(tokens, labels=labels).loss, balanced.eval()(tokens, labels=labels).loss
    )
    balanced.train()
    with balanced.disable_adapter():
        inside = balanced(tokens, labels=labels).loss
    with plain.train().disable_adapter():
        assert torch.equal(plain(tokens, labels=labels).loss, inside)
    balanced.set_requires_grad("default", False)
    assert torch.equal(plain(tokens, labels=labels).loss, balanced(tokens, labels=labels).loss)


def test_forwards_leave_the_statistics_alone(tokens, labels) -> None:
    model = balanced_model()
    before = [layer.baft_gate_usage["default"].clone() for layer in baft_layers(model)]
    for _ in range(2):
        model(tokens, labels=labels).loss.backward()
    assert all(
        torch.equal(a, layer.baft_gate_usage["default"])
        for a, layer in zip(before, baft_layers(model), strict=True)
    )
    for layer in baft_layers(model):
        layer.baft_gate_usage["default"].copy_(torch.tensor([0.0, 9.0, 0.0, 0.0, 20.0]))
    other = balanced_model()
    # But they are what it is balanced with.
    assert model(tokens, labels=labels).loss != other(tokens, labels=labels).loss


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_or_says_that_it_cannot(
    reentrant, tokens, labels
) -> None:
    plain, checkpointed = balanced_model(), balanced_model()
    plain(tokens, labels=labels).loss.backward()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        checkpointed(tokens, labels=labels).loss.backward()
    except (
        ValueError
    ) as error:  # before transformers 5.23 blocks run with their hooks under no_grad
        assert reentrant and "use_reentrant" in str(error)
        return
    assert_close(gradients(plain), gradients(checkpointed))


def test_terms_of_several_active_adapters_add_up(tokens, labels) -> None:
    losses = []
    for weights in ((0.0, 0.0), (WEIGHT, 0.0), (0.0, WEIGHT), (WEIGHT, WEIGHT)):
        model = balanced_model(weights[0])
        torch.manual_seed(8)
        model.add_adapter("second", config(balance_weight=weights[1]))
        model.base_model.set_adapter(["default", "second"])
        losses.append(model(tokens, labels=labels).loss)
    none, first, second, both = losses
    assert first > none and second > none
    torch.testing.assert_close(both - none, (first - none) + (second - none))


def test_a_failed_forward_leaves_nothing_behind(tokens, labels) -> None:
    model, untouched = balanced_model(), balanced_model()
    context = find_context(model)
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens + 1000, labels=labels)
    assert context.recorded is None
    assert torch.equal(model(tokens, labels=labels).loss, untouched(tokens, labels=labels).loss)


def test_copies_have_a_term_of_their_own_and_unload_takes_it_off(tokens, labels) -> None:
    model = balanced_model()
    loss = model(tokens, labels=labels).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens, labels=labels).loss, loss)
        assert is_bare(twin.unload())
    model.add_adapter("second", config(balance_weight=1.0))
    # Once, however many adapters ask for it.
    assert torch.equal(model(tokens, labels=labels).loss, loss)
    assert is_bare(model.unload())


def test_an_adapter_that_no_tuner_keeps_is_balanced_too(tokens, labels) -> None:
    base = make_model()
    torch.manual_seed(5)
    inject_adapter_in_model(config(balance_weight=WEIGHT), base)
    with_term = base.train()(tokens, labels=labels).loss
    for layer in baft_layers(base):
        layer.configs["default"].balance_weight = 0.0
    assert with_term > base(tokens, labels=labels).loss


# transformers' Trainer


def gradient_of_first_step(
    folder: Path, rows: list[dict[str, Tensor]], batch: int, weight: float, **given: Any
) -> dict:
    """What Trainer's first optimiser step is given, over all `rows`."""
    model = balanced_model(weight)
    for layer in baft_layers(model):
        layer.baft_gate_usage["default"].zero_()
    seen: dict[str, Tensor] = {}

    class Watching(tr.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.update(gradients(model))

    settings: dict[str, Any] = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
    }
    settings |= {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": len(rows) // batch,
    }
    args = tr.TrainingArguments(str(folder), **settings, **given)
    tr.Trainer(model, args, train_dataset=rows, callbacks=[Watching()]).train()
    return seen


def test_accumulated_steps_weigh_the_term_as_one_step_does(tokens, labels, tmp_path) -> None:
    """Micro-batches that are alike and no past edits: the balance of a mean is not the mean of balances."""
    rows = [
        {"input_ids": row, "labels": its} for row, its in zip(tokens[:1], labels[:1], strict=True)
    ] * 8
    whole = gradient_of_first_step(tmp_path, rows, 8, WEIGHT)
    plain = gradient_of_first_step(tmp_path, rows, 8, 0.0)
    assert_close(whole, gradient_of_first_step(tmp_path, rows, 2, WEIGHT))
    name = next(name for name in whole if "baft_gate" in name)
    assert (whole[name] - plain[name]).norm() > 0.01 * plain[
        name
    ].norm()  # the control: the term is there


def test_rows_of_unequal_length_share_the_term_by_their_answer_tokens(tokens, labels) -> None:
    model = balanced_model()
    items = (labels[:, 1:] != -100).sum()
    plain = balanced_model(0.0)
    whole = model(tokens, labels=labels).loss - plain(tokens, labels=labels).loss
    doubled = model(tokens, labels=labels, num_items_in_batch=2 * items).loss
    doubled = doubled - plain(tokens, labels=labels, num_items_in_batch=2 * items).loss
    torch.testing.assert_close(2 * doubled, whole)
    nothing = torch.full_like(labels, -100)
    assert model(tokens, labels=nothing, num_items_in_batch=items).loss == 0  # and no NaN


def test_label_smoothing_has_no_term_and_is_told(tokens, labels, tmp_path, caplog) -> None:
    rows = [{"input_ids": row, "labels": its} for row, its in zip(tokens, labels, strict=True)]
    with caplog.at_level(logging.WARNING, logger="peft_baft"):
        with_weight = gradient_of_first_step(tmp_path, rows, 2, WEIGHT, label_smoothing_factor=0.1)
    assert (
        "balance_weight > 0, but the load balance has no effect" in caplog.text
        and "label smoothing" in caplog.text
    )
    assert_close(
        with_weight, gradient_of_first_step(tmp_path, rows, 2, 0.0, label_smoothing_factor=0.1)
    )


# the setting


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"balance_weight": -0.1}, ValueError, "at least 0, not -0.1"),
        ({"balance_weight": float("inf")}, ValueError, "finite"),
        ({"balance_weight": float("nan")}, ValueError, "finite"),
        ({"balance_weight": "much"}, TypeError, "balance_weight must hold number"),
        ({"balance_weight": 1.0, "weighting": "none"}, ValueError, "balances several gates"),
        ({"balance_weight": 1.0, "weighting": "subspace"}, ValueError, "has 1"),
    ],
)
def test_a_weight_that_cannot_be_used_is_refused(given, error, message) -> None:
    with pytest.raises(error, match=message):
        BaftConfig(**given)


def test_the_weight_is_saved_and_loaded(tmp_path) -> None:
    balanced_model().save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].balance_weight == WEIGHT
