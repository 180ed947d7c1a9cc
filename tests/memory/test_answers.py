"""The vectors that say tokens: in the place of the last block's output, each makes its token the likeliest in a real forward."""

# mypy: disable-error-code="attr-defined, operator, union-attr, arg-type, index, call-arg, var-annotated"
from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

import facts
from facts import FactModel, edits
from peft_baft import BaftConfig, MemoryEditor
from peft_baft.adapter import baft_layers
from peft_baft.memory.answers import Answers, UnreachableTokenError
from peft_baft.memory.part import MemoryPart
from tiny_models import NOT_ALONE, VOCABULARY, model_types, tiny_model

fact_model = facts.fact_model
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:.*tie_word_embeddings",
)
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "phi", "phi3", "granite", "cohere", "gemma", "gemma2", "gemma3_text", "gpt2",
    "gpt_neox", "gptj", "opt", "bloom", "falcon", "mamba", "bart",
)  # fmt: skip
# Models whose last hidden vector is not the output of one block, or whose logits are not made by modules one after another.
WITHOUT_ANSWERS = {
    "inkling2_loop_text": "its logits do not follow",
    "inkling2_text": "its logits do not follow",
}


class Taught(NamedTuple):
    """A model with an empty memory, the memory, and the name of the block that it is in."""

    model: PeftModel
    part: MemoryPart
    block: str


def memory_on(base: Any) -> Taught:
    config = BaftConfig(memory={"key_dimensions": 8}, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    (layer,) = (layer for layer in baft_layers(model) if layer.parts())
    (part,) = layer.parts()
    assert isinstance(part, MemoryPart)
    return Taught(model, part, layer.name)


def sayable(answers: Answers, size: int) -> tuple[list[int], Tensor, list[int]]:
    """The tokens that can be said, the vectors that say them, and those that are refused."""
    tokens, refused = list(range(size)), []
    while True:
        try:
            return tokens, answers.vectors(tokens)[0], refused
        except UnreachableTokenError as error:
            assert f"makes token {error.token} the most probable" in str(error)
            tokens.remove(error.token)
            refused.append(error.token)


def logits_after(model: Any, block: str, vectors: Tensor) -> Tensor:
    """The logits (n, vocabulary) of a forward in which the last block's output is another one at each row's last token."""

    def put(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple | list) else output).clone()
        hidden[:, -1] = vectors.to(hidden.dtype)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = model.get_submodule(block).register_forward_hook(put)
    try:
        with torch.no_grad():
            ids = torch.ones(len(vectors), 2, dtype=torch.long)
            return model(input_ids=ids).logits[:, -1].float()
    finally:
        handle.remove()


def require_all_said(base: Any, plain: Any, refused: Sequence[int] = ()) -> Taught:
    """Assert that a model says exactly the tokens that are not refused, by the vectors of a memory on it."""
    memory = memory_on(base)
    size = plain.get_output_embeddings().weight.shape[0]
    tokens, vectors, unsayable = sayable(memory.part.answers(), size)
    assert unsayable == list(refused)
    assert logits_after(plain, memory.block, vectors).argmax(-1).tolist() == tokens
    return memory


def test_a_row_that_a_resizing_made_of_the_mean_of_all_is_refused() -> None:
    base = tiny_model("llama")
    base.resize_token_embeddings(VOCABULARY + 3)
    plain = deepcopy(base)
    require_all_said(base, plain, range(VOCABULARY, VOCABULARY + 3))


def zero_rows(model: Any) -> list[int]:
    weight = model.get_output_embeddings().weight
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return [] if bias is not None else (weight == 0).all(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_said_but_those_whose_row_of_the_head_is_zero(family: str) -> None:
    base = tiny_model(family)
    plain = deepcopy(base)
    memory = require_all_said(base, plain, zero_rows(plain))
    # The control: a usual output of the block says one token only, and rows of the head as they are do not say all.
    typical = memory.part.answers().tail.typical
    usual = logits_after(plain, memory.block, typical.repeat(4, 1))
    assert len(set(usual.argmax(-1).tolist())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(model_types()) - {*FAMILIES, *NOT_ALONE}))
def test_a_model_says_every_token_or_is_refused_with_the_reason(family: str) -> None:
    try:
        base = tiny_model(family)
    except ImportError as error:
        pytest.skip(str(error))
    plain = deepcopy(base)
    try:
        memory = memory_on(base)
    except ValueError as error:  # no kind of adapter takes it
        pytest.skip(str(error)[:100])
    if family in WITHOUT_ANSWERS:
        with pytest.raises(NotImplementedError, match=WITHOUT_ANSWERS[family]):
            memory.part.answers()
        return
    tokens, vectors, refused = sayable(memory.part.answers(), VOCABULARY)
    assert refused in ([], [0])  # padding, whose row of the embeddings is zero
    assert logits_after(plain, memory.block, vectors).argmax(-1).tolist() == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_knows_facts_says_every_token_with_a_margin(
    fact_model: FactModel, dtype: torch.dtype
) -> None:
    base: Any = deepcopy(fact_model.base).to(dtype)
    plain = deepcopy(base)
    memory = memory_on(base)
    answers = memory.part.answers()
    tokens = list(range(len(fact_model.tokenizer)))
    vectors, likely = answers.vectors(tokens)
    logits = logits_after(plain, memory.block, vectors)
    assert logits.argmax(-1).tolist() == tokens
    index = torch.arange(len(tokens))
    own = logits[index, index]
    # What is promised of each token's probability is what the model gives it.
    chance = (own - logits.logsumexp(-1)).exp()
    torch.testing.assert_close(likely, chance, atol=2e-2, rtol=5e-2)
    logits[index, index] = -torch.inf
    assert (own > 1.1 * logits.amax(-1)).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "cohere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_token_is_said_in_low_precision(family: str, dtype: torch.dtype) -> None:
    base = tiny_model(family).to(dtype)
    plain = deepcopy(base)
    require_all_said(base, plain, zero_rows(plain))


def with_bias(model: Any) -> Any:
    """A head with a bias that is about as large as its products."""
    head = model.lm_head
    model.lm_head = nn.Linear(head.in_features, head.out_features)
    model.lm_head.weight = head.weight
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(-0.5, 0.5, head.out_features))
    return model


def resized(model: Any) -> Any:
    model.resize_token_embeddings(VOCABULARY + 9)
    with torch.no_grad():  # rows that were trained: new ones are the mean of all
        model.lm_head.weight[VOCABULARY:].normal_(generator=torch.Generator().manual_seed(2)).mul_(
            0.1
        )
    return model


def lora_on_the_head(model: Any) -> Any:
    # Injected, and strong enough to change what a vector says.
    found = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"])).get_base_model()
    torch.manual_seed(5)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return found.eval()


def saved_head(model: Any) -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = get_peft_model(model, config).get_base_model()
    torch.manual_seed(5)
    nn.init.normal_(found.lm_head.modules_to_save["default"].weight, std=0.2)
    return found.eval()


HEADS: dict[str, Callable[[], Any]] = {
    "tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "untied": lambda: tiny_model("llama", tie_word_embeddings=False),
    "bias": lambda: with_bias(tiny_model("llama")),
    "resized": lambda: resized(tiny_model("llama")),
    "tied and resized": lambda: resized(tiny_model("llama", tie_word_embeddings=True)),
    "soft cap": lambda: tiny_model("gemma2", final_logit_softcapping=5.0),
    "scaled": lambda: tiny_model("cohere", logit_scale=0.05),
    "divided": lambda: tiny_model("granite", logits_scaling=7.0),
}
OF_OTHER_ADAPTERS = {"LoRA on the head": lora_on_the_head, "saved head": saved_head}


@pytest.mark.parametrize("name", HEADS)
def test_every_token_is_said_whatever_the_head(name: str) -> None:
    base = HEADS[name]()
    plain = deepcopy(base)
    require_all_said(base, plain, zero_rows(plain))


@pytest.mark.parametrize("name", OF_OTHER_ADAPTERS)
def test_every_token_is_said_by_a_head_that_another_adapter_changes(name: str) -> None:
    base = tiny_model("llama", tie_word_embeddings=False)
    before = deepcopy(base)
    changed = OF_OTHER_ADAPTERS[name](base)
    plain = deepcopy(changed)
    require_all_said(changed, plain)
    # The control: with vectors for the head as it was, this one says other tokens.
    memory = memory_on(before)
    tokens, vectors, _ = sayable(memory.part.answers(), VOCABULARY)
    assert logits_after(plain, memory.block, vectors).argmax(-1).tolist() != tokens


@pytest.mark.parametrize("name", OF_OTHER_ADAPTERS)
def test_vectors_follow_an_adapter_that_is_switched_off(name: str) -> None:
    base = tiny_model("llama", tie_word_embeddings=False)
    before = deepcopy(base)
    memory = memory_on(OF_OTHER_ADAPTERS[name](base))
    first = memory.part.answers()
    assert memory.part.answers() is first  # the control: it is made once
    for module in memory.model.modules():
        if isinstance(module, LoraLayer | ModulesToSaveWrapper):
            module.enable_adapters(False)
    assert not first.tail.is_current()
    tokens, vectors, refused = sayable(memory.part.answers(), VOCABULARY)
    assert refused == []
    assert logits_after(before, memory.block, vectors).argmax(-1).tolist() == tokens


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))


def change_through_data(model: Any) -> None:
    model.lm_head.weight.data.copy_(model.lm_head.weight.data.flip(0))


def change_the_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())


def change_the_module(model: Any) -> None:
    model.lm_head = deepcopy(model.lm_head)
    change_in_place(model)


def change_the_norm(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.neg_()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_through_data,
        change_the_parameter,
        change_the_module,
        change_the_norm,
        resized,
    ],
)
def test_vectors_follow_weights_that_change_after_teaching(
    change: Callable[[Any], Any],
) -> None:
    base = tiny_model("llama", tie_word_embeddings=False)
    memory = memory_on(base)
    first = memory.part.answers()
    tokens = list(range(VOCABULARY))
    vectors, _ = first.vectors(tokens)
    change(base)
    with memory.model.disable_adapter():
        stale = logits_after(base, memory.block, vectors).argmax(-1).tolist()
        assert not first.tail.is_current()
        found = memory.part.answers().vectors(tokens)[0]
        assert logits_after(base, memory.block, found).argmax(-1).tolist() == tokens
    if change is not resized:
        assert stale != tokens  # the control


def test_a_taught_answer_is_said_by_weights_that_changed_afterwards(fact_model: FactModel) -> None:
    base: Any = deepcopy(fact_model.base)
    editor = MemoryEditor(memory_on(base).model, fact_model.tokenizer)
    (fact,) = edits(3)
    editor.edit([fact])
    ids = fact_model.tokenizer(str(fact.prompt), return_tensors="pt")["input_ids"]

    def said() -> int:
        with torch.no_grad():
            return int(editor.model(input_ids=ids).logits[0, -1].argmax())

    (first, *_) = fact_model.tokenizer(f" {fact.target}")["input_ids"]
    assert said() == first
    base.lm_head.weight.data = base.lm_head.weight.data.flip(0)
    assert said() == first
    # The control: the same words are said by other vectors now.
    base.lm_head.weight.data = base.lm_head.weight.data.flip(0)
    assert said() == first


def test_a_token_that_cannot_be_said_is_refused_with_its_text(fact_model: FactModel) -> None:
    base: Any = deepcopy(fact_model.base)
    (fact,) = edits(0)
    (token, *_) = fact_model.tokenizer(f" {fact.target}")["input_ids"]
    with torch.no_grad():
        # Between two others, it is never likelier than both.
        base.lm_head.weight[token] = base.lm_head.weight[[token + 1, token + 2]].mean(0)
    editor = MemoryEditor(memory_on(base).model, fact_model.tokenizer)
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    with pytest.raises(
        UnreachableTokenError, match=rf"token {token} \(' {fact.target}'\) the most"
    ):
        editor.edit([*edits(5), fact])
    assert editor.numbers == []
    assert all(torch.equal(tensor, before[n]) for n, tensor in editor.state_dict().items())
    editor.edit(edits(5))  # the control: other answers can be taught
    assert editor.numbers == [1]


def test_a_model_whose_last_steps_are_unknown_is_refused(fact_model: FactModel) -> None:
    class Odd(type(fact_model.base)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.sin()
            return output

    base: Any = deepcopy(fact_model.base)
    base.__class__ = Odd
    with pytest.raises(NotImplementedError, match=r"could not be replayed.*Use a plain adapter"):
        MemoryEditor(memory_on(base).model, fact_model.tokenizer)
