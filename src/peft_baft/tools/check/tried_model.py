"""The model that a check tries, with the texts to try it with, and the ways in which it is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from peft_baft.adapter import BaftLayer, baft_layers
from peft_baft.data.batching import Tokens, collate, encode, encode_prompt, padding_id
from peft_baft.data.cases import Edit
from peft_baft.running import full_logits, input_device
from peft_baft.tools.check.made_up_text import FACT, PROMPTS, NumberTokenizer, drawn_texts

NEW_TOKENS = 5  # that are generated after each prompt
ROUNDINGS = 60  # so many spacings of the model's numbers, relative to the logits' deviation, may two ways differ


class TriedModel:
    """A PeftModel whose one active adapter is a BaFT adapter, and texts for it.

    Attributes:
        prompts: token ids, of different lengths. answer: token ids that follow the prompts where nothing is generated.
        fact: the edit that is tried. layers: the edited blocks. positions: how many prompt tokens the adapter edits.
        tolerance: up to which difference, in standard deviations of the logits, two ways count as equal.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        base = model.get_base_model()
        self.layers: list[BaftLayer] = baft_layers(model)
        self.adapter_name = model.active_adapters[0]
        config = self.layers[0].configs[self.adapter_name]
        if not config.kind.trains:
            raise ValueError(
                "A check trains the adapter that it tries, and a memory of edits has nothing to train. Check the base model."
            )
        if config.answer_positions is not None:
            raise ValueError(
                "A check tries an adapter that edits every answer token, and this one has answer_positions="
                f"{config.answer_positions}. Check the base model without it."
            )
        self.positions = config.prompt_positions
        prompts, fact = (PROMPTS, FACT) if tokenizer is not None else drawn_texts(base)
        self.model, self.tokenizer = model, tokenizer or NumberTokenizer()
        self.prompts = [list(encode_prompt(self.tokenizer, prompt).ids) for prompt in prompts]
        self.device, self.pad = input_device(model), padding_id(self.tokenizer)
        self.answer = self.prompts[0][:NEW_TOKENS]
        self.fact = Edit(*fact)
        self.tolerance = max(1e-3, ROUNDINGS * torch.finfo(_computing_dtype(base)).eps)

    def padded(self, rows: Sequence[Sequence[int]], side: str) -> dict[str, Tensor]:
        """Batch some rows of token ids: input_ids and attention_mask, padded on one side."""
        batch = collate([Tokens(tuple(row), len(row)) for row in rows], self.pad, side)
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def logits_alone(
        self, prompt: Sequence[int], answer: Sequence[int], length: int | None = None
    ) -> Tensor:
        """Compute the logits (tokens, vocabulary) of one row in one forward.

        length: how many tokens the prompt is stated to have; None for as many as it has.
        """
        batch = self.padded([[*prompt, *answer]], "right")
        return full_logits(
            self.model, **batch, prompt_lengths=[len(prompt) if length is None else length]
        )[0].float()

    @torch.no_grad()
    def generate(self, batch: dict[str, Tensor]) -> tuple[list[list[int]], Tensor]:
        """Generate tokens for each row; with the logits (rows, new tokens, vocabulary) that they were chosen from."""
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
        )
        out = self.model.generate(
            **batch, generation_config=settings, return_dict_in_generate=True, output_logits=True
        )
        new_tokens = out.sequences[:, batch["input_ids"].shape[1] :]
        return new_tokens.tolist(), torch.stack(out.logits, 1).float()

    def rows_to_train(self) -> list[Tokens]:
        """Encode the fact, and a shorter text beside it, so that there is padding."""
        shorter = Tokens((*self.prompts[1], *self.answer[:2]), len(self.prompts[1]))
        return [encode(self.tokenizer, self.fact.prompt, self.fact.target), shorter]


def _computing_dtype(base: Any) -> torch.dtype:
    """Find the dtype that a model computes with: that of its first weights that are not quantised."""
    dtypes = (p.dtype for p in base.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(dtypes, torch.float32)
