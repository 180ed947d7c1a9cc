"""`inspect` measures what an edit does to one prompt, and leaves the model as it was."""

# mypy: disable-error-code="arg-type, attr-defined, index, union-attr"
from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import facts
from adapters import is_bare
from conftest import randomise
from facts import CAPITALS, WINDOW, FactModel, adapted
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft.evaluation.scoring import greedy_answers
from peft_baft.tools.inspect.inspect import Cell, Inspection, inspect
from peft_baft.tools.inspect.token_text import token_text, visible

fact_model = facts.fact_model
PROMPT = CAPITALS[0].prompt  # five words, a token each


def edited_model(base: Any, **settings: Any) -> PeftModel:
    model = adapted(
        base,
        **{"gate_offset": 0.0, "layers_to_transform": [1, 2], "prompt_positions": 2, **settings},
    )
    randomise(model, scale=1.0)
    return model.eval()


@pytest.fixture(scope="module")
def model(fact_model: FactModel) -> PeftModel:
    return edited_model(fact_model.base)


@pytest.fixture(scope="module")
def seen(model: PeftModel, fact_model: FactModel) -> Inspection:
    return inspect(model, fact_model.tokenizer, PROMPT, max_new_tokens=4)


def hidden_before(model: PeftModel, ids: list[int], layer: Any) -> torch.Tensor:
    """What goes into one block's adapter, (tokens, d)."""
    kept = []
    handle = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    labels = torch.tensor([[-100] * 5 + ids[5:]])
    model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False)
    handle.remove()
    return kept[0]


@torch.no_grad()
def test_gates_and_updates_are_those_of_the_formula(model: PeftModel, seen: Inspection) -> None:
    """Φ(h) = h + Σ_i w_i (A_i h + b_i - R_i h) R_i, one token and one basis vector at a time."""
    ids = [token.id for token in seen.tokens]
    assert [block.name for block in seen.blocks] == ["model.layers.1", "model.layers.2"]
    for layer, block in zip(baft_layers(model), seen.blocks, strict=True):
        R, source, gate = (
            part["default"] for part in (layer.baft_basis, layer.baft_source, layer.baft_gate)
        )
        for i, h in enumerate(hidden_before(model, ids, layer)):
            if i < 3:
                assert block.cells[i] == Cell(0.0, {})
                continue
            w = torch.sigmoid(gate.weight @ (h / h.square().mean().sqrt()))
            update = sum(w[k] * (source.weight[k] @ h + source.bias[k]) * R()[k] for k in range(4))
            assert block.cells[i].gates["default"] == pytest.approx(w.tolist(), abs=1e-4)
            assert block.cells[i].size == pytest.approx((update.norm() / h.norm()).item(), rel=1e-4)
            assert block.cells[i].size > 0.01


def test_only_the_last_prompt_tokens_and_the_answer_are_edited(seen: Inspection) -> None:
    assert [token.text for token in seen.tokens[:5]] == ["the", " capital", " of", " Arvia", " is"]
    assert [token.answer for token in seen.tokens] == [False] * 5 + [True] * (len(seen.tokens) - 5)
    assert len(seen.tokens) == 9 and seen.prompt_end == 4
    assert [token.edited for token in seen.tokens] == [False] * 3 + [True] * 6
    assert not any(token.changes or token.moved for token in seen.tokens[:3])


@torch.no_grad()
def test_probabilities_are_the_models_own_without_and_with_the_edits(
    model: PeftModel, fact_model: FactModel, seen: Inspection
) -> None:
    ids = torch.tensor([[token.id for token in seen.tokens[:5]]])
    without, edited = (m(input_ids=ids).logits[0, -1].softmax(-1) for m in (fact_model.base, model))
    end = seen.tokens[4]
    for change in end.changes:
        assert (change.before, change.after) == pytest.approx(
            (without[change.id].item(), edited[change.id].item()), rel=1e-4
        )
    assert (
        end.moved == pytest.approx((edited - without).abs().sum().item() / 2, abs=1e-5)
        and end.moved > 0.05
    )
    # Two of ten places may be taken by what must be shown.
    most = (edited - without).abs().topk(8).indices.tolist()
    assert len(end.changes) == 10 and {*most, int(without.argmax()), int(edited.argmax())} <= {
        c.id for c in end.changes
    }
    rise = [change.after - change.before for change in end.changes]
    assert rise == sorted(rise, reverse=True)


def test_candidates_over_the_whole_vocabulary_sum_to_one(
    model: PeftModel, fact_model: FactModel
) -> None:
    whole = inspect(model, fact_model.tokenizer, PROMPT, max_new_tokens=1, top=10_000)
    for token in whole.tokens[3:]:
        assert len(token.changes) == len(fact_model.tokenizer)
        assert sum(c.before for c in token.changes) == pytest.approx(1, abs=1e-4)
        assert sum(c.after for c in token.changes) == pytest.approx(1, abs=1e-4)


def test_the_answers_are_those_of_greedy_decoding(
    model: PeftModel, fact_model: FactModel, seen: Inspection
) -> None:
    assert seen.after == greedy_answers(model, fact_model.tokenizer, [PROMPT], 4)[0]
    assert seen.before == greedy_answers(fact_model.base, fact_model.tokenizer, [PROMPT], 4)[0]
    assert seen.before.startswith(CAPITALS[0].answer) and seen.after != seen.before
    assert "".join(token.text for token in seen.tokens if token.answer).strip() == seen.after


def test_the_tokens_of_the_answer_end_with_its_first_line(
    model: PeftModel, fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = fact_model.tokenizer("\n Kasgrad\n is", return_tensors="pt")["input_ids"]
    monkeypatch.setattr("peft_baft.tools.inspect.inspect.greedy_tokens", lambda *_: ids)
    found = inspect(model, fact_model.tokenizer, PROMPT)
    assert [token.text for token in found.tokens if token.answer] == [
        "\n",
        " Kasgrad",
    ] and found.after == "Kasgrad"


def test_favourites_and_the_answers_token_are_candidates_however_few_are_asked_for(
    model: PeftModel, fact_model: FactModel, seen: Inspection
) -> None:
    whole = inspect(model, fact_model.tokenizer, PROMPT, max_new_tokens=4, top=10_000)
    few = inspect(model, fact_model.tokenizer, PROMPT, max_new_tokens=4, top=1)
    for i in range(3, 8):
        every = whole.tokens[i].changes
        wanted = {
            max(every, key=lambda c: c.before).id,
            max(every, key=lambda c: c.after).id,
            seen.tokens[i + 1].id,
        }
        assert {change.id for change in few.tokens[i].changes} == wanted


def test_the_model_is_left_as_it_was(fact_model: FactModel) -> None:
    model = edited_model(fact_model.base)
    model.add_adapter("other", BaftConfig(task_type="CAUSAL_LM", r=2, layers_to_transform=[0]))
    model.base_model.model.model.layers[0].train()
    names = [name for name, p in model.named_parameters() if p.requires_grad][:2]
    model.get_parameter(names[0]).requires_grad_(False)

    def state() -> Any:
        flags = {name: (p.requires_grad, p._version) for name, p in model.named_parameters()}
        modes = {name: m.training for name, m in model.named_modules()}
        hooks = {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        }
        return flags, modes, hooks, model.active_adapters, torch.get_rng_state().tolist()

    before = state()
    assert (
        before[1]["base_model.model.model.layers.0"]
        and not before[1]["base_model.model.model.layers.1"]
    )
    inspect(model, fact_model.tokenizer, PROMPT, max_new_tokens=2)
    assert state() == before
    assert is_bare(model.unload())


def test_dropout_is_off_while_looking(fact_model: FactModel) -> None:
    model = edited_model(fact_model.base)
    looked = inspect(model, fact_model.tokenizer, PROMPT, max_new_tokens=2)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert inspect(model.train(), fact_model.tokenizer, PROMPT, max_new_tokens=2) == looked


def test_an_adapter_without_gates_is_always_open(fact_model: FactModel) -> None:
    reft = edited_model(fact_model.base, weighting="none")
    found = inspect(reft, fact_model.tokenizer, PROMPT, max_new_tokens=1)
    assert (
        found.blocks[0].cells[4].gates == {"default": (1.0,) * 4}
        and found.blocks[0].cells[2].gates == {}
    )
    assert found.blocks[0].cells[4].size > 0


def test_several_active_adapters_are_told_apart(fact_model: FactModel) -> None:
    model = edited_model(fact_model.base)
    model.add_adapter(
        "other", BaftConfig(task_type="CAUSAL_LM", r=2, prompt_positions=1, layers_to_transform=[2])
    )
    model.base_model.set_adapter(["default", "other"])
    found = inspect(model, fact_model.tokenizer, PROMPT, max_new_tokens=1)
    assert [adapter.name for adapter in found.adapters] == ["default", "other"]
    first, second = (block.cells for block in found.blocks)
    assert {name: len(w) for name, w in second[4].gates.items()} == {"default": 4, "other": 2}
    assert set(second[3].gates) == set(first[4].gates) == {"default"}


def test_what_cannot_be_inspected_is_refused_with_advice(
    model: PeftModel, fact_model: FactModel
) -> None:
    base, tokenizer = fact_model
    lora = get_peft_model(
        edited_model(base).unload(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    with pytest.raises(TypeError, match=r"has LORA\. Load a BaFT adapter with"):
        inspect(lora, tokenizer, PROMPT)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has no adapter\. Load"):
        inspect(base, tokenizer, PROMPT)  # type: ignore[arg-type]
    with model.disable_adapter(), pytest.raises(ValueError, match="set_adapter"):
        inspect(model, tokenizer, PROMPT)
    with pytest.raises(ValueError, match="half a character"):
        inspect(model, tokenizer, "the \ud800")
    with pytest.raises(ValueError, match="at least 1, not 0 and 10"):
        inspect(model, tokenizer, PROMPT, max_new_tokens=0)
    for prompt, length in ((" \n ", 0), ("the " * WINDOW, WINDOW)):
        with pytest.raises(ValueError, match=f"has {length} tokens"):
            inspect(model, tokenizer, prompt)


def test_an_answer_ends_at_the_context_window(model: PeftModel, fact_model: FactModel) -> None:
    assert len(inspect(model, fact_model.tokenizer, "the " * (WINDOW - 2)).tokens) == WINDOW


def test_broken_arithmetic_is_said(fact_model: FactModel) -> None:
    model = edited_model(fact_model.base)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="float32"):
        inspect(model, fact_model.tokenizer, PROMPT)


class ByteTokenizer:
    """What `token_text` asks of a tokenizer, with pieces as byte-level BPE and SentencePiece write them."""

    PIECES = ("Ġnew", "æĹ", "▁new", "<0xE6>", "<s>", "Ġa\x00")
    TEXTS = (" new", "\ufffd", "new", "\ufffd", "", " a\ufffd")

    def decode(self, ids: list[int]) -> str:
        return self.TEXTS[ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.PIECES[token]


def test_a_token_reads_as_its_text_with_its_space_and_its_bytes() -> None:
    texts = [token_text(ByteTokenizer(), i) for i in range(6)]
    assert texts == [" new", "‹E6 97›", " new", "‹E6›", "‹token 4›", "‹token 5›"]
    assert visible(" a\n\t\u200b\u202e") == "·a↵⇥‹U+200B›‹U+202E›"
