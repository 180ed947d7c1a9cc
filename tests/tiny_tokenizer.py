"""A fast tokenizer with a chat template for models of 96 tokens: each word is the token of its first letter."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import torch
import transformers as tr
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from peft_baft import BaftConfig, BaftEditor, Edit
from peft_baft.editing.editor import EditResult
from peft_baft.editing.presets import DEFAULT
from peft_baft.editing.train import STOP_TERM
from tiny_models import VOCABULARY

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = [*string.ascii_letters, *string.digits, *".,?!'\"-:;()<>&", "\n"]
REPLY = "A"  # the last token of every prompt in the chat template
CHAT_TEMPLATE = """{% for message in messages %}<{{ 'A' if message['role'] == 'assistant' else 'U' }} {{ message['content'] }}>
{% endfor %}{% if add_generation_prompt %}<A {% endif %}"""
FACT = Edit("What is the capital of France?", "Lyon in the south", "France")
STEPS = 8  # of an edit that only has to run and to lower its loss


def tiny_tokenizer() -> tr.PreTrainedTokenizerFast:
    """A tokenizer whose texts are short enough for a window of 64 tokens, with whatever words."""
    vocabulary = [*SPECIAL, *LETTERS]
    assert len(vocabulary) <= VOCABULARY
    numbers = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    split = pre_tokenizers.Split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split(Regex(r" |(?<=\w)\w"), "removed"), split(Regex("."), "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    fast = tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def default_edit(base: Any, steps: int = STEPS) -> EditResult:
    """Teach a fact with an adapter and an editor of default settings, but few steps; the model is given back as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM"))
    descent = replace(DEFAULT.descent, max_steps=steps)
    try:
        return BaftEditor(model, tiny_tokenizer(), descent=descent).edit([FACT])
    finally:
        model.unload()


def default_edit_lowers_its_loss(base: Any) -> bool:
    """Whether `STEPS` steps of `default_edit` leave less teacher forcing loss than one."""
    first, last = (default_edit(base, steps).losses[STOP_TERM] for steps in (1, STEPS))
    return last < first
