"""Kinds of adapters: plain BaFT knows of no other, the memory can be deleted, and a third one is a file."""

# mypy: disable-error-code="attr-defined, operator, union-attr, arg-type, index, call-arg, var-annotated"
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from adapters import config as plain_config
from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft.adapter.blocks import block_names
from peft_baft.adapter.call import Call
from peft_baft.adapter.kinds import KINDS, Part, SavedTensor, register_kind
from peft_baft.adapter.layer import BaftLayer

ROOT = Path(__file__).parents[2]
OF_THE_MEMORY = (
    "src/peft_baft/memory",
    "src/peft_baft_bench/methods/memory.py",
    "src/peft_baft_cli/work/memory.py",
    "tests/memory",
)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "src/peft_baft/adapter").glob("*.py")), ids=lambda path: path.name
)
def test_plain_baft_does_not_speak_of_a_memory(path: Path) -> None:
    found = re.findall(r"^.*\bmemory\b.*$", path.read_text("utf-8"), re.I | re.M)
    assert not found
    assert re.search(r"\bmemory\b", (ROOT / OF_THE_MEMORY[0] / "kind.py").read_text("utf-8"))


@pytest.mark.skipif(
    not (ROOT / OF_THE_MEMORY[0]).exists(), reason="the memory has been deleted already"
)
def test_without_the_memory_all_the_rest_works(tmp_path: Path) -> None:
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in OF_THE_MEMORY:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(*arguments: str) -> str:
        path = {"PYTHONPATH": f"{tmp_path / 'src'}{os.pathsep}{tmp_path / 'tests'}"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, **path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    names = run(
        "-c",
        "import peft_baft, peft_baft_cli\n"
        "from peft_baft.adapter.kinds import KINDS\n"
        "from peft_baft_bench.methods.methods import METHODS\n"
        "print(peft_baft.__file__, *KINDS, *METHODS)",
    )
    assert str(tmp_path) in names and "memory" not in names.split()[1:] and "baft" in names
    quick = ("tests/adapter/test_base_identity.py", "tests/adapter/test_counts.py")
    run("-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *quick)


# A third kind: a vector that is added to each answer token in one block. docs/kinds.md explains it line by line.


@dataclass
class ShiftConfig:
    """block: in which the vector is added, counted from 0."""

    block: int = 0


class Shift:
    """Adds one vector to the block's output at every token of an answer."""

    name = "shift"
    settings = ShiftConfig
    formats = range(1, 2)
    trains = False
    sets = False
    needs_same_base = False
    editor = None

    def check_config(self, config: BaftConfig) -> None:
        pass

    def saved_format(self, config: BaftConfig) -> int:
        return 1

    def choose_blocks(self, model: nn.Module, config: BaftConfig) -> list[str]:
        return block_names(model, [config.settings.block], None)

    def attach(self, layer: BaftLayer, adapter_name: str, config: BaftConfig, width: int) -> None:
        layer.baft_part[adapter_name] = Part({"vector": torch.zeros(width)})

    def change(
        self, layer: BaftLayer, adapter_name: str, hidden: Tensor, call: Call
    ) -> Tensor | None:
        is_answer = call.relative_positions >= 0
        return torch.where(is_answer[..., None], layer.baft_part[adapter_name].vector, 0)

    def change_rows(
        self, layer: BaftLayer, rows: Mapping[str, Sequence[int]], hidden: Tensor, call: Call
    ) -> list[tuple[Tensor, Tensor]]:
        numbers = {name: torch.tensor(of) for name, of in rows.items()}
        return [
            (index, self.change(layer, name, hidden, call)[index])
            for name, index in numbers.items()
        ]

    def saved_tensors(self, config: BaftConfig, block: str) -> dict[str, SavedTensor]:
        return {"part.vector": SavedTensor((config.hidden_size,), torch.float32)}

    def check_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        pass


@pytest.fixture
def shift() -> Iterator[PeftModel]:
    """A model with such an adapter, in block 1."""
    register_kind(Shift())
    model = get_peft_model(make_model(), BaftConfig(shift={"block": 1}, task_type="CAUSAL_LM"))
    (layer,) = baft_layers(model)
    layer.baft_part["default"].replace({"vector": torch.linspace(-2, 2, 32)})
    yield model.eval()
    del KINDS["shift"]


def shifted(tokens: Tensor, start: int) -> Tensor:
    """The logits of the base model with the vector added by a plain hook, from a column on."""
    base: Any = make_model()

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, start:] += torch.linspace(-2, 2, 32)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    base.model.layers[1].register_forward_hook(add)
    with torch.no_grad():
        return base(tokens).logits


@torch.no_grad()
def test_a_third_kind_changes_the_tokens_that_it_says(shift: PeftModel, tokens: Tensor) -> None:
    found = shift(tokens, prompt_lengths=[4, 4]).logits
    torch.testing.assert_close(found, shifted(tokens, 4))
    assert not torch.allclose(found[:, 4:], make_model()(tokens).logits[:, 4:])  # the control
    assert not [p for p in shift.parameters() if p.requires_grad]
    out = shift.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=4,
        do_sample=False,
    )
    for end in range(7, 11):
        expected = shifted(out[:, :end], 7)[:, -1].argmax(-1)
        assert torch.equal(out[:, end], expected)


@torch.no_grad()
def test_a_third_kind_is_saved_loaded_and_copied(
    shift: PeftModel, tokens: Tensor, tmp_path: Path
) -> None:
    shift.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].shift == ShiftConfig(block=1)
    expected = shifted(tokens, 4)
    for model in (loaded, deepcopy(loaded)):
        torch.testing.assert_close(model(tokens, prompt_lengths=[4, 4]).logits, expected)
    native: Any = make_model()
    native.load_adapter(str(tmp_path))
    torch.testing.assert_close(native(tokens, prompt_lengths=[4, 4]).logits, expected)


@torch.no_grad()
def test_a_third_kind_and_plain_baft_change_rows_of_one_batch(
    shift: PeftModel, tokens: Tensor
) -> None:
    torch.manual_seed(1)
    shift.add_adapter("plain", plain_config(init_weights=False))
    rows, lengths = tokens[[0, 0, 0]], [4, 4, 4]
    mixed = shift(
        rows, prompt_lengths=lengths, adapter_names=["plain", "default", "__base__"]
    ).logits
    torch.testing.assert_close(mixed[1:2], shifted(tokens[:1], 4))
    torch.testing.assert_close(mixed[2:], make_model()(tokens[:1]).logits)
    shift.set_adapter("plain")
    torch.testing.assert_close(mixed[:1], shift(rows[:1], prompt_lengths=[4]).logits)
    assert not torch.allclose(mixed[0], mixed[2])  # the control
    # Together, what both add is added.
    shift.base_model.set_adapter(["default", "plain"])
    both = shift(rows[:1], prompt_lengths=[4]).logits
    assert not torch.allclose(both, mixed[:1]) and not torch.allclose(both, mixed[1:2])
