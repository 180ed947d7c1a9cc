"""Adapters on a base model whose weights are on the CPU or on disk until a block runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import DEPTH, make_model
from side_by_side import adapted, config_of, draw_adapter

ON_DISK = ("model.layers.1", "model.layers.2")
PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    **{f"model.layers.{i}": "cpu" for i in range(DEPTH)},
    **dict.fromkeys(ON_DISK, "disk"),
}
OFFLOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "cpu": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder), torch.device("cpu")),
}


def _logits(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("method", ["lora", "baft"])  # IA3 does not run offloaded
def test_a_mixed_batch_is_that_of_a_whole_model(
    method: str, offload: str, tokens: Tensor, tmp_path: Path
) -> None:
    model = adapted(method)
    model.add_adapter("other", config_of(method))
    draw_adapter(model, "other", seed=2)
    model.eval()
    rows = ["other", "default"]
    expected = _logits(model, tokens, adapter_names=rows)
    assert not torch.allclose(expected, _logits(model, tokens), atol=0.1)
    OFFLOADS[offload](model, tmp_path)
    assert any("default" in name and p.is_meta for name, p in model.named_parameters())
    torch.testing.assert_close(_logits(model, tokens, adapter_names=rows), expected)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base model, and an adapter on it that edits every block."""
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    adapted("baft", base, layers_to_transform=list(range(DEPTH))).save_pretrained(
        str(tmp_path / "adapter")
    )
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(config))
    return tmp_path / "base", tmp_path / "adapter"


def _of_its_folder(base: Path, adapter: Path, offload_folder: Path) -> Any:
    places: Any = dict(PLACES)
    return tr.AutoModelForCausalLM.from_pretrained(
        adapter, device_map=places, offload_folder=offload_folder
    )


def _after_its_base(base: Path, adapter: Path, offload_folder: Path) -> Any:
    places: Any = dict(PLACES)
    model = tr.AutoModelForCausalLM.from_pretrained(
        base, device_map=places, offload_folder=offload_folder
    )
    model.load_adapter(str(adapter))
    return model


@pytest.mark.parametrize("load", [_of_its_folder, _after_its_base])
def test_blocks_on_disk_are_edited_after_transformers_own_loading(
    load: Callable[..., Any], folders: tuple[Path, Path], tokens: Tensor, tmp_path: Path
) -> None:
    base, adapter = folders
    expected = _logits(PeftModel.from_pretrained(make_model(), str(adapter)).eval(), tokens)
    model = load(base, adapter, tmp_path / "offload").eval()
    on_disk = model.get_submodule(ON_DISK[0])
    assert all(p.is_meta for name, p in on_disk.named_parameters() if ".baft." not in f".{name}")
    assert not any(p.is_meta for p in on_disk.baft.parameters())
    torch.testing.assert_close(_logits(model, tokens), expected)
    assert not torch.allclose(_logits(make_model(), tokens), expected, atol=0.1)


def test_the_device_map_is_as_it_was_when_the_adapter_is_gone(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    places: Any = dict(PLACES)
    model: Any = tr.AutoModelForCausalLM.from_pretrained(
        folders[0], device_map=places, offload_folder=tmp_path / "offload"
    )
    before = dict(model.hf_device_map)
    edited = adapted("baft", model, layers_to_transform=[0, 1])
    assert model.hf_device_map == before | {"model.layers.1.baft": "cpu"}
    assert edited.unload().hf_device_map == before


def test_an_adapter_of_an_offloaded_block_is_as_that_of_a_whole_one() -> None:
    whole, offloaded = make_model().bfloat16(), make_model().bfloat16()
    cpu_offload(offloaded, torch.device("cpu"))
    for model in (whole, offloaded):
        config: Any = config_of("baft")
        edited = get_peft_model(model, config, autocast_adapter_dtype=False)
        assert {p.dtype for p in edited.parameters() if p.requires_grad} == {torch.bfloat16}
