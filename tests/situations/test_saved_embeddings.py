"""Embeddings that PEFT saves along with an adapter, since they were resized or it was asked to, are loaded with it."""

# mypy: disable-error-code="union-attr, arg-type, attr-defined, operator"
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import is_bare
from conftest import VOCABULARY, make_model
from side_by_side import METHODS, OLD_PEFT, adapted, config_of, draw_adapter

LARGER = VOCABULARY + 5
IDS = torch.randint(3, LARGER, (2, 7), generator=torch.Generator().manual_seed(3))
EMBEDDINGS = ["embed_tokens", "lm_head"]
every_method = pytest.mark.parametrize("method", METHODS)
either = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


class Folder:
    """A base model on disk, and models of it whose embeddings were resized, each with other values in the new rows."""

    def __init__(self, path: Path, tied: bool = False) -> None:
        self.path, config = path, make_model().config
        config.tie_word_embeddings = tied
        torch.manual_seed(0)
        tr.LlamaForCausalLM(config).save_pretrained(str(path / "base"))
        self.resized_before = 0

    def base(self, size: int = LARGER) -> Any:
        model = tr.AutoModelForCausalLM.from_pretrained(self.path / "base").eval()
        self.resized_before += 1
        torch.manual_seed(self.resized_before)
        if size != VOCABULARY:
            model.resize_token_embeddings(size, mean_resizing=False)
        return model

    def save(self, model: Any, name: str = "adapter", **kwargs: Any) -> str:
        model.save_pretrained(str(self.path / name), **kwargs)
        return str(self.path / name)


@every_method
@either
def test_resized_embeddings_come_with_the_adapter(method: str, tied: bool, tmp_path: Path) -> None:
    folder = Folder(tmp_path, tied)
    model = adapted(method, folder.base())
    saved, expected = folder.save(model), logits(model)
    other = folder.base()
    assert not torch.equal(logits(other), logits(model.unload()))  # the control: other new rows
    assert torch.equal(logits(PeftModel.from_pretrained(other, saved).eval()), expected)


@every_method
@either
@pytest.mark.parametrize("modules", [EMBEDDINGS, ["lm_head"], ["embed_tokens"]], ids=str)
@pytest.mark.parametrize("size", [VOCABULARY, LARGER], ids=["as it was", "resized"])
def test_embeddings_that_an_adapter_trains_are_loaded_also_where_they_were_resized(
    method: str, tied: bool, modules: list[str], size: int, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, tied)
    model = adapted(method, folder.base(size), modules_to_save=modules)
    ids = IDS % size
    saved, expected = folder.save(model), logits(model, ids)
    with model.disable_adapter():
        expected_off = logits(model, ids)
    again = PeftModel.from_pretrained(folder.base(size), saved).eval()
    assert torch.equal(logits(again, ids), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again, ids), expected_off)


@every_method
@either
def test_embeddings_are_saved_where_it_is_asked_for(
    method: str, tied: bool, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, tied)
    base = folder.base(VOCABULARY)
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(0.1)  # as after training of one's own
    model = adapted(method, base)
    saved, expected = (
        folder.save(model, save_embedding_layers=True),
        logits(model, IDS % VOCABULARY),
    )
    again = PeftModel.from_pretrained(folder.base(VOCABULARY), saved).eval()
    assert torch.equal(logits(again, IDS % VOCABULARY), expected)
    without = PeftModel.from_pretrained(
        folder.base(VOCABULARY), folder.save(model, "without", save_embedding_layers=False)
    )
    assert not torch.equal(logits(without.eval(), IDS % VOCABULARY), expected)  # the control


BLOOM = pytest.param(
    "bloom", marks=pytest.mark.skipif(OLD_PEFT, reason="PEFT 0.20 saves its head too")
)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", BLOOM])
def test_embeddings_of_other_names_are_known_as_well(name: str, tmp_path: Path) -> None:
    model = adapted("baft", make_model(name))
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    other = make_model(name)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    ids = IDS % VOCABULARY
    again = PeftModel.from_pretrained(other, str(tmp_path)).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_they_are_loaded_as_a_further_adapter_and_over_one_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    model = adapted("baft", folder.base())
    saved, expected = folder.save(model), logits(model)
    second = adapted("baft", folder.base(), adapter_name="first", seed=2)
    second.load_adapter(saved, "second")
    second.set_adapter("second")
    assert torch.equal(logits(second), expected)
    over = adapted("baft", folder.base(), seed=3)
    over.load_adapter(saved, "default")
    assert torch.equal(logits(over), expected)


@pytest.mark.skipif(OLD_PEFT, reason="PEFT 0.20 asks no tuner when it loads tensors")
def test_they_reach_embeddings_that_another_adapter_has_a_copy_of(tmp_path: Path) -> None:
    """PEFT leaves them out without a word for LoRA: the module has another name there."""
    folder = Folder(tmp_path)
    model = adapted("baft", folder.base())
    saved, expected = folder.save(model), logits(model)
    other = adapted("baft", folder.base(), adapter_name="first", modules_to_save=EMBEDDINGS)
    own = logits(other)
    other.load_adapter(saved, "second")
    assert torch.equal(logits(other), own)
    other.set_adapter("second")
    assert torch.equal(logits(other), expected)
    # And back: saved by a model in which another adapter has a copy.
    again = folder.save(other, "again", selected_adapters=["second"])
    alone = PeftModel.from_pretrained(folder.base(), f"{again}/second").eval()
    assert torch.equal(logits(alone), expected)


def test_a_base_of_another_size_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    saved = folder.save(adapted("baft", folder.base()))
    base = folder.base(VOCABULARY)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({LARGER}\)"):
        PeftModel.from_pretrained(base, saved)
    assert is_bare(base) and not hasattr(base, "peft_config")
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({LARGER}\)"):
        AutoPeftModelForCausalLM.from_pretrained(saved)
    model = adapted("baft", base)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({LARGER}\)"):
        model.load_adapter(saved, "default")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (32, 32)),
        ("model.norm.weight", (32,)),
        ("model.embed_tokens.extra.weight", (LARGER, 32)),
    ],
)
def test_other_weights_of_the_model_are_no_part_of_an_adapter(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    saved = folder.save(adapted("baft", folder.base()), save_embedding_layers=False)
    file = Path(saved) / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{name}": torch.ones(shape)}, file)
    base = folder.base()
    with pytest.raises(ValueError, match="not part of its adapter"):
        PeftModel.from_pretrained(base, saved)
    assert is_bare(base)


def test_a_file_that_lacks_a_part_of_a_saved_module_is_refused(tmp_path: Path) -> None:
    model = adapted("baft", make_model("gpt_neox"), modules_to_save=["final_layer_norm"])
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    (bias,) = [name for name in tensors if name.endswith("final_layer_norm.bias")]
    save_file({name: tensor for name, tensor in tensors.items() if name != bias}, file)
    base = make_model("gpt_neox")
    with pytest.raises(ValueError, match=r"lacks .*final_layer_norm\.bias"):
        PeftModel.from_pretrained(base, str(tmp_path))
    assert is_bare(base)


def test_a_second_adapter_with_copies_of_its_own_is_whole(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    model = adapted("baft", folder.base(), modules_to_save=EMBEDDINGS)
    saved, expected = folder.save(model), logits(model)
    other = adapted(
        "baft", folder.base(), adapter_name="first", seed=2, modules_to_save=["lm_head"]
    )
    other.add_adapter("third", config_of("baft", modules_to_save=EMBEDDINGS))
    draw_adapter(other, "third", 3)
    other.load_adapter(saved, "second")
    other.set_adapter("second")
    assert torch.equal(logits(other.eval()), expected)
