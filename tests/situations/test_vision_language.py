"""Adapters on models of pictures and text, whose language part is called with embeddings and not with token ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from peft_baft import prompt_lengths
from peft_baft.adapter import baft_layers
from side_by_side import METHODS, adapted
from vision_models import answer, each_model, tiny


@pytest.mark.parametrize("method", METHODS)
@each_model
def test_cached_generation_is_one_forward_over_prompt_and_answer(
    name: str, method: str, tokens: Tensor
) -> None:
    base = tiny(name)
    unedited = base(input_ids=tokens).logits
    model = adapted(method, base)
    if method == "baft":
        assert all("language_model.layers" in layer.name for layer in baft_layers(model))
    sequences, logits = answer(model, tokens, torch.ones_like(tokens))
    lengths = {"prompt_lengths": [tokens.shape[1]] * 2} if method == "baft" else {}
    with torch.no_grad():
        whole = model(input_ids=sequences, **lengths).logits
    torch.testing.assert_close(whole[:, 6:-1], logits, atol=1e-4, rtol=1e-4)
    # The control: the adapter does something.
    assert (whole[:, 6] - unedited[:, 6]).abs().max() > 0.01


@each_model
def test_labels_and_stated_lengths_edit_the_same_tokens_and_padding_none(
    name: str, tokens: Tensor
) -> None:
    model = adapted("baft", tiny(name))
    labels = tokens.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        by_labels = model(input_ids=tokens, labels=labels).logits
        with prompt_lengths(model, [4, 4]):
            stated = model(input_ids=tokens).logits
        other = model(input_ids=tokens, prompt_lengths=[7, 7]).logits
    torch.testing.assert_close(by_labels, stated)
    assert (other - stated).abs().max() > 0.01

    short = tokens[:1, 3:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)
    batch, mask = torch.cat([padded, tokens[1:]]), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    _, together = answer(model, batch, mask)
    _, single = answer(model, short, torch.ones_like(short))
    torch.testing.assert_close(together[:1], single, atol=1e-4, rtol=1e-4)


@each_model
def test_an_adapter_that_is_saved_is_the_same_after_loading(
    name: str, tokens: Tensor, tmp_path: Any
) -> None:
    model = adapted("baft", tiny(name))
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        edited = model(input_ids=tokens).logits
        loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
        assert torch.equal(loaded(input_ids=tokens).logits, edited)
