"""How calls of transformers are read: by meaning, and what cannot be read is an error, never another position."""

# mypy: disable-error-code="arg-type, attr-defined, call-arg, index, union-attr"
from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import peft_baft
from conftest import cache_of, make_model, randomise, with_cache
from peft_baft import BaftConfig, running
from peft_baft.adapter import find_context, model_call
from peft_baft.adapter.model_call import (
    StackSignature,
    UnknownPositionError,
    cache_arguments,
    cached_columns,
    read_stack_call,
)
from peft_baft.running import fork

P, PAD = 3, 0
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
SEAM = Path(model_call.__file__)
NAMES_OF_TRANSFORMERS = re.compile(
    r"past_key_values|cache_params|layer_past|cu_seq_lens|use_cache|get_seq_length|batch_select_indices|"
    r"continuous_batching_config|PagedAttentionCache|requests_in_batch|guidance_scale|"
    r"num_items_in_batch|shift_labels|fused_lm_head"
)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION: dict[str, Any] = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def minimax() -> Any:
    kinds = ["linear_attention", "full_attention"] * 2
    return tr.MiniMaxConfig(
        **SIZES,
        **ATTENTION,
        layer_types=kinds,
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=4,
    )


RECURRENT: dict[str, Callable[[], Any]] = {
    "mamba": lambda: tr.MambaConfig(**SIZES, state_size=4),
    "mamba2": lambda: tr.Mamba2Config(
        **SIZES, state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=4
    ),
    "falcon_mamba": lambda: tr.FalconMambaConfig(**SIZES, state_size=4),
    "rwkv": lambda: tr.RwkvConfig(
        **SIZES, attention_hidden_size=32, intermediate_size=48, context_length=64
    ),
    "minimax": minimax,
}


def adapted(base: nn.Module, **settings: Any) -> PeftModel:
    """A model with a random adapter that visibly edits blocks 1 and 2."""
    chosen = {
        "r": 4,
        "prompt_positions": P,
        "gate_offset": 0.0,
        "layers_to_transform": [1, 2],
        "task_type": "CAUSAL_LM",
    }
    torch.manual_seed(0)  # the same basis for every model
    model = get_peft_model(base, BaftConfig(**{**chosen, **settings}))
    randomise(model, 2.0)
    return model.eval()


def built(config: Any) -> Any:
    """A random model of a config, with weights large enough to make its blocks matter."""
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    return model


def generated(model: Any, prompt: list[int], **settings: Any) -> tuple[list[int], Tensor]:
    """The greedy answer to a prompt, and the logits (tokens, vocabulary) that its tokens were chosen from."""
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **settings,
    }
    out = model.generate(torch.tensor([prompt]), **settings)
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


PROMPT = [5, 9, 14, 3, 22, 41]


@pytest.mark.parametrize("name", RECURRENT)
def test_models_with_a_state_instead_of_keys_edit_every_answer_token(name: str) -> None:
    model = adapted(built(RECURRENT[name]()))
    answer, seen = generated(model, PROMPT)
    with torch.no_grad():
        whole = model(torch.tensor([PROMPT + answer]), prompt_lengths=[len(PROMPT)]).logits[
            0, len(PROMPT) - 1 : -1
        ]
        torch.testing.assert_close(seen, whole, **CLOSE)
        # The control: with the answer taken for prompt, as when nothing seems to be cached, other logits come out.
        unedited = model(
            torch.tensor([PROMPT + answer]), prompt_lengths=[len(PROMPT) + 5 + P]
        ).logits[0, len(PROMPT) - 1 : -1]
    assert not torch.allclose(seen, unedited, **CLOSE)


CACHE = running.cache_parameter(make_model())  # what this version of transformers calls it


class InventedStack(tr.LlamaModel):
    """A stack that takes its cache under a name which nobody has used."""

    def forward(
        self, input_ids=None, attention_mask=None, remembrance: tr.Cache | None = None, **kwargs
    ):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, **{CACHE: remembrance}, **kwargs
        )


class HidingStack(tr.LlamaModel):
    """A stack that keeps its cache to itself."""

    hidden: tr.Cache | None = None

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **{CACHE: self.hidden},
            use_cache=True,
        )
        self.hidden = cache_of(out)
        return out


class ToyModel(tr.LlamaForCausalLM):
    """A causal language model with a stack of its own, and a `generate` that passes each new token alone."""

    def forward(
        self, input_ids, attention_mask=None, remembrance: tr.Cache | None = None, use_cache=None
    ):
        given = {} if remembrance is None else {"remembrance": remembrance}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **given
        )
        return tr.utils.ModelOutput(logits=self.lm_head(out[0]), remembrance=cache_of(out))

    def generate(self, input_ids, tokens=5):
        given: dict[str, Any] = {}
        logits, columns = [], input_ids
        for _ in range(tokens):
            out = self(columns, use_cache=True, **given)
            if not isinstance(self.model, HidingStack):
                given = {"remembrance": out.remembrance}
            logits.append(out.logits[0, -1])
            columns = out.logits[:, -1:].argmax(-1)
        return torch.stack(logits)


def toy(stack: type) -> Any:
    """A `ToyModel` with the weights of the tiny llama."""
    plain = make_model()
    model = ToyModel(plain.config)
    model.model = stack(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


@torch.no_grad()
def test_a_cache_is_found_by_what_it_is_under_an_invented_name() -> None:
    _, logits = generated(adapted(make_model()), PROMPT)
    model = adapted(toy(InventedStack))
    torch.testing.assert_close(
        model.get_base_model().generate(torch.tensor([PROMPT])), logits, **CLOSE
    )
    with model.disable_adapter():  # the control
        assert not torch.allclose(
            model.get_base_model().generate(torch.tensor([PROMPT])), logits, **CLOSE
        )
    base = model.get_base_model()
    base(torch.tensor([[7]]), remembrance=base(torch.tensor([PROMPT]), use_cache=True).remembrance)
    # Outside generate: after the cached tokens, so edited.
    assert find_context(model).relative_positions.tolist() == [[len(PROMPT)]]


@torch.no_grad()
def test_a_cache_that_is_hidden_is_an_error_and_not_another_position() -> None:
    model = adapted(toy(HidingStack))
    with pytest.raises(
        UnknownPositionError,
        match=r"ToyModel \(transformers .*inside generate\(\).*use_cache=False",
    ):
        model.get_base_model().generate(torch.tensor([PROMPT]))
    base = model.get_base_model()
    base.model.hidden = None
    base(torch.tensor([PROMPT]))
    with pytest.raises(
        UnknownPositionError, match=r"covers 6 tokens before the 1 new ones.*baft check"
    ):
        base(torch.tensor([[7]]), attention_mask=torch.ones(1, 7))


def test_what_a_mask_and_a_cache_say_must_agree() -> None:
    model, ids = adapted(make_model()), torch.tensor([PROMPT])
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        with pytest.raises(
            UnknownPositionError, match="holds 6 tokens, but its mask covers 8 before the 1"
        ):
            model(torch.tensor([[7]]), attention_mask=torch.ones(1, 9), **with_cache(model, cache))
        with pytest.raises(UnknownPositionError, match="covers 3 tokens before"):
            model(torch.tensor([[7]]), attention_mask=torch.ones(1, 4))
        # The control.
        model(torch.tensor([[7]]), attention_mask=torch.ones(1, 7), **with_cache(model, cache))


def test_two_caches_and_a_tuple_of_tensors_are_refused() -> None:
    model, ids = adapted(make_model()), torch.tensor([[7]])
    caches = tr.DynamicCache(), tr.DynamicCache()
    with pytest.raises(UnknownPositionError, match="2 caches"):
        model(ids, **with_cache(model, caches[0]), other=caches[1])
    keys = ((torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8)),) * 4
    with pytest.raises(UnknownPositionError, match="tuple of tensors"):
        model.get_base_model().model(ids, **{CACHE: keys})


def test_a_recurrent_state_outside_generate_needs_a_mask_where_lengths_are_stated() -> None:
    base = built(RECURRENT["mamba"]())
    model, ids = adapted(base), torch.tensor([PROMPT])
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        assert (
            cached_columns(cache) is None and cached_columns(type(cache)(config=base.config)) == 0
        )
        model(torch.tensor([[7]]), **with_cache(model, fork(cache)))
        # Edited, as every token after a filled cache.
        assert find_context(model).relative_positions.min() >= 0
        with pytest.raises(UnknownPositionError, match="does not report its length"):
            model(torch.tensor([[7]]), **with_cache(model, fork(cache)), prompt_lengths=[4])


def test_guided_generation_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="guidance_scale"):
        adapted(make_model()).generate(torch.tensor([PROMPT]), guidance_scale=1.5)


@pytest.mark.parametrize(
    ("lengths", "error", "said"),
    [
        ([3.5, 4, 2], TypeError, "integers"),
        ([True], TypeError, "integers"),
        ([1, 2, 3], ValueError, "one integer per sequence"),
        ([-1], ValueError, "0 or more"),
    ],
)
def test_prompt_lengths_that_are_none_are_refused_everywhere(
    lengths: list, error: type, said: str
) -> None:
    model, ids = adapted(make_model()), torch.tensor([PROMPT])
    settings = {"max_new_tokens": 2, "do_sample": False}
    with pytest.raises(error, match=said):
        model.generate(ids, prompt_lengths=lengths, **settings)
    with pytest.raises(error, match=said):
        model(ids, prompt_lengths=lengths)
    with pytest.raises(error, match=said), peft_baft.prompt_lengths(model, lengths):
        model.generate(ids, **settings)
    model.generate(ids, prompt_lengths=[4], **settings)  # the control


def test_threads_that_generate_on_one_model_answer_as_one_alone() -> None:
    model = adapted(make_model())
    prompts = [
        torch.randint(3, 64, (2 + i % 7,), generator=torch.Generator().manual_seed(i)).tolist()
        for i in range(24)
    ]
    alone = [generated(model, prompt)[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: generated(model, prompt)[0], prompts * 3))
    assert together == alone * 3
    with model.disable_adapter():  # the control
        assert [generated(model, prompt)[0] for prompt in prompts] != alone


def test_a_call_of_one_thread_is_not_seen_by_another() -> None:
    model, ids = adapted(make_model()), torch.tensor([PROMPT])
    context, other = find_context(model), []

    def forward() -> None:
        with torch.no_grad():
            model(ids[:, :4])
        other.append(
            (
                context.relative_positions.tolist(),
                context.recorded,
                context.stated_lengths,
            )
        )

    with torch.no_grad(), peft_baft.prompt_lengths(model, [2]), context.recording() as recorded:
        model(ids)
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        assert context.relative_positions.tolist() == [[-2, -1, 0, 1, 2, 3]] and len(recorded) == 2
    assert other == [([[-4, -3, -2, -1]], None, None)]


def test_a_block_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="Call the model"):
        block = adapted(make_model()).get_base_model().model.layers[1]
        angles = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
        block(torch.randn(1, 4, 32), position_embeddings=angles)


def causal_classes() -> dict[str, type]:
    """Every causal language model of the installed transformers that can be imported here, by name."""
    classes = {}
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        for name in [names] if isinstance(names, str) else names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of model files that are only imported here
                found = getattr(tr, name, None)
            if isinstance(found, type) and issubclass(found, nn.Module):
                classes[name] = found
    return classes


WITHOUT_CACHE = {  # those whose forward takes no `Cache`: refused when attached, or counted by their own state
    "OpenAIGPTLMHeadModel",
    "ReformerModelWithLMHead",
    "RwkvForCausalLM",
    "XLNetLMHeadModel",
    "xLSTMForCausalLM",
    "Gemma4AssistantForCausalLM",
    "Gemma4UnifiedAssistantForCausalLM",
}


def test_every_causal_model_of_transformers_takes_a_cache_that_is_understood() -> None:
    classes, unknown = causal_classes(), set()
    assert len(classes) > 100
    for name, found in classes.items():
        try:
            parameter = running.cache_parameter(found)
        except NotImplementedError:
            unknown.add(name)
            continue
        names = tuple(inspect.signature(found.forward).parameters)
        signature = StackSignature(names, cache_arguments(names))
        held = read_stack_call(
            signature, (), {"input_ids": torch.ones(1, 2), parameter: tr.DynamicCache()}
        )
        assert held is not None and isinstance(held.cache, tr.Cache), name
        memories = {
            other
            for other in signature.caches
            if other not in {parameter, "use_cache", "cache_position"}
        }
        assert not memories, f"{name} has more than one memory: {memories}"
    assert unknown <= WITHOUT_CACHE, f"no cache is found in {sorted(unknown - WITHOUT_CACHE)}"
    assert "LlamaForCausalLM" not in unknown


def test_a_transformers_newer_than_the_tests_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert model_call.newer_than_tested("5.100.0.dev0") and model_call.newer_than_tested("6.0")
    assert not any(
        map(model_call.newer_than_tested, (model_call.TESTED_TRANSFORMERS, "5.24.7", "5.9.1"))
    )
    for _ in range(2):
        model_call.warn_if_untested("99.0")
    model_call.warn_if_untested(model_call.TESTED_TRANSFORMERS)  # the control
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING"
        and "99.0" in record.message
        and "baft check" in record.message
    )


def test_no_other_file_names_what_transformers_may_rename() -> None:
    files = [
        path
        for path in (SEAM.parents[1]).rglob("*.py")
        if path not in (SEAM, Path(running.__file__))
    ]
    assert NAMES_OF_TRANSFORMERS.search(SEAM.read_text())  # the control
    naming = {
        str(path): found.group()
        for path in files
        if (found := NAMES_OF_TRANSFORMERS.search(path.read_text()))
    }
    assert not naming


def test_the_signature_tells_what_may_remember() -> None:
    class Stack(nn.Module):
        def forward(
            self,
            input_ids,
            hidden_states,
            encoder_hidden_states,
            past_buckets_states,
            mems,
            state,
            use_cache,
        ): ...

    names = StackSignature.of(Stack()).names
    assert cache_arguments(names) == {"past_buckets_states", "mems", "state", "use_cache"}
