"""Adapter weights that change between two forwards, in ways that autograd is not told of: averages, teachers, broadcasts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from conftest import make_model
from peft_baft.adapter.parameters import OrthonormalBasis
from peft_baft.intervention import orthonormal_rows
from side_by_side import METHODS, adapted

Change = Callable[[nn.Parameter, Tensor], object]


def _replace_data(parameter: nn.Parameter, new: Tensor) -> None:
    parameter.data = new.clone()


def _write_through_numpy(parameter: nn.Parameter, new: Tensor) -> None:
    memory = parameter.detach().numpy()  # writes that torch cannot see at all
    memory[...] = new.numpy()


CHANGES: dict[str, Change] = {
    "data.copy_": lambda p, new: p.data.copy_(new),
    "data.lerp_": lambda p, new: p.data.lerp_(new, 0.7),
    "set_": lambda p, new: p.set_(new.clone()),  # type: ignore[call-overload]
    "data =": _replace_data,
    "numpy": _write_through_numpy,
    "copy_": lambda p, new: p.copy_(new),
}


def _change_adapter(model: nn.Module, change: Change, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".default" in name:
            with torch.no_grad():
                change(parameter, torch.randn(parameter.shape, generator=generator))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_the_next_forward_uses_weights_that_were_changed_through_data(
    method: str, change: str, trainable: bool, tokens: Tensor, tmp_path: Path
) -> None:
    model = adapted(method)
    model.requires_grad_(trainable)
    before = _logits(model, tokens)
    _change_adapter(model, CHANGES[change])
    after = _logits(model, tokens)
    assert not torch.allclose(after, before, atol=0.1)
    model.save_pretrained(str(tmp_path))
    reloaded = PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()
    assert torch.equal(after, _logits(reloaded, tokens))


@pytest.mark.parametrize("method", METHODS)
def test_an_average_is_swapped_in_for_an_evaluation_and_out_again(
    method: str, tokens: Tensor
) -> None:
    model = adapted(method)
    first = _logits(model, tokens)
    stored = {name: p.detach().clone() for name, p in model.named_parameters()}
    _change_adapter(model, CHANGES["data.copy_"])
    second = _logits(model, tokens)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(stored[name])
    assert torch.equal(_logits(model, tokens), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("pack_ranks", [None, [1, 3]])
def test_a_basis_is_that_of_its_weight_and_is_made_once_for_the_same_values(
    pack_ranks: list[int] | None,
) -> None:
    basis = OrthonormalBasis(4, 8, pack_ranks).requires_grad_(False)
    packs = [basis.weight] if pack_ranks is None else basis.weight.split(pack_ranks)
    first = basis()
    assert torch.equal(first, torch.cat([orthonormal_rows(pack) for pack in packs]))
    assert basis() is first
    basis.weight.data.neg_()
    assert torch.equal(basis(), -first)
    precise = basis.double()()  # another dtype is another weight
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise, -first.double())


def test_a_basis_without_values_is_made_without_looking_at_them() -> None:
    basis = OrthonormalBasis(4, 8).requires_grad_(False).to("meta")
    assert basis().shape == (4, 8)
    assert basis().is_meta
