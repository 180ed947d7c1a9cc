"""Make the adapter folder of saved format 1 that `test_saved_format.py` loads.

    PYTHONPATH=src:tests:tests/adapter python tests/adapter/format_1/make.py

It was run once, when format 1 was fixed (transformers 5.24.0, PEFT 0.21.2, torch 2.13.0). It is not to be run again: the folder
stands for those that users have. A later format gets a folder of its own, `format_2`, beside this one.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model
from test_saved_format import PROMPT, SETTINGS, computed, fill, model_of_known_weights

from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers

if __name__ == "__main__":
    folder = Path(__file__).parent
    model = get_peft_model(model_of_known_weights(), BaftConfig(**SETTINGS)).eval()
    for layer in baft_layers(model):
        fill(layer.baft_source.named_parameters(), 4.0)
        fill(layer.baft_basis.named_parameters(), 1.0)
        fill(layer.baft_gate.named_parameters(), 0.2)  # neither open nor closed
        layer.baft_gate_usage["default"].copy_(torch.arange(5.0) + 0.25)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "expected.json").write_text(json.dumps({"prompt": PROMPT, **computed(model)}) + "\n")
