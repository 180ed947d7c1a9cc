"""Products with packed weights are the layers' own products."""

# mypy: disable-error-code="assignment, index, method-assign, union-attr"
from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.data.batching import Tokens
from peft_baft.editing.acceleration import packed_linear
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.editing.acceleration.packed_linear import (
    PackedWeight,
    packed_forwards,
    packed_weight,
)
from peft_baft.editing.edit_cache import EditCache

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


ROW = Tokens((5, 6, 7, 8, 9, 10), 4)


def frozen(out: int = 48, wide: int = 32, bias: bool = True, **to: Any) -> nn.Linear:
    return nn.Linear(wide, out, bias=bias).requires_grad_(False).to(**to)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 5), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_the_layers_own(shape: tuple[int, ...], bias: bool) -> None:
    layer, h = frozen(bias=bias), torch.randn(*shape, 32, requires_grad=True)
    forward, toward = packed_forwards([layer], {})[layer], torch.randn(*shape, 48)
    torch.testing.assert_close(forward(h), layer(h))
    found, wanted = (torch.autograd.grad(out(h), h, toward)[0] for out in (forward, layer))
    torch.testing.assert_close(found, wanted)


def test_weights_changed_in_place_are_packed_anew_and_others_are_not() -> None:
    layer, h = frozen(), torch.randn(4, 32)
    packed: dict[nn.Module, PackedWeight] = {}
    packed_forwards([layer], packed)
    first = packed[layer]
    packed_forwards([layer], packed)
    assert packed[layer] is first
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(packed_forwards([layer], packed)[layer](h), layer(h))
    assert packed[layer] is not first


def test_only_frozen_float32_weights_of_plain_linear_layers_are_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(nn.Linear):
        pass

    moved = frozen()
    moved.forward = lambda h: h  # as accelerate's hooks leave it
    assert not packed_forwards(
        [nn.Linear(4, 4), frozen(dtype=torch.bfloat16), frozen(device="meta"), Other(4, 4), moved],
        {},
    )
    layer = frozen()
    assert packed_forwards([layer], {})
    monkeypatch.setattr(packed_linear, "LARGEST", layer.weight.numel() - 1)
    assert not packed_forwards([layer], {})


def test_autocast_computes_as_it_would() -> None:
    layer, h = frozen(), torch.randn(4, 32)
    forward = packed_forwards([layer], {})[layer]
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(h).dtype == layer(h).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data.copy_(weight.data.flip(0)),  # the same values in other places
        lambda weight: weight.data.copy_(weight.data.flip(1)),
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: weight.numpy().__setitem__((3, 5), 7.0),
    ],
)
def test_a_write_that_pointer_and_version_may_not_tell_of_is_seen(write: Any) -> None:
    layer, h = frozen(), torch.randn(4, 32)
    packed: dict[nn.Module, PackedWeight] = {}
    before = packed_forwards([layer], packed)[layer](h)
    write(layer.weight.detach() if "numpy" in write.__code__.co_names else layer.weight)
    after = packed_forwards([layer], packed)[layer](h)
    torch.testing.assert_close(after, layer(h))
    assert not torch.allclose(after, before)


def test_layers_that_are_no_longer_packed_are_dropped() -> None:
    layer, other = frozen(), frozen()
    packed: dict[nn.Module, PackedWeight] = {}
    packed_forwards([layer, other], packed)
    packed_forwards([layer.requires_grad_(), other], packed)
    assert set(packed) == {other}


def test_a_weight_is_packed_whatever_the_default_dtype() -> None:
    packed_linear._direction.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = frozen(dtype=torch.float32)
        assert (
            packed_forwards([layer], {})[layer](torch.ones(1, 32, dtype=torch.float32))
            .isfinite()
            .all()
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_edit_uses_them_and_transposes_above_the_first_edited_block_alone() -> None:
    model = get_peft_model(
        make_model("llama"), BaftConfig(task_type="CAUSAL_LM", r=4, layers_to_transform=[1])
    )
    session = CachedPrefix.build(model, [ROW], [0], 0, torch.device("cpu"), prompt_positions=3)
    base, kept = model.get_base_model(), EditCache.of(model).packed
    linear = {m for m in base.modules() if type(m) is nn.Linear and not m.weight.requires_grad}
    above = {
        m for block in base.model.layers[2:] for m in block.modules() if type(m) is nn.Linear
    } | {base.lm_head}
    assert above < linear == set(session.packed)
    own = [m.forward for m in linear]
    session.losses().sum().backward()
    assert [m.forward for m in linear] == own
    assert not any("forward" in m.__dict__ for m in linear)
    assert {m for m in linear if "transposed" in vars(packed_weight(m, kept))} == above
