"""Go through some steps in a process of its own, which has HF_ENDPOINT set before anything is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peft_baft  # noqa: F401
from peft_baft_cli import main


def logits(model: Any) -> list[float]:
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).logits[0, -1, :5].tolist()


def step(words: list[str]) -> Any:
    """One step: the first word says which."""
    match words:
        case ["baft", *rest]:
            return main(rest)
        case ["load", base, adapter, revision]:
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base), adapter, revision=revision or None
            )
            return logits(model.eval())
        case ["model push", base, folder, repo_id, name]:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
            model.peft_config["default"].base_model_name_or_path = name
            model.push_to_hub(repo_id, token="hf_right", tags=["mine"])
            return logits(model.eval())
        case ["trainer push", base, folder, output, repo_id, name]:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
            model.peft_config["default"].base_model_name_or_path = name
            arguments = TrainingArguments(
                output, hub_model_id=repo_id, hub_token="hf_right", report_to=[], use_cpu=True
            )
            Trainer(model, arguments, train_dataset=[]).push_to_hub()
            return logits(model.eval())
    raise ValueError(words)


if __name__ == "__main__":
    results = []
    for words in json.loads(Path(sys.argv[1]).read_text()):
        results.append(step(words))
    Path(sys.argv[2]).write_text(json.dumps(results))
