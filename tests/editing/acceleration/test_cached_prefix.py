"""The session that keeps what an edit cannot change gives what the plain one gives."""

# mypy: disable-error-code="arg-type, attr-defined, call-arg, func-returns-value, union-attr"
from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model

import facts
from conftest import ARCHITECTURES, make_model, randomise
from facts import DESCENT, OBJECTIVE, FactModel, adapted, edits, meals
from peft_baft import NARROW, BaftConfig, BaftEditor
from peft_baft.adapter import find_context
from peft_baft.data.batching import Tokens
from peft_baft.editing import baft as baft_module
from peft_baft.editing.acceleration import cached_prefix, padding
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.editing.answers import AnswerForward, FullForward
from peft_baft.editing.fast_paths import open_forward
from peft_baft.editing.train import Descent, DescentConfig, descend
from peft_baft.running import fork

fact_model = facts.fact_model
CPU = torch.device("cpu")
LEARNED = (0, 2, 3)
GENERATOR = torch.Generator().manual_seed(0)
# Prompts and answers of unequal length: padding on both sides of the cut.
ROWS = [
    Tokens(tuple(torch.randint(3, 64, (length + answer,), generator=GENERATOR).tolist()), length)
    for length, answer in ((9, 3), (5, 2), (4, 4), (12, 1))
]


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Iterator[PeftModel]:
    model = get_peft_model(
        make_model(request.param), BaftConfig(task_type="CAUSAL_LM", r=4, gate_offset=0.0)
    ).eval()
    randomise(model, 0.3)
    yield model


def outcome(model: PeftModel, session: AnswerForward) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, gradient and gates of one training step."""
    context = find_context(model)
    assert context is not None
    model.zero_grad()
    with context.recording() as recorded:
        loss = session.losses().mean()
        loss.backward()
        gates = torch.cat([gates.w[gates.mask] for gates in recorded.values()]).detach()
    everyone = range(len(session.targets.rows))
    places = session.targets.edited_places(everyone, everyone, 3)
    torch.testing.assert_close(
        gates, torch.cat([g.w.flatten(0, 1)[places] for g in recorded.values()]), atol=0, rtol=0
    )
    return (
        loss.item(),
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        gates,
    )


def both_ways(model: PeftModel) -> list[AnswerForward]:
    return [
        FullForward(model, ROWS, LEARNED, 0, CPU),
        CachedPrefix.build(model, ROWS, LEARNED, 0, CPU, prompt_positions=3),
    ]


def test_loss_gradient_and_gates_are_those_of_the_full_computation(model: PeftModel) -> None:
    plain = outcome(model, FullForward(model, ROWS, LEARNED, 0, CPU))
    cached = CachedPrefix.build(model, ROWS, LEARNED, 0, CPU, prompt_positions=3)
    for _ in range(2):  # a forward leaves the cache as it was
        loss, gradient, gates = outcome(model, cached)
        assert loss == pytest.approx(plain[0], rel=1e-5)
        assert (gradient - plain[1]).norm() < 1e-5 * plain[1].norm()
        torch.testing.assert_close(gates, plain[2], atol=1e-5, rtol=0)
    assert plain[1].norm() > 1e-3


def test_a_prompt_of_no_more_than_the_edited_tokens_is_computed_beside_longer_ones(
    model: PeftModel,
) -> None:
    short = [Tokens((5, 6, 7, 8), 3), Tokens((9, 10, 11), 1)]
    rows = [ROWS[0], short[0], ROWS[1], short[1]]
    plain = outcome(model, FullForward(model, rows, LEARNED, 0, CPU))
    session = open_forward(model, rows, LEARNED, 0, 3)
    assert (
        type(session) is CachedPrefix and type(open_forward(model, short, [0], 0, 3)) is FullForward
    )
    loss, gradient, gates = outcome(model, session)
    assert loss == pytest.approx(plain[0], rel=1e-5)
    assert (gradient - plain[1]).norm() < 1e-5 * plain[1].norm()
    torch.testing.assert_close(gates, plain[2], atol=1e-5, rtol=0)


def test_some_of_the_rows_give_what_they_give_among_all(model: PeftModel) -> None:
    for session in both_ways(model):
        every = session.losses()
        assert session.targets.counts == [3, 0, 4, 1]
        some = session.select_rows([1, 2])
        assert type(some) is type(session) and some.targets.counts == [0, 4]
        for _ in range(2):
            torch.testing.assert_close(some.losses(), every[3:7])
        torch.testing.assert_close(session.losses(), every)


def test_logits_are_computed_where_an_answer_is_learned(model: PeftModel) -> None:
    shapes: list[torch.Size] = []
    hook = (
        model.get_base_model()
        .get_output_embeddings()
        .register_forward_hook(lambda _, given, out: shapes.append(out.shape[:-1]))
    )
    session = CachedPrefix.build(model, ROWS, LEARNED, 0, CPU, prompt_positions=3)
    session.losses()
    few = session.select_rows([0])
    assert few.losses().shape == (3,)
    hook.remove()
    # Of four rows rather than of three, which takes BLAS twice as long.
    assert shapes == [
        (0,),
        (3 + 4 + 1,),
        (4,),
    ]


def test_padding_is_not_computed(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "SPARED_FROM", 0)
    widths: set[int] = set()
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "out_proj", "dense_4h_to_h", "mlp.c_proj")):
            own = module.forward
            monkeypatch.setattr(
                module, "forward", lambda h, own=own: widths.add(h.shape[:-1].numel()) or own(h)
            )
    loss, gradient, gates = outcome(
        model, CachedPrefix.build(model, ROWS, LEARNED, 0, CPU, prompt_positions=3)
    )
    # Of 4 * 9 before and 4 * 7 after the cut.
    assert widths == {
        (9 + 5 + 4 + 12) - 4 * 3,
        4 * 3 + 3 + 2 + 4 + 1,
    }
    monkeypatch.undo()
    plain = outcome(model, CachedPrefix.build(model, ROWS, LEARNED, 0, CPU, prompt_positions=3))
    assert loss == pytest.approx(plain[0], rel=1e-5)
    assert (gradient - plain[1]).norm() < 1e-5 * plain[1].norm()
    torch.testing.assert_close(gates, plain[2], atol=1e-5, rtol=0)


def test_less_is_computed(model: PeftModel) -> None:
    widths: list[int] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, out: widths.append(inputs[0].shape[1]))
    for session in both_ways(model):
        widths.clear()
        session.losses()
        assert widths == ([13] if type(session) is FullForward else [3 + 4])
    hook.remove()


def test_blocks_up_to_the_first_edited_one_run_once() -> None:
    model = get_peft_model(
        make_model("llama"), BaftConfig(task_type="CAUSAL_LM", r=4, layers_to_transform=[2, 3])
    )
    runs = dict.fromkeys(range(4), 0)
    blocks = model.get_base_model().model.layers

    def counted(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            runs[number] += 1
            return forward(*given, **named)

        return run

    for i, block in enumerate(blocks):
        block.forward = counted(i, block.forward)
    own = [block.forward for block in blocks]
    session = CachedPrefix.build(model, ROWS, LEARNED, 0, CPU, prompt_positions=3)
    made = dict(runs)
    for _ in range(3):
        session.losses()
    assert {i: runs[i] - made[i] for i in runs} == {0: 1, 1: 1, 2: 1, 3: 3}
    assert [block.forward for block in blocks] == own


def test_what_a_few_steps_learn_is_the_same_on_every_architecture(model: PeftModel) -> None:
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for session in both_ways(model):
        model.load_state_dict(own, strict=False)
        losses = session.losses
        terms = lambda _, losses=losses: [{"teacher_forcing": losses().mean()}]  # noqa: E731
        descend([Descent(trained, DescentConfig(max_steps=4))], terms)
        found.append(torch.cat([p.detach().flatten() for p in trained]))
    before = torch.cat(
        [own[name].flatten() for name, p in model.named_parameters() if p.requires_grad]
    )
    assert (found[0] - before).norm() > 0.1
    assert (found[0] - found[1]).norm() < 0.01 * (found[0] - before).norm()


def learned(fact_model: FactModel) -> tuple[list[int], torch.Tensor]:
    """Steps and parameters after three edits in turn."""
    model = adapted(fact_model.base)
    editor = BaftEditor(model, fact_model.tokenizer, meals(0, 12), OBJECTIVE, DESCENT, scope=NARROW)
    steps = [done.steps for done in editor.edit_in_turn(edits(0, 3, 7))]
    return steps, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_what_is_learned_is_the_same(
    fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[AnswerForward] = []
    real = open_forward
    monkeypatch.setattr(
        baft_module, "open_forward", lambda *given: opened.append(real(*given)) or opened[-1]
    )
    cached = learned(fact_model)
    assert all(isinstance(session, CachedPrefix) for session in opened)
    monkeypatch.setattr(baft_module, "open_forward", lambda *given: real(*given[:4], None))
    plain = learned(fact_model)
    assert cached[0] == plain[0]
    torch.testing.assert_close(cached[1], plain[1], atol=2e-3, rtol=0)


ROW = Tokens((4, 5, 6, 7, 8, 9), 5)


def wrong_loss(self: CachedPrefix) -> torch.Tensor:
    return CACHED_LOSSES(self) + 1


def wrong_gradient(self: CachedPrefix) -> torch.Tensor:
    losses = CACHED_LOSSES(self)
    return losses.detach() + 0.5 * (losses - losses.detach())


def right_once(self: CachedPrefix) -> torch.Tensor:
    """As a model whose recurrent state keeps the first backward's graph."""
    if vars(self).setdefault("used", False):
        raise RuntimeError("Trying to backward through the graph a second time")
    vars(self)["used"] = True
    return CACHED_LOSSES(self)


CACHED_LOSSES = CachedPrefix.losses
FAULTS = {"loss": wrong_loss, "gradient": wrong_gradient, "graph a second time": right_once}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_go_on_from_a_cache_is_edited_without_it_and_that_is_told_once(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(
        make_model(), BaftConfig(task_type="CAUSAL_LM", r=4, gate_offset=0.0)
    ).eval()
    monkeypatch.setattr(CachedPrefix, "losses", FAULTS[fault])
    for _ in range(2):
        assert type(open_forward(model, [ROW], [0], 0, 3)) is FullForward
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING"
        and fault in record.message
        and "LlamaForCausalLM" in record.message
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    other = get_peft_model(make_model(), BaftConfig(task_type="CAUSAL_LM", r=4)).eval()
    monkeypatch.undo()
    assert type(open_forward(other, [ROW], [0], 0, 3)) is CachedPrefix  # the control


def test_a_model_without_a_cache_is_edited_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(make_model(), BaftConfig(task_type="CAUSAL_LM", r=4)).eval()

    def no_cache(*_: Any) -> None:
        raise NotImplementedError("no cache here")

    monkeypatch.setattr(cached_prefix, "call_with_cache", no_cache)
    assert type(open_forward(model, [ROW], [0], 0, 3)) is FullForward
    assert not caplog.records


def test_an_error_of_a_model_whose_cache_was_right_before_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = get_peft_model(make_model(), BaftConfig(task_type="CAUSAL_LM", r=4)).eval()
    assert type(open_forward(model, [ROW], [0], 0, 3)) is CachedPrefix

    def broken(*_: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(cached_prefix, "call_with_cache", broken)
    with pytest.raises(TypeError, match="a bug"):
        open_forward(model, [ROW], [0], 0, 3)


def test_what_lies_before_the_edited_tokens_decides_whether_there_is_a_cache() -> None:
    model = get_peft_model(make_model(), BaftConfig(task_type="CAUSAL_LM", r=4)).eval()
    # Nothing lies before the last 3.
    assert type(open_forward(model, [Tokens((4, 5, 6, 7), 3)], [0], 0, 3)) is FullForward
    assert type(open_forward(model, [ROW], [0], 0, None)) is FullForward
    assert type(open_forward(model, [ROW], [0], 0, 3)) is CachedPrefix


@pytest.mark.parametrize(
    ("window", "wanted"), [(None, [4, 5, 9, 17, 33]), (11, [4, 5, 9, 12, 17, 33])]
)
def test_the_cache_is_checked_again_for_much_longer_texts_and_beyond_the_window(
    window: int | None, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_model("mistral").config
    settings.sliding_window = window
    model = get_peft_model(
        tr.MistralForCausalLM(settings).eval(), BaftConfig(r=4, prompt_positions=2)
    )
    real, checks = FullForward.losses, []
    monkeypatch.setattr(
        FullForward,
        "losses",
        lambda self: checks.append(len(self.targets.rows[0].ids)) or real(self),
    )
    for length in range(4, 60):
        row = Tokens(tuple(range(3, 3 + length)), 4 if length > 4 else 3)
        open_forward(model, [row], [0], 0, prompt_positions=2)
    assert checks == wanted


def test_what_a_forward_writes_into_a_recurrent_state_is_not_seen_by_its_backward_or_the_next_forward() -> (
    None
):
    layer = SimpleNamespace(recurrent_states={0: torch.ones(2)}, keys=torch.ones(2))
    kept = SimpleNamespace(layers=[layer])
    weight = torch.full((2,), 3.0, requires_grad=True)
    for _ in range(2):
        states = fork(kept).layers[0].recurrent_states
        after = states[0] * weight  # backward needs the state as it was
        states[0].copy_(after)
        (gradient,) = torch.autograd.grad(after.sum(), weight)
        assert gradient.tolist() == [1.0, 1.0] and layer.recurrent_states[0].tolist() == [1.0, 1.0]
    plain = {0: torch.ones(2)}  # the control: a plain dictionary
    after = plain[0] * weight
    plain[0].copy_(after)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(after.sum(), weight)
