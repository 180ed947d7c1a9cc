"""Editing a toy model that knows 48 facts: what is learned, what stays, and that failures leave no trace."""

# mypy: disable-error-code="arg-type, assignment, func-returns-value"
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import facts
from facts import CAPITALS, DESCENT, MEALS, OBJECTIVE, FactModel, adapted, edits, meals, questions
from peft_baft import (
    NARROW,
    AdapterEditor,
    BaftConfig,
    BaftEditor,
    DescentConfig,
    Edit,
    Objective,
    Unrelated,
    rolled_back,
)
from peft_baft.adapter import baft_layers, find_context
from peft_baft.adapter.state import adapter_tensors
from peft_baft.data.batching import collate, encode
from peft_baft.editing import baft as baft_module
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.editing.answers import FullForward
from peft_baft.evaluation.scoring import agreement, greedy_answers, predicted_tokens, token_match

fact_model = facts.fact_model
Setting = tuple[PeftModel, BaftEditor]


def editor_of(
    model: PeftModel, unrelated: list[Unrelated] | None = None, **given: Any
) -> BaftEditor:
    """An editor with the tests' settings, beside the first half of the meals."""
    texts = meals(0, 12) if unrelated is None else unrelated
    settings: dict[str, Any] = {
        "objective": OBJECTIVE,
        "descent": DESCENT,
        "batch_descent": DESCENT,
        "unrelated_per_edit": 4,
    }
    return BaftEditor(model, facts.trained().tokenizer, texts, **(settings | given), scope=NARROW)


@pytest.fixture
def baft(fact_model: FactModel) -> Setting:
    """A model with a fresh BaFT adapter and its editor."""
    model = adapted(fact_model.base)
    return model, editor_of(model)


@pytest.fixture
def lora(fact_model: FactModel) -> tuple[PeftModel, AdapterEditor]:
    """A LoRA adapter that also trains a whole module, and its editor."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(deepcopy(fact_model.base), config)
    return model, AdapterEditor(model, fact_model.tokenizer, DESCENT)


def state(model: PeftModel) -> dict[str, Any]:
    """All that a failed edit must leave alone: every tensor, flag, gradient and mode of the model."""
    tensors = {
        name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()
    }
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return {
        "tensors": tensors,
        "flags": flags,
        "modes": [module.training for module in model.modules()],
    }


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    tensors = [one["tensors"], two["tensors"]]
    equal = all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    return (
        equal
        and tensors[0].keys() == tensors[1].keys()
        and one["flags"] == two["flags"]
        and one["modes"] == two["modes"]
    )


def reliability(model: PeftModel, learned: list[Edit]) -> float:
    return mean(
        token_match(
            model, facts.trained().tokenizer, [(edit.prompt, edit.target) for edit in learned]
        )
    )


# what an edit does


def test_the_toy_model_knows_its_facts_and_not_the_edits(fact_model: FactModel) -> None:
    known = [
        (prompt, fact.answer)
        for fact in (*CAPITALS, *MEALS)
        for prompt in (fact.prompt, fact.rephrase)
    ]
    assert min(token_match(*fact_model, known)) == 1
    assert (
        max(token_match(*fact_model, [(e.prompt, e.target) for e in edits(0, 1, 2, 4, 5, 6)])) == 0
    )


def test_an_edit_is_learned_and_said(baft: Setting, fact_model: FactModel) -> None:
    model, editor = baft
    (fact,) = edits(0)
    assert reliability(model, [fact]) == 0
    assert greedy_answers(model, fact_model.tokenizer, [fact.prompt], 1) == [CAPITALS[0].answer]
    outcome = editor.edit([fact])
    assert (
        outcome.learned
        and outcome.losses["teacher_forcing"] < DESCENT.stop_loss
        and 0 < outcome.steps <= 60
    )
    assert outcome.seconds > 0
    assert reliability(model, [fact]) == 1
    assert greedy_answers(model, fact_model.tokenizer, [fact.prompt], 1) == [fact.target]


def test_the_paraphrase_follows_and_other_countries_do_not(fact_model: FactModel) -> None:
    followed, spread = [], []
    for n in range(4):
        (fact,) = edits(n)
        others = [other.rephrase for i, other in enumerate(CAPITALS) if i not in (n, n + 8)]
        model = adapted(fact_model.base, seed=n)
        rephrased = [(CAPITALS[n].rephrase, fact.target)]
        assert token_match(model, fact_model.tokenizer, rephrased)[0] < 1
        editor_of(model).edit([fact])
        followed += token_match(model, fact_model.tokenizer, rephrased)
        spread += token_match(
            model, fact_model.tokenizer, [(prompt, fact.target) for prompt in others]
        )
    assert mean(followed) > mean(spread) + 0.5


def test_gates_and_unrelated_text_keep_more_of_the_rest_than_reft(fact_model: FactModel) -> None:
    kept: dict[str, list[float]] = {"basis": [], "none": []}
    for n in range(4):
        # None of the text shown while editing.
        others = questions([*MEALS[12:], *CAPITALS[:n], *CAPITALS[n + 1 :]])
        for weighting, shares in kept.items():
            model = adapted(fact_model.base, seed=n, weighting=weighting)
            before = predicted_tokens(model, fact_model.tokenizer, others)
            assert editor_of(model).edit(edits(n)).learned
            shares += agreement(before, predicted_tokens(model, fact_model.tokenizer, others))
    assert mean(kept["basis"]) > mean(kept["none"]) + 0.2


def test_a_batch_is_learned_whole(baft: Setting) -> None:
    model, editor = baft
    batch = edits(0, 1, 2, 3)
    assert reliability(model, batch) < 0.2
    assert editor.edit(batch).learned
    assert reliability(model, batch) == 1


def test_edits_in_turn_keep_most_of_the_earlier_ones(fact_model: FactModel) -> None:
    earlier = []
    for seed in range(4):
        model = adapted(fact_model.base, seed, r=12, layers_to_transform=[2, 3])
        editor = editor_of(model, descent=DescentConfig(lr=3e-3, max_steps=80, stop_loss=0.02))
        assert all(outcome.learned for outcome in editor.edit_in_turn(edits(0, 1, 2, 3)))
        assert reliability(model, edits(3)) == 1
        earlier.append(reliability(model, edits(0, 1, 2)))
    assert mean(earlier) > 0.5  # none is known without the edits


def test_edits_in_turn_are_made_when_their_outcome_is_asked_for(baft: Setting) -> None:
    model, editor = baft
    before = state(model)
    outcomes = editor.edit_in_turn(iter(edits(0, 1, 2)), batch_size=2)
    assert same(before, state(model))
    assert next(outcomes).learned and reliability(model, edits(0, 1)) == 1
    assert len(list(outcomes)) == 1


def test_edits_may_come_as_any_iterable(baft: Setting) -> None:
    model, editor = baft
    found = []
    for given in (edits(0, 1), tuple(edits(0, 1)), iter(edits(0, 1))):
        with rolled_back(model):
            found.append(editor.edit(given).losses)
    assert found[0] == found[1] == found[2]


# the regularisers


def test_each_term_is_reported_by_its_name(fact_model: FactModel) -> None:
    names = {}
    for name, unrelated, objective in (
        ("all", meals(0, 2), OBJECTIVE),
        ("no unrelated text", [], OBJECTIVE),
        ("no weights", meals(0, 2), Objective(balance=0, locality=0)),
    ):
        model = adapted(fact_model.base)
        names[name] = set(editor_of(model, unrelated, objective=objective).edit(edits(0)).losses)
    assert names["all"] == {"teacher_forcing", "balance", "locality"}
    assert names["no unrelated text"] == {"teacher_forcing", "balance"}
    assert names["no weights"] == {"teacher_forcing"}


def test_reft_has_no_gates_and_no_regularisers(fact_model: FactModel) -> None:
    model = adapted(fact_model.base, weighting="none")
    assert set(editor_of(model).edit(edits(0)).losses) == {"teacher_forcing"}
    assert not any("baft_gate" in name or "baft_gate_usage" in name for name in model.state_dict())


def test_one_gate_has_no_load_to_balance(fact_model: FactModel) -> None:
    model = adapted(fact_model.base, weighting="subspace")
    assert set(editor_of(model).edit(edits(0)).losses) == {"teacher_forcing", "locality"}


def test_unrelated_text_is_shown_and_not_learned(baft: Setting, fact_model: FactModel) -> None:
    model, _ = baft
    just_look = DescentConfig(stop_loss=1e9)  # done before the first step: a mere evaluation
    wrong = [Unrelated(fact.prompt, "Kasgrad") for fact in MEALS[:4]]
    found = editor_of(model, wrong, descent=just_look).edit(edits(3)).losses["teacher_forcing"]
    batch = collate([encode(fact_model.tokenizer, edits(3)[0].prompt, edits(3)[0].target)], 0)
    with torch.no_grad():
        assert found == pytest.approx(model(**batch).loss.item(), rel=1e-4)


def test_each_fact_is_trained_beside_the_next_unrelated_texts_in_turn(
    baft: Setting, fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = baft
    editor = editor_of(
        model, meals(0, 3), unrelated_per_edit=2, descent=DescentConfig(stop_loss=1e9)
    )
    texts = [encode(fact_model.tokenizer, text.prompt, text.answer) for text in meals(0, 3)]
    batches = []
    real = baft_module.open_forward
    monkeypatch.setattr(
        baft_module,
        "open_forward",
        lambda m, rows, *rest: batches.append(rows[-2:]) or real(m, rows, *rest),
    )
    list(editor.edit_in_turn(edits(0, 1, 2)))
    assert batches == [[texts[0], texts[1]], [texts[2], texts[0]], [texts[1], texts[2]]]
    assert editor.unrelated_used == 6
    opened = []
    monkeypatch.setattr(
        baft_module,
        "open_forward",
        lambda m, rows, *rest: opened.extend(rows) or real(m, rows, *rest),
    )
    editor.edit(edits(0, 1))  # a batch: two for each of its facts
    assert opened[2:] == [texts[0], texts[1], texts[2], texts[0]] and editor.unrelated_used == 10


def gates_at(model: PeftModel, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """The gates (edited tokens, k) of each block, in a forward of our own."""
    batch = collate([encode(facts.trained().tokenizer, *pair) for pair in pairs], 0)
    context = find_context(model)
    assert context is not None
    with torch.no_grad(), context.recording() as recorded:
        model(**batch)
    return {name: gates.w[gates.mask] for name, gates in recorded.items()}


def test_unrelated_text_closes_the_gates_on_other_unrelated_text(fact_model: FactModel) -> None:
    openness = {}
    for unrelated in (0, 12):
        model = adapted(fact_model.base, gate_offset=0.0)  # gates that start half open
        editor_of(model, meals(0, unrelated)).edit(edits(0))
        openness[unrelated] = mean(
            w.mean().item() for w in gates_at(model, questions(MEALS[12:])).values()
        )
    assert openness[12] < 0.8 * openness[0]


def test_statistics_sum_the_gates_over_the_edited_tokens_of_all_edits(baft: Setting) -> None:
    model, editor = baft
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    for batch, edited_tokens in (
        (edits(0), 3 + 1),
        (edits(3), 3 + 2),
        (edits(1, 7), 2 * 3 + 1 + 2),
    ):
        editor.edit(batch)
        tokens += edited_tokens
        for name, w in gates_at(model, [(str(edit.prompt), edit.target) for edit in batch]).items():
            sums[name] = sums.get(name, torch.zeros(4)) + w.sum(0)
    for layer in baft_layers(model):
        load = layer.baft_gate_usage["default"]
        assert load[-1] == tokens
        torch.testing.assert_close(load[:-1], sums[layer.name], rtol=1e-4, atol=1e-6)


def test_past_use_counts_in_the_balance_of_the_next_edit(baft: Setting) -> None:
    model, _ = baft
    # Done before the first step: a mere evaluation.
    editor = editor_of(model, descent=DescentConfig(stop_loss=1e9))
    with rolled_back(model):
        fresh = editor.edit(edits(0)).losses["balance"]
    for layer in baft_layers(model):
        layer.baft_gate_usage["default"] += torch.tensor([100.0, 0, 0, 0, 100])
    assert editor.edit(edits(0)).losses["balance"] > 10 * fresh


def patch_losses(
    patch: pytest.MonkeyPatch, change: Callable[[Callable[[], torch.Tensor]], torch.Tensor]
) -> None:
    """Let `change` stand in for the forward of each training step; it is given the real one."""

    def patched(
        real: Callable[[FullForward], torch.Tensor],
    ) -> Callable[[FullForward], torch.Tensor]:
        return lambda self: change(lambda: real(self)) if torch.is_grad_enabled() else real(self)

    for kind in (FullForward, CachedPrefix):
        patch.setattr(kind, "losses", patched(kind.losses))


def test_gates_without_gradient_are_an_error_and_not_a_silent_loss_of_the_regularisers(
    baft: Setting, monkeypatch
) -> None:
    model, editor = baft

    def without_gradient(losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return losses()

    patch_losses(monkeypatch, without_gradient)
    before = state(model)
    with pytest.raises(ValueError, match="use_reentrant"):
        editor.edit(edits(0))
    assert same(before, state(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(baft: Setting, reentrant: bool) -> None:
    model, editor = baft
    with rolled_back(model):
        plain = editor.edit(edits(0))
    base = model.get_base_model()
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    model.train()
    found = editor.edit(edits(0))
    assert found.steps == plain.steps and found.losses == pytest.approx(plain.losses)


# rolling back, saving, going on


@pytest.mark.parametrize("fails", [False, True])
def test_rolling_back_restores_parameters_statistics_and_answers_bit_for_bit(
    baft: Setting, fact_model, fails: bool
) -> None:
    model, editor = baft
    editor.edit(edits(0))
    inputs = fact_model.tokenizer([fact.prompt for fact in CAPITALS], return_tensors="pt")
    before, said = state(model), model(**inputs).logits
    with pytest.raises(ZeroDivisionError) if fails else rolled_back(model), rolled_back(model):
        editor.edit(edits(1))
        assert not same(before, state(model)) and not torch.equal(said, model(**inputs).logits)
        if fails:
            raise ZeroDivisionError
    assert same(before, state(model))
    assert torch.equal(said, model(**inputs).logits)


def reloaded(model: PeftModel, folder: Path) -> PeftModel:
    """The adapter, saved and loaded again as PEFT loads for inference: frozen."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    again = PeftModel.from_pretrained(model.unload(), str(folder))
    assert not any(p.requires_grad for p in again.parameters())
    return again


@pytest.mark.parametrize("weighting", ["basis", "none"])
def test_a_reloaded_adapter_goes_on_exactly_as_if_it_had_stayed(
    fact_model, tmp_path: Path, weighting: str
) -> None:
    results = []
    for interrupted in (False, True):
        model = adapted(fact_model.base, weighting=weighting)
        editor = editor_of(model)
        list(editor.edit_in_turn(edits(0, 3)))
        if interrupted:
            model, used = reloaded(model, tmp_path), editor.unrelated_used
            editor = editor_of(model)
            editor.unrelated_used = used
        outcomes = list(editor.edit_in_turn(edits(1, 4)))
        tensors = {name: t.clone() for name, t in model.state_dict().items() if "baft" in name}
        results.append((tensors, [(outcome.steps, outcome.losses) for outcome in outcomes]))
        # Frozen stays frozen.
        assert any(p.requires_grad for p in model.parameters()) is not interrupted
        model.unload()
    (stayed, outcomes), (came_back, outcomes_after) = results
    assert outcomes == outcomes_after
    assert stayed.keys() == came_back.keys() and all(
        torch.equal(t, came_back[name]) for name, t in stayed.items()
    )


# any PEFT method


def test_a_lora_adapter_is_edited_and_rolled_back(lora) -> None:
    model, editor = lora
    before = state(model)
    with rolled_back(model):
        outcome = editor.edit(edits(0))
        assert (
            outcome.learned
            and set(outcome.losses) == {"teacher_forcing"}
            and reliability(model, edits(0)) == 1
        )
    assert same(before, state(model)) and reliability(model, edits(0)) == 0


def test_whole_modules_that_an_adapter_saves_are_rolled_back_too_even_if_frozen(lora) -> None:
    model, editor = lora
    model.requires_grad_(False)
    before = state(model)
    with rolled_back(model):
        editor.edit(edits(0))
        assert not torch.equal(
            before["tensors"]["base_model.model.lm_head.modules_to_save.default.weight"],
            model.lm_head.weight,
        )
    assert same(before, state(model))


@pytest.mark.parametrize("method", ["baft", "lora"])
def test_a_disabled_adapter_is_not_edited(request, method: str) -> None:
    model, editor = request.getfixturevalue(method)
    before = state(model)
    for attempt in (editor.edit, editor.edit_in_turn):
        with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
            attempt(edits(0))
    assert same(before, state(model))


def test_an_adapter_that_zero3_has_taken_apart_is_not_edited(baft) -> None:
    model, editor = baft
    next(
        p for p in model.parameters() if p.requires_grad
    ).ds_id = 0  # by this mark DeepSpeed knows its own
    before = state(model)
    for attempt in (editor.edit, editor.edit_each):
        with pytest.raises(ValueError, match="Shard the base model first"):
            attempt(edits(0))
    assert same(before, state(model))


def test_an_adapter_that_is_merged_into_the_weights_is_not_edited(lora) -> None:
    model, editor = lora
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ValueError, match="merged"):
        editor.edit(edits(0))
    assert same(before, state(model))


def test_an_editor_stays_with_its_adapter(baft: Setting) -> None:
    model, editor = baft
    model.add_adapter("other", BaftConfig(r=2, layers_to_transform=[1], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with pytest.raises(
        ValueError, match=r"edits 'default', but the active adapters are \['other'\]"
    ):
        editor.edit(edits(0))
    before = {name: t.clone() for name, t in model.state_dict().items() if "default" in name}
    # Control: an editor of the other adapter, which leaves ours alone.
    assert editor_of(model).edit(edits(0)).steps
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Exactly one adapter must be active"):
        editor_of(model)


def test_editors_refuse_what_they_cannot_edit(lora, fact_model: FactModel) -> None:
    model, _ = lora
    with pytest.raises(TypeError, match=r"needs a PeftModel, .* not LlamaForCausalLM"):
        AdapterEditor(fact_model.base, fact_model.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a plain BaFT adapter"):
        BaftEditor(model, fact_model.tokenizer, scope=NARROW)


@pytest.mark.parametrize(
    "config", [PromptTuningConfig(num_virtual_tokens=2), PrefixTuningConfig(num_virtual_tokens=2)]
)
def test_methods_that_learn_a_prompt_are_refused(fact_model: FactModel, config) -> None:
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(deepcopy(fact_model.base), config)
    with pytest.raises(TypeError, match="uses prompt learning"):
        AdapterEditor(model, fact_model.tokenizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_edited(fact_model: FactModel, dtype: torch.dtype) -> None:
    model = adapted(deepcopy(fact_model.base).to(dtype))
    before = state(model)
    with rolled_back(model):
        assert editor_of(model).edit(edits(0)).learned and reliability(model, edits(0)) == 1
    assert same(before, state(model))
    assert {t.dtype for t in adapter_tensors(model)} == {torch.float32}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_may_have_gradients_off(baft: Setting, mode: Callable[[], Any]) -> None:
    model, editor = baft
    with mode():
        assert editor.edit(edits(0)).learned
    assert reliability(model, edits(0)) == 1


# failures leave no trace


def poisoned(losses: torch.Tensor) -> torch.Tensor:
    return losses * float("nan")


def infinite(losses: torch.Tensor) -> torch.Tensor:
    return losses + torch.inf


def interrupted(_: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


def out_of_memory(_: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("of 80 GiB")


BREAKS: list[tuple[Any, type[BaseException], str | None]] = [
    (poisoned, FloatingPointError, "became nan at step 1"),
    (infinite, FloatingPointError, "became inf at step 1"),
]
BREAKS += [
    (interrupted, KeyboardInterrupt, None),
    (out_of_memory, torch.OutOfMemoryError, "80 GiB"),
]


@pytest.mark.parametrize(
    ("break_it", "error", "message"), BREAKS, ids=[case[0].__name__ for case in BREAKS]
)
@pytest.mark.parametrize("method", ["baft", "lora"])
def test_an_edit_that_breaks_off_leaves_everything_as_it_was(
    request, monkeypatch, method, break_it, error, message
) -> None:
    model, editor = request.getfixturevalue(method)
    editor.edit(edits(0))
    model.train()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.full_like(parameter, 3.0)  # of a training of the caller's own
    before, used = state(model), getattr(editor, "unrelated_used", None)
    seen = []

    def breaking(losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        seen.append(
            all(torch.equal(t, before["tensors"][name]) for name, t in model.state_dict().items())
        )
        return losses() if len(seen) < 2 else break_it(losses())

    with monkeypatch.context() as patch, pytest.raises(error, match=message):
        patch_losses(patch, breaking)
        editor.edit(edits(1))
    assert seen == [True, False]  # control: there was something to put back
    assert same(before, state(model)) and (parameter.grad == 3).all()
    assert used == getattr(editor, "unrelated_used", None)
    assert editor.edit(edits(1)).learned
    model.eval()


def test_an_interrupt_while_the_statistics_are_written_leaves_them_as_they_were(
    baft: Setting, monkeypatch
) -> None:
    model, editor = baft
    editor.edit(edits(0))
    remember, before = editor._add_gate_usage, state(model)

    def interrupted_after(*args: Any) -> None:
        remember(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(editor, "_add_gate_usage", interrupted_after)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(edits(1))
    assert same(before, state(model))


def test_parameters_that_became_infinite_are_not_kept_even_if_the_losses_are_finite(
    baft: Setting, monkeypatch
) -> None:
    model, editor = baft
    source = next(p for name, p in model.named_parameters() if "baft_source" in name)
    before, seen = state(model), []

    def diverging(losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        found = losses()
        seen.append(1)
        # The cache's check, then the losses before each of two steps and at the end.
        if len(seen) == 3 + 3:
            source.data[0, 0] = torch.inf
        return found

    patch_losses(monkeypatch, diverging)
    monkeypatch.setattr(editor, "descent", DescentConfig(lr=1e-3, max_steps=2))
    with pytest.raises(FloatingPointError, match="a parameter became"):
        editor.edit(edits(0))
    assert same(before, state(model))


TOO_LONG = Edit("the " * 40, "Kasgrad")
UNUSABLE: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "nothing to edit"),
    (["Kasgrad"], TypeError, "list of Edit"),
    ("Kasgrad", TypeError, "list of Edit"),
    (None, TypeError, "list of Edit"),
    (edits(0)[0], TypeError, r"list of Edit\(prompt, target\), not Edit\("),
    ([*edits(0), ("a", "b")], TypeError, "list of Edit"),
    (
        [*edits(0), Edit(CAPITALS[0].prompt, "Kasburg")],
        ValueError,
        f"'{CAPITALS[0].prompt}' is edited to 'Mirgrad' and to 'Kasb",
    ),
    (edits(0, 1, 0), ValueError, f"'{CAPITALS[0].prompt}' occurs twice"),
    ([*edits(0), Edit(f" {CAPITALS[0].prompt} ", " Mirgrad")], ValueError, "occurs twice"),
    ([TOO_LONG], ValueError, "has 41 tokens with its answer, but the model reads at most 32"),
]


@pytest.mark.parametrize(("batch", "error", "message"), UNUSABLE)
def test_unusable_edits_are_refused_with_the_reason(baft: Setting, batch, error, message) -> None:
    model, editor = baft
    before = state(model)
    for attempt in (editor.edit, lambda batch: editor.edit_in_turn(batch, batch_size=9)):
        with pytest.raises(error, match=message):
            attempt(batch)
    assert same(before, state(model))


def test_a_bad_edit_stops_a_sequence_before_its_first_edit(baft: Setting) -> None:
    model, editor = baft
    before = state(model)
    with pytest.raises(ValueError, match="at most 32"):
        editor.edit_in_turn([*edits(0, 1), TOO_LONG])
    with pytest.raises(ValueError, match="batch_size"):
        editor.edit_in_turn(edits(0), batch_size=0)
    assert same(before, state(model))


def test_a_later_edit_may_change_an_earlier_one(baft: Setting) -> None:
    model, editor = baft
    again = Edit(CAPITALS[0].prompt, CAPITALS[1].answer)
    assert [outcome.learned for outcome in editor.edit_in_turn([*edits(0), again])] == [True, True]
    assert reliability(model, [again]) == 1 and reliability(model, edits(0)) == 0


def test_unusable_unrelated_text_and_settings_are_refused(baft: Setting) -> None:
    model, _ = baft
    with pytest.raises(ValueError, match="at most 32"):
        editor_of(model, [Unrelated("the " * 40, "end")])
    with pytest.raises(ValueError, match="unrelated_per_edit must be at least 1, not 0"):
        editor_of(model, unrelated_per_edit=0)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"lr": 0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": float("inf")}, ValueError),
        ({"max_steps": 0}, ValueError),
        ({"max_steps": 2.5}, TypeError),
        ({"stop_loss": -1}, ValueError),
        ({"weight_decay": float("nan")}, ValueError),
        ({"clip_norm": 0}, ValueError),
        ({"clip_norm": -1.0}, ValueError),
    ],
)
def test_settings_of_the_descent_are_checked(given: dict[str, Any], error: type[Exception]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(error, match=f"{name} must be .*{value}"):
        DescentConfig(**given)


def test_the_norm_of_the_gradient_can_be_bounded(baft: Setting) -> None:
    model, _ = baft
    with rolled_back(model):
        assert editor_of(model).edit(edits(0)).learned
    # Far below AdamW's epsilon.
    bounded = DescentConfig(lr=0.02, max_steps=60, stop_loss=0.02, clip_norm=1e-12)
    assert not editor_of(model, descent=bounded).edit(edits(0)).learned


def test_one_fact_and_a_batch_have_settings_of_their_own(baft: Setting) -> None:
    model, _ = baft
    short, long = DescentConfig(max_steps=1, stop_loss=0), DescentConfig(max_steps=2, stop_loss=0)
    editor = editor_of(model, descent=short, batch_descent=long)
    assert (editor.edit(edits(0)).steps, editor.edit(edits(0, 1)).steps) == (1, 2)
