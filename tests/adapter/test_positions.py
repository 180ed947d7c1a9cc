"""Which tokens are edited, for every way a model is called: all agree with one slow reference."""

# mypy: disable-error-code="arg-type, union-attr"
from __future__ import annotations

import copy
import logging
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peft_baft
from adapters import intervene
from conftest import ARCHITECTURES, VOCABULARY, cache_of, make_model, randomise, with_cache
from peft_baft import BaftConfig, prompt_lengths
from peft_baft.adapter import baft_layers, find_context
from peft_baft.adapter.context import EditContext
from peft_baft.intervention import gates, orthonormal_rows, rms_normalise

FEW = ["llama", "gpt2", "gemma3", "bloom"]
P, ANSWER, PAD = 3, 5, 0
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}


def adapted(architecture: str = "llama", task_type: str | None = "CAUSAL_LM") -> PeftModel:
    config = BaftConfig(
        r=4, prompt_positions=P, gate_offset=0.0, layers_to_transform=[1, 2], task_type=task_type
    )
    model = get_peft_model(make_model(architecture), config)
    randomise(model, 2.0)
    return model.eval()


def truth(model: PeftModel, architecture: str, ids: list[int], prompt_length: int) -> Tensor:
    """Logits (tokens, vocabulary) of a clean model, one sequence, no cache, each edited vector computed alone."""
    clean = make_model(architecture)
    for layer in baft_layers(model):
        basis, source, gate = (
            layer.baft_basis["default"],
            layer.baft_source["default"],
            layer.baft_gate["default"],
        )
        R, b, U = orthonormal_rows(basis.weight), source.bias, gate.weight

        def edit(
            _module: nn.Module, _args: tuple, output: Any, R=R, A=source.weight + R, b=b, U=U
        ) -> Any:
            hidden = (output if isinstance(output, Tensor) else output[0]).clone()
            for t in range(max(prompt_length - P, 0), len(ids)):
                h = hidden[0, t]
                hidden[0, t] = intervene(h, R, A, b, gates(rms_normalise(h), U))
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        clean.get_submodule(layer.name).register_forward_hook(edit)
    with torch.no_grad():
        return clean(torch.tensor([ids])).logits[0]


def draw(length: int, seed: int = 0) -> list[int]:
    return torch.randint(
        3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))

    def fill(row: list[int], value: int) -> list[int]:
        padding = [value] * (width - len(row))
        return padding + row if side == "left" else row + padding

    ids, mask = [fill(row, PAD) for row in rows], [fill([1] * len(row), 0) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def assert_generates_the_truth(
    model: Any,
    architecture: str,
    prompts: list[list[int]],
    batch: dict[str, Any] | None = None,
    **settings: Any,
) -> list[list[int]]:
    """The logits that each generated token was chosen from are those of one full forward; returns the answers."""
    batch = batch or padded(prompts)
    width = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    settings = {"max_new_tokens": ANSWER, "do_sample": False, **settings}
    out = model.generate(**batch, **settings, return_dict_in_generate=True, output_logits=True)
    answers = out.sequences[:, width:].tolist()
    for prompt, answer, seen in zip(prompts, answers, torch.stack(out.logits, 1), strict=True):
        full = truth(model, architecture, prompt + answer, len(prompt))
        torch.testing.assert_close(seen, full[len(prompt) - 1 : -1], **CLOSE)
    return answers


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_forward_edits_the_last_prompt_tokens_and_the_answer(architecture: str) -> None:
    model, ids = adapted(architecture), draw(9)
    with torch.no_grad():
        seen = model(input_ids=torch.tensor([ids]), prompt_lengths=[6]).logits[0]
    torch.testing.assert_close(seen, truth(model, architecture, ids, 6), **CLOSE)
    for wrong in (5, 7, 99):  # the control: one token more or fewer, or none, would be seen
        assert not torch.allclose(seen, truth(model, architecture, ids, wrong), **CLOSE)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_cached_decoding_of_a_padded_batch_is_one_full_forward_of_each_row(
    architecture: str,
) -> None:
    assert_generates_the_truth(
        adapted(architecture), architecture, [draw(1, 1), draw(2, 2), draw(7, 3)]
    )


WAYS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 3},
    "several samples": {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": lambda: make_model("llama", seed=5)},
}


@pytest.mark.parametrize("architecture", FEW)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_edits_the_same_tokens(way: str, architecture: str) -> None:
    if (architecture, way) == ("bloom", "static cache"):
        pytest.skip("transformers' Bloom has no static cache")
    settings = {k: v() if callable(v) else v for k, v in WAYS[way].items()}
    prompt = [7, 8, 9, 7, 8, 9, 7, 8]  # repeats, for prompt lookup to propose something
    rows = settings.get("num_return_sequences", 1)
    torch.manual_seed(0)
    assert_generates_the_truth(
        adapted(architecture), architecture, [prompt] * rows, padded([prompt]), **settings
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sampling_with_and_without_a_cache_draws_the_same_tokens(architecture: str) -> None:
    model, drawn = adapted(architecture), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {"do_sample": True, "temperature": 4.0, "use_cache": use_cache}
        drawn += assert_generates_the_truth(model, architecture, [draw(5)], **settings)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("architecture", FEW)
def test_beams_are_scored_as_by_one_full_forward_alone_and_in_a_batch(
    architecture: str, use_cache: bool
) -> None:
    model, prompts = adapted(architecture), [draw(1, 1), draw(7, 2)]
    settings = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 4,
        "use_cache": use_cache,
    }
    out = model.generate(
        **padded(prompts), **settings, return_dict_in_generate=True, output_scores=True
    )
    for row, (found, score) in enumerate(
        zip(out.sequences.tolist(), out.sequences_scores, strict=True)
    ):
        prompt, answer = prompts[row // 2], found[7:]
        log_p = truth(model, architecture, prompt + answer, len(prompt)).log_softmax(-1)[
            len(prompt) - 1 : -1
        ]
        torch.testing.assert_close(
            score, sum(log_p[i, token] for i, token in enumerate(answer)) / len(answer), **CLOSE
        )
        alone = model.generate(torch.tensor([prompt]), **settings)
        assert alone[row % 2, len(prompt) :].tolist() == answer


def test_embeddings_can_be_given_instead_of_tokens() -> None:
    model, prompts = adapted(), [draw(4, 1), draw(7, 2)]
    batch = padded(prompts)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    assert_generates_the_truth(model, "llama", prompts, batch)


@pytest.mark.parametrize("use_cache", [True, False])
def test_it_makes_no_difference_which_wrapper_is_called(use_cache: bool) -> None:
    model, untyped = adapted(), adapted(task_type=None)
    for outer in (
        model,
        model.base_model,
        model.base_model.model,
        untyped,
        untyped.base_model.model,
    ):
        assert_generates_the_truth(outer, "llama", [draw(6)], use_cache=use_cache)


@pytest.mark.parametrize("stated", [2, 6])
def test_generate_can_be_told_where_the_prompt_ends(stated: int) -> None:
    model, ids = adapted(), draw(6)
    settings = {
        "max_new_tokens": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    embedded = model.get_input_embeddings()(torch.tensor([ids]))
    outs = [model.generate(torch.tensor([ids]), prompt_lengths=[stated], **settings)]
    outs += [model.generate(inputs_embeds=embedded, prompt_lengths=[stated], **settings)]
    with peft_baft.prompt_lengths(model, [stated]):
        outs.append(model.generate(torch.tensor([ids]), **settings))
    for out in outs:
        full = truth(model, "llama", ids + out.sequences[0, -2:].tolist(), stated)
        torch.testing.assert_close(torch.cat(out.logits), full[5:-1], **CLOSE)


@pytest.mark.parametrize("architecture", FEW)
def test_in_a_continued_chat_all_is_edited_after_the_first_prompt(architecture: str) -> None:
    model, prompt, settings = (
        adapted(architecture),
        draw(5),
        {"do_sample": False, "return_dict_in_generate": True},
    )
    first = model.generate(torch.tensor([prompt]), max_new_tokens=3, **settings)
    both = first.sequences[0].tolist() + draw(6, 9)
    batch = {**padded([both]), **with_cache(model, cache_of(first))}
    second = model.generate(**batch, max_new_tokens=3, output_logits=True, **settings)
    seen, ids = torch.cat(second.logits), second.sequences[0].tolist()
    torch.testing.assert_close(
        seen, truth(model, architecture, ids, len(prompt))[len(both) - 1 : -1], **CLOSE
    )
    assert not torch.allclose(
        seen, truth(model, architecture, ids, len(both))[len(both) - 1 : -1], **CLOSE
    )


def test_a_decode_loop_written_by_hand_equals_generate() -> None:
    model, prompts = adapted(), [draw(4, 1), draw(7, 2)]
    ids, mask = padded(prompts).values()
    cache, answers = None, []
    for _ in range(ANSWER):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        state = {"attention_mask": mask, "position_ids": positions, **with_cache(model, cache)}
        with torch.no_grad():
            out = model(input_ids=ids, **state, use_cache=True)
        cache, ids = cache_of(out), out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        answers.append(ids)
    assert torch.cat(answers, 1).tolist() == assert_generates_the_truth(model, "llama", prompts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", FEW)
def test_labels_lengths_and_the_context_manager_say_the_same(architecture: str, side: str) -> None:
    model, rows, lengths = adapted(architecture), [draw(6, 1), draw(9, 2)], [4, 5]
    batch = padded(rows, side)
    real = batch["attention_mask"] == 1
    labels = padded([[-100] * n + row[n:] for row, n in zip(rows, lengths, strict=True)], side)[
        "input_ids"
    ]
    labels = labels.masked_fill(~real, -100)
    # A bare forward of some models counts positions from the padding.
    if side == "left" and architecture != "bloom":
        batch["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        seen = [model(**batch, labels=labels).logits, model(**batch, prompt_lengths=lengths).logits]
        with peft_baft.prompt_lengths(model, lengths):
            seen.append(model(**batch).logits)
        assert not torch.allclose(model(**batch).logits, seen[0], **CLOSE)
    for logits in seen:
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            torch.testing.assert_close(
                logits[i][real[i]], truth(model, architecture, row, n), **CLOSE
            )


def relative_positions_after(model: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
    context = find_context(model)
    with torch.no_grad():
        model(*args, **kwargs)
    return context.relative_positions.tolist()


def test_a_packed_row_has_the_relative_positions_of_its_sequences() -> None:
    model, pairs = adapted(), [(5, 3), (1, 4), (4, 1)]  # (prompt, answer)
    expected = [[position for p, a in pairs for position in range(-p, a)]]
    positions = torch.tensor([[i for p, a in pairs for i in range(p + a)]])
    ids = torch.tensor([draw(positions.shape[1])])
    labels = ids.masked_fill(torch.tensor(expected) < 0, -100)
    assert (
        relative_positions_after(model, input_ids=ids, position_ids=positions, labels=labels)
        == expected
    )
    assert (
        relative_positions_after(
            model, input_ids=ids, position_ids=positions, prompt_lengths=[p for p, _ in pairs]
        )
        == expected
    )
    # The control: position ids are needed.
    assert relative_positions_after(model, input_ids=ids, labels=labels) != expected


def test_padding_in_a_cache_is_not_counted() -> None:
    model, batch = adapted(), padded([draw(2), draw(5)])
    with torch.no_grad():
        cache = cache_of(model(**batch, use_cache=True))
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 2)], 1)
    new = {"input_ids": torch.ones(2, 2, dtype=torch.long), "attention_mask": mask}
    new |= with_cache(model, cache)
    assert relative_positions_after(model, **new, prompt_lengths=[3, 7]) == [[-1, 0], [-2, -1]]


def test_the_mask_over_cached_tokens_is_read_where_the_new_ones_stand() -> None:
    rows = [draw(4), draw(8)]
    model, batch = adapted(), padded(rows)  # the first row has padding up to the fourth column
    first = {name: tensor[:, :5] for name, tensor in batch.items()}
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
    new = {"input_ids": batch["input_ids"][:, 5:], "attention_mask": batch["attention_mask"]}
    new |= with_cache(model, cache)
    positions = relative_positions_after(model, **new, prompt_lengths=[1, 5])
    assert positions == [[0, 1, 2], [0, 1, 2]]


def test_nothing_is_left_behind_for_the_next_call() -> None:
    model, ids = adapted(), torch.tensor([draw(4)])
    backbone, context = model.base_model.model.model, find_context(model)
    for kwargs in ({"labels": ids}, {"prompt_lengths": [0]}):
        assert relative_positions_after(model, input_ids=ids, **kwargs) == [[0, 1, 2, 3]]
        backbone(ids)  # passes by the model's head, as DPO and GRPO do
        assert context.relative_positions.tolist() == [[-4, -3, -2, -1]]
    with pytest.raises(ValueError):
        model.generate(ids[:, :2], max_new_tokens=2, no_such_argument=1)
    model.generate(ids[:, :2], max_new_tokens=2)
    assert relative_positions_after(model, input_ids=ids) == [[-4, -3, -2, -1]]


def test_what_is_not_a_sequence_of_tokens_is_edited_everywhere() -> None:
    class Net(nn.Linear):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features)

    net = Net(4, 4)
    context = EditContext(net, net)
    net(torch.zeros(2, 4))
    assert (
        context.relative_positions is None
        and context.mask(
            context.relative_positions, torch.zeros(2, 4), BaftConfig(prompt_positions=P)
        )
        is None
    )


def test_training_without_labels_or_lengths_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = adapted().train(), torch.tensor([draw(6)])
    with caplog.at_level(logging.WARNING, logger="peft_baft"):
        model(input_ids=ids, labels=ids)
        model(input_ids=ids, prompt_lengths=[3])
        with torch.no_grad():
            model(input_ids=ids)
        model.eval()(input_ids=ids, logits_to_keep=1)
        assert not caplog.records  # the controls
        for _ in range(2):
            model.train()(input_ids=ids)
    assert [r.name for r in caplog.records] == [
        "peft_baft.adapter.context"
    ] and "prompt_lengths" in caplog.text


def test_whoever_may_read_logits_inside_a_text_is_warned_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = adapted(), torch.tensor([draw(6)])
    with caplog.at_level(logging.WARNING, logger="peft_baft"), torch.no_grad():
        model(input_ids=ids, labels=ids)
        model(input_ids=ids, prompt_lengths=[3])
        with prompt_lengths(model, [3]):
            model(input_ids=ids)
        model.generate(ids, max_new_tokens=2)
        cached = model(input_ids=ids, logits_to_keep=1)
        model(input_ids=ids[:, :2], **with_cache(model, cache_of(cached)))
        model(input_ids=ids[:, :1])
        with model.disable_adapter():
            model(input_ids=ids)
        assert not caplog.records  # the controls
        for _ in range(2):
            model(input_ids=ids)
    assert len(caplog.records) == 1 and "prompt_lengths=[...]" in caplog.text


# A request is put back, and its answer read as a prompt.
SCHEDULES = {
    "whole prompts": {"num_blocks": 64},
    "prompts in pieces": {"num_blocks": 64, "max_batch_tokens": 4},
    "full cache": {
        "num_blocks": 7,
        "safety_margin": 0.0,
    },
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_continuous_batching_generates_what_generate_does(schedule: dict[str, Any]) -> None:
    model, prompts = adapted(), [draw(n, n) for n in (6, 3, 1)]
    # Two that start alike, but what they share is edited in the shorter one only.
    long = draw(16, 9)
    prompts += [long[:9], long]
    greedy = tr.GenerationConfig(
        max_new_tokens=ANSWER, do_sample=False, eos_token_id=-1, pad_token_id=PAD
    )
    cache = tr.ContinuousBatchingConfig(page_size=4, max_requests_per_batch=5, **schedule)
    out = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=cache)
    answers = [result.generated_tokens for result in out.values()]
    assert answers == [
        assert_generates_the_truth(model, "llama", [prompt])[0] for prompt in prompts
    ]
    with model.disable_adapter():  # the control: without the adapter other answers are right
        plain = [
            model.generate(torch.tensor([p]), generation_config=greedy)[0, len(p) :].tolist()
            for p in prompts
        ]
    assert all(other != answer for other, answer in zip(plain, answers, strict=True))


def test_a_continuous_batch_that_cannot_be_told_apart_is_refused() -> None:
    model, ids = adapted(), torch.tensor([draw(4)])
    cache = type(
        "PagedAttentionCache", (), {}
    )()  # continuous batching is known by the class of its cache
    with pytest.raises(NotImplementedError, match=r"generate\(\)"):
        model(input_ids=ids, cache=cache, position_ids=torch.arange(4)[None])
    with pytest.raises(NotImplementedError), peft_baft.prompt_lengths(model, [2]):
        model.init_continuous_batching()
    base = make_model()
    base._cached_continuous_batching_manager = manager = base.init_continuous_batching()
    manager.batch_processor = (
        "made when there was no adapter: prompts share what they have in common"
    )
    with pytest.raises(NotImplementedError, match="after the adapter"):
        get_peft_model(base, BaftConfig(r=4)).init_continuous_batching()


def test_a_model_is_copied_and_pickled_without_the_threads_of_its_batches() -> None:
    model = adapted()
    find_context(model).manager = threading.Lock()
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in copies:
        assert find_context(other).manager is None and find_context(other) is not find_context(
            model
        )
        assert other.base_model.model.generate.__self__ is find_context(other)
