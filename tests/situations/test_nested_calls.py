"""A logits processor, a stopping criterion or a streamer that calls the model: it gets what it would get alone."""

# mypy: disable-error-code="attr-defined, operator, union-attr, arg-type, index, var-annotated"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from conftest import VOCABULARY, with_cache
from side_by_side import METHODS, adapted

NEW = 5


def ids(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(
        3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )


PROMPT, SHORT, LONG = ids(1, 8, 1), ids(1, 5, 2), ids(1, 14, 3)
AS_LONG = ids(1, 8, 4)


def generate(model: Any, prompt: Tensor = PROMPT, **settings: Any) -> Tensor:
    mask = torch.ones_like(prompt)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(prompt, attention_mask=mask, **settings)


@torch.no_grad()
def call(model: Any, text: Tensor, **given: Any) -> Tensor:
    return model(text, attention_mask=torch.ones_like(text), **given).logits


class Processor(tr.LogitsProcessor):
    """Runs something at every step."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run, self.seen = run, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(self.run())
        return scores


class Stop(tr.StoppingCriteria, Processor):
    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        self.seen.append(self.run())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer(BaseStreamer, Processor):
    """Is called with the prompt before the first step, too."""

    def put(self, _: Tensor) -> None:
        self.seen.append(self.run())

    def end(self) -> None:
        pass


HOW: dict[str, Callable[[Processor], dict[str, Any]]] = {
    "processor": lambda p: {"logits_processor": tr.LogitsProcessorList([p])},
    "criterion": lambda p: {"stopping_criteria": tr.StoppingCriteriaList([p])},
    "streamer": lambda p: {"streamer": p},
}
CLASSES = {"processor": Processor, "criterion": Stop, "streamer": Streamer}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("text", [SHORT, AS_LONG, LONG, PROMPT], ids=["5", "8", "14", "same"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("method", METHODS)
def test_a_forward_inside_generate_is_a_call_of_its_own(
    method: str, how: str, text: Tensor, use_cache: bool
) -> None:
    model = adapted(method)
    alone, wanted = call(model, text), generate(model, use_cache=use_cache)
    watcher = CLASSES[how](lambda: call(model, text))
    got = generate(model, use_cache=use_cache, **HOW[how](watcher))
    assert torch.equal(got, wanted) and len(watcher.seen) >= NEW
    for seen in watcher.seen:
        torch.testing.assert_close(seen, alone)
    with model.disable_adapter():  # the control
        assert not torch.allclose(call(model, text), alone, atol=1e-3)


@pytest.mark.parametrize("given", ["argument", "context", "labels"])
def test_what_such_a_call_states_holds_for_it(given: str) -> None:
    import peft_baft

    model = adapted("baft")
    labels = torch.where(torch.arange(14) < 4, -100, LONG)

    def nested() -> Tensor:
        if given == "argument":
            return call(model, LONG, prompt_lengths=[4])
        if given == "labels":
            return call(model, LONG, labels=labels)
        with peft_baft.prompt_lengths(model, [4]):
            return call(model, LONG)

    alone, plain = nested(), call(model, LONG)
    assert not torch.allclose(alone, plain, atol=1e-3)  # the control: it makes a difference
    watcher = Processor(nested)
    with peft_baft.prompt_lengths(model, [6]):  # of the text that is generated from
        wanted = generate(model)
        got = generate(model, logits_processor=tr.LogitsProcessorList([watcher]))
    assert torch.equal(got, wanted)
    for seen in watcher.seen:
        torch.testing.assert_close(seen, alone)


def test_a_call_with_a_cache_of_its_own_goes_on_from_that() -> None:
    """Two texts side by side, as in contrastive decoding by hand: the other text has its own prompt and answer."""
    model, cache, steps = adapted("baft"), tr.DynamicCache(), iter(LONG[0, 5:].split(1))

    def nested() -> Tensor:
        tokens = LONG[:, :5] if cache.get_seq_length() == 0 else next(steps)[None]
        mask = torch.ones(1, cache.get_seq_length() + tokens.shape[1], dtype=torch.long)
        with torch.no_grad():
            return model(tokens, attention_mask=mask, **with_cache(model, cache)).logits[:, -1]

    watcher = Processor(nested)
    generate(model, logits_processor=tr.LogitsProcessorList([watcher]))
    wanted = call(model, LONG[:, : 5 + NEW - 1], prompt_lengths=[5])[0, 4:]
    torch.testing.assert_close(torch.cat(watcher.seen), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("unconditional", [SHORT[:, :4], AS_LONG], ids=["shorter", "as long"])
def test_guidance_by_transformers_own_processor(unconditional: Tensor) -> None:
    model, scale = adapted("baft"), 1.7
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        scale,
        model.get_base_model(),
        unconditional_ids=unconditional,
        unconditional_attention_mask=torch.ones_like(unconditional),
    )
    got = generate(model, logits_processor=tr.LogitsProcessorList([processor]))
    one, other = PROMPT, unconditional
    for _ in range(NEW):
        scores = [
            call(model, x, prompt_lengths=[p.shape[1]])[:, -1].log_softmax(-1)
            for x, p in ((one, PROMPT), (other, unconditional))
        ]
        token = (scale * (scores[0] - scores[1]) + scores[1]).argmax(-1, keepdim=True)
        one, other = torch.cat([one, token], 1), torch.cat([other, token], 1)
    assert torch.equal(got, one)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
        {"use_cache": False, "num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_no_way_to_generate_is_disturbed(settings: dict[str, Any]) -> None:
    model = adapted("baft")
    alone = call(model, LONG)
    torch.manual_seed(0)
    wanted = generate(model, **settings)
    watcher = Processor(lambda: call(model, LONG))
    torch.manual_seed(0)
    got = generate(model, logits_processor=tr.LogitsProcessorList([watcher]), **settings)
    assert torch.equal(got, wanted) and watcher.seen
    for seen in watcher.seen:
        torch.testing.assert_close(seen, alone)


def test_a_generate_inside_generate() -> None:
    model = adapted("baft")
    alone, wanted = generate(model, SHORT), generate(model)
    watcher = Stop(lambda: generate(model, SHORT))
    got = generate(model, stopping_criteria=tr.StoppingCriteriaList([watcher]))
    assert torch.equal(got, wanted)
    assert watcher.seen and all(torch.equal(seen, alone) for seen in watcher.seen)


def test_a_forward_inside_a_forward() -> None:
    """As a probe on a block does that asks the model about another text."""
    model = adapted("baft")
    alone, wanted = call(model, SHORT), call(model, LONG, prompt_lengths=[6])
    seen, block = [], model.get_base_model().model.layers[0]

    def probe(*_: Any) -> None:
        if not seen:
            seen.append(torch.zeros(()))  # or it would call itself
            seen.append(call(model, SHORT))

    with block.register_forward_hook(probe):
        torch.testing.assert_close(call(model, LONG, prompt_lengths=[6]), wanted)
    torch.testing.assert_close(seen[1], alone)
