"""A new editing method in one file: fine-tune the last norm of the model. python examples/new_method.py [MODEL]

In the package this is a file of src/peft_baft_bench/methods/ and one entry in METHODS; then `baft bench --method norm` runs it.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft import PRESETS, DescentConfig, Edit, Editor, EditResult, load_model
from peft_baft.data.batching import collate, encode_fitting, padding_id
from peft_baft.editing.train import Descent, descend
from peft_baft_bench.methods.method import EditorSetup, MethodSettings
from peft_baft_bench.methods.methods import METHODS, parse_method


class NormEditor:  # follows the protocol peft_baft.Editor
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, descent: DescentConfig) -> None:
        self.model, self.tokenizer, self.descent = model.requires_grad_(False), tokenizer, descent
        self._norm = [parameter for parameter in model.parameters() if parameter.ndim == 1][-1]
        self._original = self._norm.detach().clone()

    def edit(self, edits: Iterable[Edit]) -> EditResult:
        rows = [
            encode_fitting(self.model, self.tokenizer, edit.prompt, edit.target) for edit in edits
        ]
        batch = collate(rows, padding_id(self.tokenizer))  # its labels are -100 before the answers
        training = [Descent([self._norm.requires_grad_()], self.descent)]
        return descend(
            training, lambda _: [{"teacher_forcing": self.model(**batch, use_cache=False).loss}]
        )[0]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"norm": self._norm.detach()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._norm.data.copy_(state["norm"])

    def remove(self) -> None:
        self.load_state_dict({"norm": self._original})


DESCENT = DescentConfig(lr=0.05, max_steps=60)


@dataclass(frozen=True)
class NormTuning(MethodSettings):  # `norm:lr=0.01` sets them by name
    descent: DescentConfig = DESCENT

    def start(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: EditorSetup | None = None,
    ) -> NormEditor:
        return NormEditor(base, tokenizer, self.descent)


METHODS["norm"] = lambda preset: NormTuning()


def main(model_name: str = "smollm2") -> None:
    settings = parse_method("norm:stop_loss=0.05", PRESETS["default"]).settings
    editor: Editor = settings.start(*load_model(model_name))
    result = editor.edit([Edit("The capital of France is", "Lyon")])
    print(f"{settings.describe()}: learned {result.learned} after {result.steps} steps")
    editor.remove()  # the base model again, bit for bit


if __name__ == "__main__":
    main(*sys.argv[1:])
