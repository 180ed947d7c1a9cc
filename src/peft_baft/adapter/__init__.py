"""The PEFT side of BaFT: an adapter can be loaded and used without any training code."""

from peft_baft.adapter import native, peft_model
from peft_baft.adapter.call import RecordedGates
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import EditContext
from peft_baft.adapter.layer import BaftLayer
from peft_baft.adapter.model import BaftModel, baft_layers, find_context, prompt_lengths
from peft_baft.adapter.registration import register

register(BaftConfig, BaftModel)
native.install()
peft_model.install()

__all__ = [
    "BaftConfig",
    "BaftLayer",
    "BaftModel",
    "EditContext",
    "RecordedGates",
    "baft_layers",
    "find_context",
    "prompt_lengths",
]
