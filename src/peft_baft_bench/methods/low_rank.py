"""Low-rank updates of a model's weights: accumulated, reverted and reapplied, and saved as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_baft.adapter.weights import BASE
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft_bench.methods.projections import is_transposed


class LowRankChanges:
    """Keeps weights at their original value plus leftᵀ right, with one row of left and right per edit.

    Args:
        names: the modules whose `weight` is changed: linear ones, or GPT-2's with transposed weights.
        method: the method's name in error messages.

    Attributes:
        left, right: by module, (edits, d) and (edits, f), float32.

    Raises:
        ValueError: a weight is not of a floating-point type.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], method: str) -> None:
        self._model = model
        self._modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in names}
        self._weights: dict[str, nn.Parameter] = {
            name: model.get_parameter(f"{name}.weight") for name in names
        }
        self._originals: dict[str, Tensor] = {}
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            if not weight.is_floating_point():
                raise ValueError(
                    f"{method} needs a floating-point weight, but {name}.weight is {weight.dtype}: load the "
                    "model without quantisation."
                )
            self._originals[name] = weight.detach().clone()
            rows, columns = weight.shape
            out, into = (columns, rows) if self._is_transposed(name) else (rows, columns)
            self.left[name] = torch.zeros(0, out, device=weight.device)
            self.right[name] = torch.zeros(0, into, device=weight.device)

    def _is_transposed(self, name: str) -> bool:
        return is_transposed(self._modules[name])

    def add(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add rows (n, d) and (n, f) to a weight's update.

        Raises:
            FloatingPointError: they are not finite; nothing has changed.
        """
        if not (left.isfinite().all() and right.isfinite().all()):
            raise FloatingPointError(f"the update of {name}.weight is not finite.")
        self.left[name] = torch.cat([self.left[name], left.float()])
        self.right[name] = torch.cat([self.right[name], right.float()])
        self._write(name)

    @torch.no_grad()
    def _write(self, name: str) -> None:
        original = self._originals[name]
        if not len(self.left[name]):
            self._weights[name].copy_(original)
            return
        # Always compute from the original, so that the result does not depend on how the edits were split into calls.
        change = self.left[name].mT @ self.right[name]
        change = change.mT if self._is_transposed(name) else change
        self._weights[name].copy_((original.float() + change).to(original.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        """Return left and right of every module."""
        return {
            f"{name}.{side}": rows[name]
            for name in self._weights
            for side, rows in (("left", self.left), ("right", self.right))
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, weight in self._weights.items():
            self.left[name] = state[f"{name}.left"].to(weight.device)
            self.right[name] = state[f"{name}.right"].to(weight.device)
            self._write(name)

    @torch.no_grad()
    def revert(self) -> None:
        """Restore the original weights; `apply` writes the updates again."""
        for name, weight in self._weights.items():
            weight.copy_(self._originals[name])

    def apply(self) -> None:
        """Write the updated weights."""
        for name in self._weights:
            self._write(name)

    def save_lora(self, folder: str | Path) -> None:
        """Save the updates as a LoRA, with rank 1 per edit.

        PEFT loads it onto the unedited model without this package.

        Raises:
            ValueError: there is no edit, or the folder contains files.
        """
        path = Path(folder)
        (rank,) = {len(rows) for rows in self.left.values()}
        if not rank:
            raise ValueError("There is no edit to save.")
        if path.exists() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty: give a new folder.")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=getattr(self._model, "name_or_path", None) or None,
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            target_modules=list(self._weights),
            fan_in_fan_out=any(self._is_transposed(name) for name in self._weights),
            inference_mode=True,
        )
        path.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name in self._weights:
            tensors[f"{BASE}{name}.lora_A.weight"] = self.right[name].cpu().contiguous()
            tensors[f"{BASE}{name}.lora_B.weight"] = self.left[name].mT.cpu().contiguous()
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(path))
