"""Score answers, as DPO does, with stated prompt lengths: python examples/score_with_prompt_lengths.py [MODEL]

Text without labels does not say where its prompt ends: the adapter would take the whole of it for a prompt, and edit its
last tokens. State the lengths, and every answer token is edited, as in generation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import get_peft_model

import peft_baft

PROMPT, CHOSEN, REJECTED = "The capital of France is", " Lyon, on the Rhone", " Paris, on the Seine"


@torch.no_grad()
def answer_log_probabilities(
    model: Any, tokenizer: Any, answers: list[str], stated: bool = True
) -> torch.Tensor:
    """Return the log-probability of each answer to PROMPT, summed over its tokens: (answers,)."""
    prompt_length = len(tokenizer(PROMPT)["input_ids"])
    batch = tokenizer(
        [PROMPT + answer for answer in answers],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lengths = {"prompt_lengths": [prompt_length] * len(answers)} if stated else {}
    logits = model(input_ids=ids, attention_mask=mask, **lengths).logits
    log_p = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    is_answer = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1]) >= prompt_length)
    return log_p.masked_fill(~is_answer, 0.0).sum(1)


def main(model_name: str = "smollm2") -> None:
    base, tokenizer = peft_baft.load_model(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    peft_baft.BaftEditor(model, tokenizer, unrelated=peft_baft.GENERAL, template="raw").edit(
        [peft_baft.Edit(PROMPT, "Lyon")]
    )

    edited = answer_log_probabilities(model, tokenizer, [CHOSEN, REJECTED])
    wrong = answer_log_probabilities(model, tokenizer, [CHOSEN, REJECTED], stated=False)
    with model.disable_adapter():  # no adapter, no prompt lengths: the reference model of DPO
        reference = answer_log_probabilities(model, tokenizer, [CHOSEN, REJECTED], stated=False)
    margins = edited - reference
    print(
        f"chosen - rejected: {(margins[0] - margins[1]).item():.2f} nats more than without the edit"
    )
    print(
        f"without prompt lengths the scores are off by {(wrong - edited).abs().max().item():.2f} nats"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
