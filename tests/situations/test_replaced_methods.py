"""A `generate` or `forward` that was replaced on the base model itself stays in force, and is there again after `unload`."""

# mypy: disable-error-code="attr-defined, operator, union-attr, method-assign, assignment"
from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters import is_bare
from conftest import VOCABULARY, make_model
from side_by_side import METHODS, adapted

PROMPT = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 4}
SETTINGS |= {"do_sample": False, "pad_token_id": 0}


def patch(base: Any, names: list[str]) -> list[str]:
    """Replace methods of a model by ones that note their call, and return the notes."""
    calls: list[str] = []
    for name in names:

        def replacement(self: Any, *args: Any, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(type(self), name)(self, *args, **kwargs)

        setattr(base, name, types.MethodType(replacement, base))
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_was_replaced_before_is_still_called(method: str) -> None:
    wanted = adapted(method).generate(PROMPT, **SETTINGS)
    base = make_model()
    calls = patch(base, ["generate", "forward"])
    model = adapted(method, base)
    assert torch.equal(model.generate(PROMPT, **SETTINGS), wanted)
    assert {"generate", "forward"} <= set(calls)
    calls.clear()
    unloaded = model.unload()
    unloaded.generate(PROMPT, **SETTINGS)
    assert {"generate", "forward"} <= set(calls)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_replaced_later_stays_after_unload(method: str) -> None:
    plain = make_model().generate(PROMPT, **SETTINGS)
    model = adapted(method)
    wanted, base, calls = model.generate(PROMPT, **SETTINGS), model.get_base_model(), []
    ours = base.generate

    def logged(*args: Any, **kwargs: Any) -> Any:
        calls.append("generate")
        return ours(*args, **kwargs)

    base.generate = logged
    assert torch.equal(model.generate(PROMPT, **SETTINGS), wanted) and calls
    assert not torch.equal(wanted, plain)  # the control: the adapter changes what is said
    calls.clear()
    unloaded = model.unload()
    assert torch.equal(unloaded.generate(PROMPT, **SETTINGS), plain) and calls


def test_without_a_replacement_nothing_is_left() -> None:
    model = adapted("baft")
    assert "generate" in vars(model.get_base_model())
    assert is_bare(model.unload())


def test_a_copy_calls_its_own_replacement() -> None:
    base = make_model()
    patch(base, ["generate"])
    model: PeftModel = adapted("baft", base)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.get_base_model().lm_head.parameters():
            parameter.neg_()
    assert not torch.equal(twin.generate(PROMPT, **SETTINGS), model.generate(PROMPT, **SETTINGS))
    assert vars(twin.unload())["generate"].__self__ is twin.get_base_model()
