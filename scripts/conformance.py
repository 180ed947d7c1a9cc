"""Run PEFT's own tests on `BaftConfig` and write what came out to docs/conformance.md; `make conformance`.

PEFT's source distribution, of the installed version, carries its tests. Two parts of them take any method of PEFT:

- the common tester (`tests/testing_common.py`), whose methods are called here one by one on tiny models of each architecture;
- whole files, whose lists of configurations and models are replaced by ours.

The document has one section for each set of versions that this was run with; a run replaces its own section.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import tarfile
import types
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers as tr

import peft_baft

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
DOCUMENT = ROOT / "docs" / "conformance.md"
ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3", "gemma3", "opt", "gptj", "bloom")
IN_FILES = ("llama", "gpt2", "qwen2")  # the architectures that whole files run on
FILES = ("test_decoder_models", "test_custom_models", "test_config")
CONFIG = {"task_type": "CAUSAL_LM"}
# Methods of the common tester that take more than a model and a configuration, or are called several times.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "save_pretrained": [{}, {"safe_serialization": False}],
    "save_pretrained_selected_adapters": [{}, {"safe_serialization": False}],
    "add_adapter_no_autocast_adapter_dtype": [{"dtype": torch.float16}, {"dtype": torch.bfloat16}],
    "generate_pos_args": [{"raises_err": False}],
    "training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
    "passing_input_embeds_works": [{"test_name": "baft"}],
}
# Keep init_weights=True.
AT_IDENTITY = (
    "training",
    "prepare_for_training",
    "model_attr",
    "adapter_name",
    "delete",
)
# Called by another one.
HELPERS = (
    "weighted_combination_of_adapters_lora",
    "weighted_combination_of_adapters_ia3",
)
MERGING = "cannot be merged"  # what BaFT's own refusal says
REASONS = {  # of what does not pass: by a piece of its message, or by its name
    MERGING: "BaFT cannot be merged, and says so: its update depends on the hidden vector",
    "is read from safetensors only": "saves a pickle, which could not be loaded again: BaFT refuses before it is written",
    "Weights are read from that format alone": "no safetensors beside the configuration (it saves a configuration only), "
    "and `BaftConfig.from_pretrained` looks at the weights before anything is loaded",
    "cannot be used: The BaftConfig config": "wants a TypeError; BaFT raises a ValueError that names the file",
}


@dataclass(frozen=True)
class Row:
    """The result of one test. kind: passed, failed, or not applicable; model: the architecture, if any."""

    test: str
    kind: str
    why: str
    model: str = ""


def tests_of_peft(cache: Path) -> Path:
    """Download the tests that belong to the installed PEFT; the folder on top of the package `tests`."""
    folder = cache / f"peft-{peft.__version__}-tests"
    if not (folder / "tests" / "__init__.py").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
        ]
        subprocess.run([*command, f"peft=={peft.__version__}", "--dest", str(cache)], check=True)
        package = folder / "tests"
        package.mkdir(parents=True, exist_ok=True)
        with tarfile.open(cache / f"peft-{peft.__version__}.tar.gz") as archive:
            for member in archive.getmembers():
                if re.fullmatch(r"[^/]+/tests/\w+\.py", member.name):
                    content = archive.extractfile(member)
                    assert content is not None, "a Python file in an archive has content"
                    text = content.read().decode()
                    # A tuple, which cannot be changed once pytest has seen it; lists are changed by `replace_lists`.
                    text = text.replace(
                        ", ALL_CONFIG_CLASSES)", ", [(__import__('peft_baft').BaftConfig, {})])"
                    )
                    (package / Path(member.name).name).write_text(text)
        (package / "__init__.py").touch()
    return folder


def import_tests(folder: Path) -> Any:
    """Import PEFT's helpers without the packages that they name and do not need here, and without the Hub."""
    for name, parts in {
        "datasets": ["load_dataset"],
        "diffusers": ["StableDiffusionPipeline"],
    }.items():
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            for part in parts:
                setattr(stub, part, type(part, (), {}))
            sys.modules[name] = stub
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    utilities = importlib.import_module("tests.testing_utils")
    utilities.hub_online_once = lambda *_, **__: contextlib.nullcontext()
    return importlib.import_module("tests.testing_common")


def tiny_models(cache: Path) -> dict[str, str]:
    """Save a tiny random model of each architecture; their folders. PEFT skips tests for names that contain `gpt2`."""
    from conftest import ARCHITECTURES as KNOWN
    from conftest import make_model

    KNOWN.setdefault(
        "gptj",
        lambda: tr.GPTJForCausalLM(
            tr.GPTJConfig(
                vocab_size=64,
                n_embd=32,
                n_layer=4,
                n_head=4,
                rotary_dim=4,
                n_positions=64,
                eos_token_id=2,
            )
        ),
    )
    folders = {}
    for name in ARCHITECTURES:
        folder = cache / "models" / tr.__version__ / name.replace("gpt", "g-p-t-")
        if not (folder / "config.json").exists():
            model = make_model(name)
            model.generation_config = tr.GenerationConfig(
                pad_token_id=2, bos_token_id=1, eos_token_id=2
            )
            model.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def run_common(common: Any, models: dict[str, str]) -> list[Row]:
    """Call every method of PEFT's common tester on every model."""

    class Tester(common.PeftCommonTester):
        transformers_class = tr.AutoModelForCausalLM
        torch_device = "cpu"

        def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
            ids = torch.tensor([[5, 9, 7, 11], [6, 8, 12, 3]])
            return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}

    methods = [name.removeprefix("_test_") for name in dir(Tester) if name.startswith("_test_")]
    rows = []
    for name in sorted(set(methods) - set(HELPERS)):
        for arguments in ARGUMENTS.get(name, [{}]):
            told = ", ".join(
                f"{key}={value}".replace("torch.", "")
                for key, value in arguments.items()
                if key != "test_name"
            )
            for model, folder in models.items():
                kind, why = outcome(common, Tester(), name, arguments, folder)
                rows.append(Row(f"{name}({told})" if told else name, kind, why, model))
    return rows


def outcome(
    common: Any, tester: Any, name: str, arguments: dict[str, Any], folder: str
) -> tuple[str, str]:
    """The result of one method on one model, and the reason of any but a passed one."""
    settings = CONFIG if name.startswith(AT_IDENTITY) else {**CONFIG, "init_weights": False}
    given = dict(arguments)
    first = [given.pop("test_name")] if "test_name" in given else []
    with warnings.catch_warnings(), contextlib.ExitStack() as patches:
        warnings.simplefilter("ignore")
        if "mixed_adapter_batches" in name:  # kept for LoRA and RoAD by name: let BaFT in
            for let_in in ("LoraConfig", "RoadConfig"):
                patches.enter_context(mock.patch.object(common, let_in, peft_baft.BaftConfig))
        try:
            getattr(tester, f"_test_{name}")(
                *first, folder, peft_baft.BaftConfig, dict(settings), **given
            )
        except pytest.skip.Exception as skipped:
            return "not applicable", f"PEFT's own: {skipped}"
        except NotImplementedError as refused:
            return "not applicable" if MERGING in str(refused) else "failed", str(refused)
        except (Exception, pytest.fail.Exception) as error:
            return "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    return "passed", ""


class Collector:
    """A pytest plugin that keeps what concerns BaFT, and its results."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def ours(item: Any) -> bool:
            parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
            return any(
                p is peft_baft.BaftConfig or isinstance(p, peft_baft.BaftConfig) for p in parameters
            )

        items[:] = [item for item in items if ours(item)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        file, name = (
            Path(report.location[0]).stem,
            report.location[2].partition("[")[0].rpartition(".")[2],
        )
        why = ""
        if report.outcome != "passed":
            why = (
                report.longrepr[2]
                if isinstance(report.longrepr, tuple)
                else report.longrepr.reprcrash.message
            )
        kind = "not applicable" if report.outcome == "skipped" or MERGING in why else report.outcome
        self.rows.append(Row(name.removeprefix("test_"), kind, (why.splitlines() or [""])[0], file))


def replace_lists(module: Any, models: dict[str, str], adapter: Path) -> None:
    """Put our configuration and models into the lists that a file of PEFT's tests goes through."""
    layer: dict[str, Any] = {"target_modules": ["lin0"], "r": 2}
    pair = [{**layer, "init_weights": False}, {**layer, "init_weights": False}]
    other = [pair[0], {**pair[1], "target_modules": ["lin1"]}]
    ours = peft_baft.BaftConfig
    lists: dict[str, list[Any]] = {
        "PEFT_DECODER_MODELS_TO_TEST": [models[name] for name in IN_FILES],
        "SMALL_GRID_MODELS": [models[name] for name in IN_FILES],
        "ALL_CONFIGS": [(ours, dict(CONFIG))],
        "PEFT_MODELS_TO_TEST": [(str(adapter), "main")],
        "TEST_CASES": [("BaFT", "MLP", ours, layer)],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            ("same", "BaFT", ours, *pair),
            ("other", "BaFT", ours, *other),
        ],
        "MIXED_ADAPTER_TEST_CASES": [
            ("same", *(ours(**k) for k in pair)),
            ("other", *(ours(**k) for k in other)),
        ],
    }
    for name, content in lists.items():
        if isinstance(getattr(module, name, None), list):
            getattr(module, name)[:] = content


def run_files(folder: Path, models: dict[str, str], cache: Path) -> list[Row]:
    """Run whole files of PEFT's tests."""
    adapter = cache / "adapter"
    # A file of another method, as PEFT's tests of configurations want.
    peft.LoraConfig().save_pretrained(adapter)
    for name in FILES:
        replace_lists(importlib.import_module(f"tests.{name}"), models, adapter)
    collector = Collector()
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "-c",
        "/dev/null",
        "--tb=short",
        "-W",
        "ignore",
    ]
    pytest.main(
        [*(str(folder / "tests" / f"{name}.py") for name in FILES), *options], plugins=[collector]
    )
    return collector.rows


def reason(row: Row) -> str | None:
    """Why a test does not pass, None where that is not known: a finding."""
    known = next(
        (why for key, why in REASONS.items() if key in row.why or row.test.startswith(key)), None
    )
    return known or (row.why if row.kind == "not applicable" else None)


def section(common: list[Row], files: list[Row]) -> str:
    """The part of the document that belongs to the installed versions."""
    lines = [
        heading(),
        "",
        f"PEFT's common tester, on tiny models of {', '.join(ARCHITECTURES)}: on each model",
    ]
    counts = {
        model: Counter(row.kind for row in common if row.model == model) for model in ARCHITECTURES
    }
    for told in sorted({counted(count) for count in counts.values()}):
        alike = [model for model, count in counts.items() if counted(count) == told]
        lines[-1] += f" **{told}**" + (
            "" if len(alike) == len(counts) else f" ({', '.join(alike)})"
        )
    lines += ["", "| does not pass | result | why |", "|---|---|---|"]
    for (test, kind, why), models in grouped(common).items():
        where = "" if len(models) == len(ARCHITECTURES) else f" on {', '.join(models)}"
        lines.append(f"| `_test_{test}`{where} | {kind} | {why} |")
    passed = sorted(
        {row.test for row in common} - {row.test for row in common if row.kind != "passed"}
    )
    lines += ["", f"Passed on all: {', '.join(f'`{test}`' for test in passed)}.", ""]
    lines += [
        f"Whole files, with their lists replaced by `BaftConfig` (decoder models: {', '.join(IN_FILES)}):",
        "",
    ]
    for file in FILES:
        lines.append(
            f"- `{file}.py`: {counted(Counter(row.kind for row in files if row.model == file))}."
        )
        failed = grouped([row for row in files if row.model == file and row.kind == "failed"])
        lines += [
            f"  - `test_{test}`, {len(rows)} times: {why}"
            for (test, _, why), rows in failed.items()
        ]
    return "\n".join(lines) + "\n"


def grouped(rows: list[Row]) -> dict[tuple[str, str, str], list[str]]:
    """Where each test does not pass, by its name, its result and the reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.kind != "passed":
            why = reason(row) or f"**unexplained**: {row.why}"
            found.setdefault((row.test, row.kind, why.replace("|", "\\|")), []).append(row.model)
    return found


def counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kinds[kind]} {kind}" for kind in ("passed", "failed", "not applicable"))


def heading() -> str:
    return f"## peft {peft.__version__}, transformers {tr.__version__}"


INTRODUCTION = """# PEFT's own tests, fed with `BaftConfig`

Written by `make conformance` (scripts/conformance.py), which downloads the tests of the installed PEFT.
"not applicable" are tests of what a method need not have (merging, biases, prompts), skipped by PEFT or refused by BaFT. The
tests of mixed batches (`adapter_names`) are kept for LoRA and RoAD by name; here BaFT is let in.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "peft_baft", help="for PEFT's tests"
    )
    cache = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    models = tiny_models(cache)
    folder = tests_of_peft(cache)
    common, files = run_common(import_tests(folder), models), run_files(folder, models, cache)
    old = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    sections = {
        text.splitlines()[0]: text
        for text in re.findall(r"^## peft .*?(?=^## |\Z)", old, re.M | re.S)
    }
    sections[heading()] = section(common, files)
    parts = [sections[title].rstrip() + "\n" for title in sorted(sections, reverse=True)]
    DOCUMENT.write_text("\n".join([INTRODUCTION, *parts]))
    findings = [row for row in (*common, *files) if row.kind == "failed" and reason(row) is None]
    for row in findings:
        print(f"unexplained: {row.test} ({row.model}): {row.why}")
    print(
        f"{DOCUMENT}: {counted(Counter(row.kind for row in (*common, *files)))}, {len(findings)} unexplained"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
