"""What takes a model or a tokenizer refuses the wrong kind, and says which it wants."""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import get_peft_model
from torch import Tensor, nn

import peft_baft
from conftest import make_model
from peft_baft import AdapterEditor, BaftConfig, BaftEditor
from peft_baft.adapter import baft_layers
from peft_baft.integrations.loreft import save_loreft
from peft_baft.tools.inspect.inspect import inspect
from side_by_side import config_of

# By PEFT, at every second adapter.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{beginning}")
    for beginning in (
        "You are trying to modify a model with PEFT for a second",
        "Already found a `peft_config`",
    )
]


def entered(context: Any) -> None:
    with context:
        pass


def baft() -> Any:
    return get_peft_model(make_model(), config_of("baft"))


def lora_around_baft() -> Any:
    """A PeftModel of a LoRA whose base model carries a BaFT adapter of the same name."""
    return get_peft_model(baft(), config_of("lora"))


TOKENIZER = SimpleNamespace(is_fast=True, chat_template=None)
# A function of a model, and what it says of a base model without an adapter; None where it takes one.
TAKES_A_MODEL: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "BaftEditor": (
        lambda model: BaftEditor(model, TOKENIZER),
        "needs a PeftModel, from get_peft_model",
    ),
    "AdapterEditor": (
        lambda model: AdapterEditor(model, TOKENIZER),
        "needs a PeftModel, from get_peft_model",
    ),
    "prompt_lengths": (
        lambda model: entered(peft_baft.prompt_lengths(model, [3])),
        "needs a model with a BaFT adapter",
    ),
    "rolled_back": (lambda model: entered(peft_baft.rolled_back(model)), None),
    "check": (lambda model: peft_baft.check(model), None),
    "inspect": (lambda model: inspect(model, TOKENIZER, "a"), "PeftModel.from_pretrained"),
    "save_loreft": (lambda model: save_loreft(model, Path("nowhere")), "no BaFT adapter 'default'"),
}


@pytest.mark.parametrize("name", [n for n, (_, message) in TAKES_A_MODEL.items() if message])
def test_a_model_without_an_adapter_is_refused_with_what_to_do(name: str) -> None:
    function, message = TAKES_A_MODEL[name]
    with pytest.raises((TypeError, ValueError), match=message):
        function(make_model())


@pytest.mark.parametrize("thing", [None, "a name", nn.Module], ids=["none", "name", "class"])
@pytest.mark.parametrize("name", TAKES_A_MODEL)
def test_what_is_not_a_model_is_refused(name: str, thing: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        TAKES_A_MODEL[name][0](thing)


@pytest.mark.parametrize("name", ["BaftEditor", "check", "inspect", "save_loreft"])
def test_a_peft_model_of_another_method_around_an_edit_of_the_same_name_is_refused(
    name: str,
) -> None:
    # It would be the LoRA's parameters, switch and base model, though the blocks have an adapter of that name.
    with pytest.raises((TypeError, ValueError), match="BaFT adapter"):
        TAKES_A_MODEL[name][0](lora_around_baft())


@pytest.mark.parametrize("editor", [BaftEditor, AdapterEditor])
@pytest.mark.parametrize(
    "tokenizer",
    [None, "a name", SimpleNamespace(tokenizer=TOKENIZER)],
    ids=["none", "name", "processor"],
)
def test_an_editor_refuses_what_is_not_a_fast_tokenizer_when_it_is_made(
    editor: Any, tokenizer: Any
) -> None:
    with pytest.raises(TypeError, match="fast tokenizer, as AutoTokenizer loads it"):
        editor(baft(), tokenizer)


def test_the_tuner_of_another_method_counts_as_the_peft_model_around_it(tokens: Tensor) -> None:
    lora = get_peft_model(make_model(), config_of("lora"))
    for given in (lora, lora.base_model):
        model = get_peft_model(deepcopy(given), BaftConfig(r=4)).eval()  # type: ignore[arg-type]
        names = [layer.name for layer in baft_layers(model)]
        assert names == [f"model.layers.{i}" for i in range(4)]
        assert model.generate(input_ids=tokens, max_new_tokens=2).shape == (2, 9)
