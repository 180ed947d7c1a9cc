"""Edit one fact, ask for it, save the edit and load it again: python examples/quickstart.py [MODEL]"""

from __future__ import annotations

import sys
from typing import Any

from peft import PeftModel, get_peft_model

import peft_baft  # makes PEFT know the adapter type BAFT

PROMPT, TARGET = "The capital of France is", "Lyon"


def complete(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return what the model says after a prompt, as you always generate."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def main(model_name: str = "smollm2", folder: str = "edits/quickstart") -> None:
    base, tokenizer = peft_baft.load_model(model_name)
    print(f"before:   {PROMPT} -> {complete(base, tokenizer, PROMPT)!r}")

    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    editor = peft_baft.BaftEditor(model, tokenizer, unrelated=peft_baft.GENERAL, template="raw")
    result = editor.edit([peft_baft.Edit(PROMPT, TARGET)])
    print(f"edited:   learned {result.learned}, {result.steps} steps, {result.seconds:.1f} s")
    print(f"after:    {PROMPT} -> {complete(model, tokenizer, PROMPT)!r}")

    model.save_pretrained(folder)  # adapter_config.json and adapter_model.safetensors
    base = model.unload()  # the unedited model again, bit for bit
    print(f"unloaded: {PROMPT} -> {complete(base, tokenizer, PROMPT)!r}")

    edited = PeftModel.from_pretrained(base, folder)
    print(f"loaded:   {PROMPT} -> {complete(edited, tokenizer, PROMPT)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
