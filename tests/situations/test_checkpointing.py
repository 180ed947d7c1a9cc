"""Activation checkpointing changes no gradient, whatever runs between a forward and its backward."""

# mypy: disable-error-code="attr-defined, operator, union-attr, index, var-annotated"
from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from conftest import VOCABULARY, make_model
from peft_baft.adapter import find_context
from peft_baft.adapter.call import Call, CallsByInput
from side_by_side import METHODS, adapted, config_of, draw_adapter

# transformers' own checkpointing (before 5.24 the hooks of a block were inside of it, since then they are outside), and torch's
# wrapper, inside of which they are.
WAYS = ["non-reentrant", "reentrant", "wrapper", "reentrant wrapper"]


def ids(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(
        3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )


ONE, OTHER, SHORT = ids(2, 10, 1), ids(2, 10, 2), ids(2, 7, 3)


def labels(tokens: Tensor, prompt: int) -> Tensor:
    return torch.where(torch.arange(tokens.shape[1]) < prompt, -100, tokens)


def checkpointed(model: Any, way: str | None) -> Any:
    """Let a model's blocks be run again in the backward, in one of the ways that trainers use."""
    model.train()
    if way is not None and "wrapper" in way:  # what accelerate does for FSDP
        kind = CheckpointImpl.NO_REENTRANT if way == "wrapper" else CheckpointImpl.REENTRANT
        apply_activation_checkpointing(
            model.get_base_model(),
            checkpoint_wrapper_fn=lambda block: checkpoint_wrapper(
                block, checkpoint_impl=kind, preserve_rng_state=False
            ),
            check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer",
        )
        model.enable_input_require_grads()
        model.config.use_cache = False
    elif way is not None:
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        model.enable_input_require_grads()
    return model


def gradient(model: Any) -> Tensor:
    named = ((n.replace("_checkpoint_wrapped_module.", ""), p) for n, p in model.named_parameters())
    gradients = [p.grad.flatten() for _, p in sorted(named) if p.grad is not None]
    return torch.cat(gradients)


def assert_same_gradient(model: Any, plain: Any) -> None:
    wanted = gradient(plain)
    assert wanted.norm() > 0
    assert (gradient(model) - wanted).norm() < 1e-4 * wanted.norm()


def one_forward(model: Any) -> None:
    model(ONE, labels=labels(ONE, 7)).loss.backward()


def two_texts(model: Any) -> None:
    one, other = (model(x, labels=labels(x, p)).loss for x, p in ((ONE, 7), (OTHER, 3)))
    (one - 0.5 * other).backward()


def two_shapes(model: Any) -> None:
    sum(model(x, labels=labels(x, p)).loss for x, p in ((ONE, 7), (SHORT, 3))).backward()


def evaluation_between(model: Any) -> None:
    loss = model(ONE, labels=labels(ONE, 7)).loss
    with torch.no_grad():
        model(SHORT, labels=labels(SHORT, 2))
    loss.backward()


def reference_between(model: Any) -> None:
    loss = model(ONE, labels=labels(ONE, 7)).loss
    with torch.no_grad(), model.disable_adapter():
        model(ONE, labels=labels(ONE, 2))
    loss.backward()


def generation_between(model: Any) -> None:
    loss = model(ONE, labels=labels(ONE, 7)).loss
    mask = torch.ones_like(OTHER)
    with torch.no_grad():
        model.generate(
            OTHER, attention_mask=mask, max_new_tokens=2, do_sample=False, use_cache=False
        )
    loss.backward()


def backward_in_another_thread(model: Any) -> None:
    losses = [model(x, labels=labels(x, p)).loss for x, p in ((ONE, 7), (OTHER, 3))]
    thread = threading.Thread(target=sum(losses).backward)
    thread.start()
    thread.join()


SITUATIONS: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (
        one_forward,
        two_texts,
        two_shapes,
        evaluation_between,
        reference_between,
        generation_between,
        backward_in_another_thread,
    )
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # evaluation, reentrant
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_one_without_checkpointing(
    method: str, way: str, situation: str
) -> None:
    plain, model = (checkpointed(adapted(method), w) for w in (None, way))
    SITUATIONS[situation](plain)
    SITUATIONS[situation](model)
    assert_same_gradient(model, plain)


def test_the_control_a_block_that_is_told_another_prompt_has_another_gradient() -> None:
    one, other = (checkpointed(adapted("baft"), None) for _ in range(2))
    one(ONE, labels=labels(ONE, 7)).loss.backward()
    logits = other(ONE, prompt_lengths=[3, 3]).logits[:, :-1]
    wanted = labels(ONE, 7)[:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted).backward()
    assert (gradient(one) - gradient(other)).norm() > 0.1 * gradient(one).norm()


def sharpness(model: Any, lengths: list[int], **inputs: Tensor) -> Tensor:
    return model(**inputs, prompt_lengths=lengths).logits.logsumexp(-1).sum()


@pytest.mark.parametrize("way", WAYS)
def test_one_text_with_two_prompt_lengths(way: str) -> None:
    plain, model = (checkpointed(adapted("baft"), w) for w in (None, way))
    for each in (plain, model):
        (
            sharpness(each, [4, 4], input_ids=ONE) - 2 * sharpness(each, [9, 9], input_ids=ONE)
        ).backward()
    assert_same_gradient(model, plain)


@pytest.mark.parametrize("way", ["non-reentrant", "wrapper"])
def test_the_same_embeddings_with_two_prompt_lengths(way: str) -> None:
    """The first block may get the caller's tensor itself, twice."""
    embeddings = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for w in (None, way):
        model = checkpointed(adapted("baft", layers_to_transform=[0, 2]), w)
        given = embeddings.clone().requires_grad_()
        losses = [sharpness(model, lengths, inputs_embeds=given) for lengths in ([4, 4], [9, 9])]
        (losses[0] - 2 * losses[1]).backward()
        assert given.grad is not None
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_told_apart_is_refused() -> None:
    """Reentrant checkpointing passes aliases, and the same embeddings then stand for two prompts."""
    model = checkpointed(adapted("baft", layers_to_transform=[0, 2]), "reentrant wrapper")

    def backward(*lengths: list[int]) -> None:
        given = torch.randn(2, 10, 32, requires_grad=True)
        sum(sharpness(model, of_rows, inputs_embeds=given) for of_rows in lengths).backward()

    with pytest.raises(RuntimeError, match="several forwards with different prompts"):
        backward([4, 4], [9, 9])
    backward([4, 4], [4, 4])  # the control: two forwards that edit the same tokens


def test_activations_that_are_moved_away_and_back() -> None:
    plain, model = (checkpointed(adapted("baft"), w) for w in (None, "wrapper"))
    for each in (plain, model):
        with torch.autograd.graph.save_on_cpu():
            losses = [each(x, labels=labels(x, p)).loss for x, p in ((ONE, 7), (OTHER, 3))]
        sum(losses).backward()
    assert_same_gradient(model, plain)


@pytest.mark.parametrize("way", WAYS)
def test_adapters_that_are_switched_between_forward_and_backward(way: str) -> None:
    """The block runs again as it ran, with the adapter that was active then."""
    models = []
    for w in (None, way):
        model = adapted("baft")
        model.add_adapter("second", config_of("baft"))
        draw_adapter(model, "second", seed=2)
        model.set_adapter("default")
        models.append(checkpointed(model, w))
        loss = model(ONE, labels=labels(ONE, 7)).loss
        # Not by set_adapter, which also freezes the adapter whose gradient is wanted.
        for layer in model.base_model.own_modules():
            layer._active_adapter = ["second"]
        loss.backward()
    assert_same_gradient(models[1], models[0])


def test_rows_of_a_mixed_batch_keep_their_adapters() -> None:
    gradients = []
    for way in (None, "wrapper"):
        model = adapted("baft")
        model.add_adapter("second", config_of("baft"))
        draw_adapter(model, "second", seed=2)
        model = checkpointed(model, way).eval()  # PEFT mixes adapters in evaluation mode only
        given = model.get_input_embeddings()(ONE).detach().requires_grad_()
        rows = {"prompt_lengths": [4, 4], "adapter_names": ["second", "default"]}
        loss = model(inputs_embeds=given, **rows).logits.logsumexp(-1).sum()
        with torch.no_grad():
            model(OTHER, prompt_lengths=[9, 9], adapter_names=["__base__", "second"])
        loss.backward()
        assert given.grad is not None
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_model_run_again_needs_no_help(reentrant: bool) -> None:
    plain, model = (checkpointed(adapted("baft"), None) for _ in range(2))
    for each in (plain, model):
        each.enable_input_require_grads()

    def run(each: Any, x: Tensor, p: int) -> Tensor:
        return each(x, labels=labels(x, p)).loss

    sum(run(plain, x, p) for x, p in ((ONE, 7), (OTHER, 3))).backward()
    dummy = torch.zeros(
        (), requires_grad=True
    )  # reentrant checkpointing wants an input with a gradient
    sum(
        checkpoint(lambda _, x=x, p=p: run(model, x, p), dummy, use_reentrant=reentrant)
        for x, p in ((ONE, 7), (OTHER, 3))
    ).backward()
    assert_same_gradient(model, plain)


def checkpoint_stack(model: Any) -> None:
    """Run the stack of blocks as a whole again: it gets neither labels nor prompt lengths."""
    stack = model.get_base_model().model
    forward = stack.forward
    wrapped = checkpoint_wrapper(stack, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    assert wrapped._checkpoint_wrapped_module.forward == forward
    model.get_base_model().model = wrapped
    model.config.use_cache = False


def test_the_stack_run_again_is_the_forward_of_its_tokens() -> None:
    plain, model = (checkpointed(adapted("baft"), None) for _ in range(2))
    checkpoint_stack(model)
    for each in (plain, model):
        two_texts(each)
    assert_same_gradient(model, plain)


def test_the_stack_run_again_on_tokens_of_two_prompts_is_refused() -> None:
    model = checkpointed(adapted("baft"), None)
    checkpoint_stack(model)
    losses = [model(ONE, labels=labels(ONE, p)).loss for p in (7, 3)]
    with pytest.raises(RuntimeError, match="several forwards with different prompts"):
        sum(losses).backward()


def test_a_block_run_again_on_a_tensor_of_no_forward_is_refused() -> None:
    model = checkpointed(adapted("baft"), None)
    model(ONE, prompt_lengths=[4, 4])
    block = model.get_base_model().model.layers[1]
    angles = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    x = torch.randn(1, 4, 32, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: block(torch.randn(1, 4, 32), position_embeddings=angles) and None)
    with pytest.raises(RuntimeError, match="none of the model's forwards gave it"):
        y.sum().backward()


def entries(model: Any) -> int:
    return len(find_context(model)._calls._entries)


def test_nothing_is_kept_once_the_graph_is_gone() -> None:
    model = checkpointed(adapted("baft"), "wrapper")
    for _ in range(3):
        loss = model(ONE.clone(), labels=labels(ONE, 7)).loss
        assert entries(model) > 0
        loss.backward()
    del loss
    gc.collect()
    assert entries(model) == 0


def test_a_loop_over_one_tensor_keeps_a_bounded_number_of_calls() -> None:
    calls, owner, x = CallsByInput(), torch.nn.Identity(), torch.zeros(2)
    for i in range(1100):
        calls.remember(owner, x, Call(torch.tensor([[i]])))
    ((key, kept),) = calls._entries.items()
    assert key[1] == x.data_ptr() and len(kept) == 1001
    with pytest.raises(RuntimeError, match="several forwards"):
        calls.find(owner, x)


def test_a_model_with_open_graphs_can_be_copied_and_pickled() -> None:
    model = adapted("baft").train()
    loss = model(ONE, labels=labels(ONE, 7)).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert entries(twin) == 0
        one_forward(twin)
    loss.backward()
    assert_same_gradient(model, twin)


def test_the_load_balance_of_two_texts_in_one_loss() -> None:
    models = []
    for way in (None, "wrapper"):
        model = checkpointed(adapted("baft", base=make_model(), balance_weight=0.5), way)
        two_texts(model)
        models.append(model)
    assert_same_gradient(models[1], models[0])


def test_the_load_balance_of_a_forward_with_another_one_inside() -> None:
    """As a probe on a block does that asks the model about another text while it trains."""
    plain, model = (adapted("baft", balance_weight=0.5).train() for _ in range(2))
    one_forward(plain)
    block, seen = model.get_base_model().model.layers[0], []

    def probe(*_: Any) -> None:
        if not seen:
            seen.append(True)
            with torch.no_grad():
                model(OTHER, labels=labels(OTHER, 3))

    with block.register_forward_hook(probe):
        one_forward(model)
    assert seen
    assert_same_gradient(model, plain)


@torch.no_grad()
def test_inference_keeps_no_calls() -> None:
    model = adapted("baft")
    kept = ONE.clone()
    model(kept, prompt_lengths=[4, 4])
    assert entries(model) == 0
    model.train()(kept, prompt_lengths=[4, 4])  # the control: reentrant checkpointing runs so
    assert entries(model) == 1
