"""What the benchmarks share: alternated timings, tables, the machine's limits, models and facts.

Everything is compared within one process, in turn, and told as a ratio of medians: absolute times of a shared machine say
little. CPU time is the process's own; on a GPU, time between CUDA events.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_baft
from peft_baft.editing import baft
from peft_baft.editing.acceleration.packed_linear import packed_weight, product
from peft_baft.editing.fast_paths import open_forward
from peft_baft_bench.tasks.tasks import read_benchmark

# Fewest steps on ZsRE rows 900-909, `peers.py --sweep`.
BEST_LR = {
    "baft": 2e-3,
    "reft": 1e-2,
    "lora": 5e-3,
}
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def arguments(description: str, **more: Any) -> argparse.Namespace:
    """The options that every benchmark has, and those given as NAME=default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model",
        default="smollm2",
        help="as for `baft`; or llama-3-8b: its shape with random weights",
    )
    parser.add_argument(
        "--data", default="data/zsre_edit.json", help="ZsRE's file of the continual protocol"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def launch(target: Sequence[str], options: Mapping[str, Any], processes: int, **more: Any) -> None:
    """Run a module or script with its words and `--name value` options, in processes of one thread each.

    Raises:
        RuntimeError: it failed; with the end of what it complained of.
    """
    begin = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    more["env"] = os.environ | {"OMP_NUM_THREADS": "1"} | more.get("env", {})
    done = subprocess.run(
        [sys.executable, *begin, *target, *given], capture_output=True, text=True, **more
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer; a model of random weights takes SmolLM2's tokenizer, since only shapes matter."""
    base, tokenizer = peft_baft.load_model(
        "smollm2" if options.model == "llama-3-8b" else options.model
    )
    if options.model == "llama-3-8b":
        with torch.device(options.device):
            base = LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B, dtype="bfloat16")).to(torch.bfloat16)
    return base.to(options.device).eval(), tokenizer


def facts(options: argparse.Namespace, first: int, last: int) -> list[peft_baft.Edit]:
    return [case.edit for case in read_benchmark("zsre", options.data)[first:last]]


def editor(
    base: Any, tokenizer: Any, method: str, unrelated: Sequence[Any] = (), **descent: Any
) -> Any:
    """A fresh adapter of `baft`, `reft` or `lora` and what edits it. Call `editor.model.unload()` when done."""
    torch.manual_seed(0)
    descent = {"lr": BEST_LR[method]} | descent
    settings = peft_baft.DescentConfig(**descent)
    if method == "lora":
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))
        return peft_baft.AdapterEditor(model, tokenizer, settings, template="raw")
    weighting = {"baft": "basis", "reft": "none"}[method]
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM", weighting=weighting))
    return peft_baft.BaftEditor(
        model, tokenizer, unrelated, descent=settings, template="raw", scope=peft_baft.NARROW
    )


@contextmanager
def plain_path() -> Iterator[None]:
    """Let edits compute everything again at each step: the readable reference."""
    with patch.object(baft, "open_forward", lambda *given: open_forward(*given[:4], None)):
        yield


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    if not device.startswith("cuda"):
        begin = time.process_time()
        work()
        return time.process_time() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def alternated(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each work returns, in turn: A B C A B C …, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            value = work()
            if number:
                found[name].append(value)
    return found


def table(title: str, unit: str, found: Mapping[str, list[float]], reference: str) -> None:
    """Print medians, their spread, and the ratio of each to the reference, pair by pair."""
    print(f"\n**{title}**\n\n| | {unit}: median (min to max) | × {reference} |\n|---|---|---|")
    for name, values in found.items():
        ratios = [value / other for value, other in zip(values, found[reference], strict=True)]
        spread = f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"
        print(f"| {name} | {spread} | {statistics.median(ratios):.2f} |", flush=True)


def machine(options: argparse.Namespace) -> None:
    """Print what was measured on, and how fast it reads memory."""
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(
        f"torch {torch.__version__}, {name}, {options.threads} thread(s); memory read at {bandwidth(options.device):.1f} GB/s"
    )


def bandwidth(device: str) -> float:
    """GB a second that a sum over 400 MB reads; the best of five."""
    data = torch.ones(100_000_000, device=device)
    return 0.4 / min(seconds(data.sum, device) for _ in range(5))


def products(model: PeftModel, step: Callable[[], Any]) -> list[tuple[nn.Linear, int]]:
    """Each product with a weight in the forward of one step: the layer, and how many tokens it was given."""
    seen: list[tuple[nn.Linear, int]] = []

    def note(layer: nn.Linear, given: tuple, _: Any) -> None:
        seen.append((layer, given[0].shape[:-1].numel()))

    # Not the adapter's.
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape[0] > 64]
    hooks = [layer.register_forward_hook(note) for layer in linear]
    step()
    for hook in hooks:
        hook.remove()
    return seen


def bound(
    products: Sequence[tuple[nn.Linear, int]], device: str, packing: bool
) -> tuple[float, int]:
    """The same products alone, forward and backward, in order (so that weights come cold): seconds, bytes of weights read.

    packing: with the weights as edits pack them on a CPU.
    """
    inputs = [
        torch.randn(n, layer.in_features, device=device, dtype=layer.weight.dtype)
        for layer, n in products
    ]
    grads = [
        torch.randn(n, layer.out_features, device=device, dtype=layer.weight.dtype)
        for layer, n in products
    ]
    weights = [
        (packed_weight(layer, {}).weight, packed_weight(layer, {}).transposed)
        if packing
        else (layer.weight, layer.weight.t())
        for layer, _ in products
    ]
    multiplied = product if packing else nn.functional.linear

    def multiply() -> None:
        with torch.no_grad():
            for x, (weight, _) in zip(inputs, weights, strict=True):
                multiplied(x, weight, None)
            for g, (_, transposed) in zip(reversed(grads), reversed(weights), strict=True):
                multiplied(g, transposed, None)

    multiply()
    return seconds(multiply, device), 2 * sum(
        layer.weight.numel() * layer.weight.element_size() for layer, _ in products
    )
