"""The model under test, with texts for it and methods to run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.adapter import BaftLayer, baft_layers
from peft_baft.data.batching import Tokens, collate, encode, encode_prompt, padding_id
from peft_baft.data.cases import Edit
from peft_baft.running import full_logits, input_device
from peft_baft.tools.check.made_up_text import FACT, PROMPTS, NumberTokenizer, random_texts
from peft_baft.tools.check.tools import base_model_of

NEW_TOKENS = 5  # number of tokens to generate after each prompt
ROUNDINGS = 60  # the tolerance in units of the dtype's eps, for differences relative to the logits' standard deviation


class TriedModel:
    """A PeftModel whose only active adapter is a BaFT adapter, and texts for it.

    Attributes:
        prompts: token ids of prompts of different lengths. answer: token ids to append if nothing is generated.
        fact: the edit to train. layers: the edited blocks. positions: the number of prompt tokens that the adapter edits.
        tolerance: the largest difference, in standard deviations of the logits, of results that count as equal.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        base = base_model_of(model)
        self.layers: list[BaftLayer] = baft_layers(model)
        self.adapter_name = model.active_adapters[0]
        config = self.layers[0].configs[self.adapter_name]
        if not config.kind.trains:
            raise ValueError(
                "A check trains the adapter, and a memory of edits has nothing to train. Check the base model instead."
            )
        if config.answer_positions is not None:
            raise ValueError(
                "A check needs an adapter that edits every answer token, but this one has answer_positions="
                f"{config.answer_positions}. Check the base model without it."
            )
        self.positions = config.prompt_positions
        prompts, fact = (PROMPTS, FACT) if tokenizer is not None else random_texts(base)
        self.model = model
        self.tokenizer = tokenizer or cast("PreTrainedTokenizerBase", NumberTokenizer())
        self.prompts = [list(encode_prompt(self.tokenizer, prompt).ids) for prompt in prompts]
        self.device, self.pad = input_device(model), padding_id(self.tokenizer)
        self.answer = self.prompts[0][:NEW_TOKENS]
        self.fact = Edit(*fact)
        self.tolerance = max(1e-3, ROUNDINGS * torch.finfo(_computing_dtype(base)).eps)

    def padded(self, rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
        """Return a batch of rows of token ids, padded on one side: input_ids and attention_mask."""
        batch = collate([Tokens(tuple(row), len(row)) for row in rows], self.pad, side)
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def logits_of_row(
        self, prompt: Sequence[int], answer: Sequence[int], length: int | None = None
    ) -> Tensor:
        """Compute the logits (tokens, vocabulary) of one row in one forward.

        Args:
            length: the prompt length to state to the adapter; None for the true one.
        """
        batch = self.padded([[*prompt, *answer]], "right")
        return full_logits(
            self.model, **batch, prompt_lengths=[len(prompt) if length is None else length]
        )[0].float()

    @torch.no_grad()
    def generate(self, batch: dict[str, Tensor]) -> tuple[list[list[int]], Tensor]:
        """Generate tokens for each row; return them and the logits that they were chosen from, (rows, new tokens, vocabulary)."""
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
        )
        out: Any = self.model.generate(
            **batch, generation_config=settings, return_dict_in_generate=True, output_logits=True
        )
        new_tokens = out.sequences[:, batch["input_ids"].shape[1] :]
        return new_tokens.tolist(), torch.stack(out.logits, 1).float()

    def rows_to_train(self) -> list[Tokens]:
        """Return the encoded fact and a shorter text, so that a batch of them has padding."""
        shorter = Tokens((*self.prompts[1], *self.answer[:2]), len(self.prompts[1]))
        return [encode(self.tokenizer, self.fact.prompt, self.fact.target), shorter]


def _computing_dtype(base: PreTrainedModel) -> torch.dtype:
    """Return the dtype that a model computes in: that of its first weights that are not quantised."""
    dtypes = (p.dtype for p in base.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(dtypes, torch.float32)
