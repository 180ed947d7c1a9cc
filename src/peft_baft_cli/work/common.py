"""Shared by the commands: the choice of model, adapter, device and settings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft import Unrelated
from peft_baft.adapter.taught_form import asked_form, warn_of_another
from peft_baft.data.datasets import read_unrelated
from peft_baft.data.templates import Template, chosen_templates
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.presets import Preset, find_preset
from peft_baft.loading import load_model, looks_like_path
from peft_baft.processes import Processes
from peft_baft_cli.options import (
    AskCommand,
    BenchCommand,
    ChatCommand,
    CheckCommand,
    InspectCommand,
    ReportCommand,
)
from peft_baft_cli.screen import doing

AUTO = "auto"  # a device map over all devices


@contextmanager
def type_errors_as_bad_input() -> Iterator[None]:
    """Convert a TypeError into a ValueError, around calls that raise it on purpose for invalid input.

    A TypeError from anywhere else is a bug, and the command shows its traceback.
    """
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


def describe_split(processes: Processes, device: str, split: str) -> str | None:
    """Describe how several processes or devices share the work; None for one process on one device.

    Args:
        split: what is split over several processes.

    Raises:
        ValueError: several processes share one model over all devices.
    """
    if processes.world_size == 1:
        return "1 process: one model over all devices" if device == AUTO else None
    if device == AUTO:
        raise ValueError(
            "--device auto spreads one model over all devices, which several processes cannot share."
        )
    return f"{processes.world_size} processes: {split} split over them"


def default_device(device: str | None) -> str:
    """Return the given device; without one, CUDA if it is available, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def require_device(device: str) -> None:
    """Raise a ValueError unless tensors can be created on `device`, or it is `auto`."""
    if device == AUTO:
        return
    try:
        if torch.device(device).type == "meta":
            raise ValueError("it does not store values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")[:160]
        raise ValueError(
            f"--device {device} cannot be used here ({reason}). Use cpu, auto, or, if there is a GPU, cuda or cuda:N."
        ) from None


def adapter_config(adapter: str, revision: str | None = None) -> PeftConfig:
    """Load the config of a saved adapter, before a model is loaded.

    Args:
        adapter: a folder or a Hub id.
        revision: a branch, tag or commit; only for a Hub id.

    Raises:
        ValueError: there is no such adapter, or its config is damaged.
    """
    folder = Path(adapter)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"--adapter-revision is for adapters on the Hub, but {adapter} is a local folder."
            )
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"{adapter} does not contain an adapter: the file {CONFIG_NAME} is missing."
            )
    elif looks_like_path(adapter):
        raise ValueError(
            f"There is no adapter folder {adapter}. Give a folder made by `baft edit --output`, or a Hub id."
        )
    try:
        config: PeftConfig = PeftConfig.from_pretrained(adapter, **given(revision=revision))
        return config
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0].rstrip(".")
        if folder.is_dir():
            raise ValueError(f"{folder / CONFIG_NAME} cannot be used ({reason}).") from None
        raise ValueError(
            f"There is no folder {adapter}, and no adapter with that name could be loaded from the Hugging Face Hub ({reason}). "
            "Check the name, and the network if it is on the Hub."
        ) from None


def adapter_folder(adapter: str, revision: str | None = None) -> Path:
    """Return the folder of an adapter with its journal and reports. An adapter on the Hub is downloaded.

    Args:
        adapter: a folder or a Hub id.
        revision: a branch, tag or commit; only for a Hub id.

    Raises:
        ValueError: there is no such adapter.
    """
    adapter_config(adapter, revision)
    if Path(adapter).is_dir():
        return Path(adapter)
    return Path(snapshot_download(adapter, **given(revision=revision)))


def attach_adapter(
    base: PreTrainedModel, adapter: str, revision: str | None = None, trainable: bool = False
) -> PeftModel:
    """Attach a saved adapter to `base`, in evaluation mode."""
    model = PeftModel.from_pretrained(
        base, adapter, is_trainable=trainable, **given(revision=revision)
    )
    model.eval()
    return model


def chosen_form(
    name: str, tokenizer: PreTrainedTokenizerBase, adapter: PeftConfig | None
) -> Template:
    """Return the form of prompts. `auto` is the form that was used for editing the adapter; another form causes a warning."""
    (template,) = chosen_templates(tokenizer, name, taught=asked_form(adapter))
    warn_of_another(adapter, {template.name}, tokenizer)
    return template


def load_base(
    name: str, revision: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer, on one device or, with `auto`, over all devices."""
    return load_model(name, dtype, revision=revision, device_map=device)


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command uses, before it is loaded.

    Args:
        adapter: the config of the adapter; None without one.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    adapter: PeftConfig | None

    def load_base(self, shown: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the base model and its tokenizer.

        Args:
            shown: whether to show a status line on a terminal.
        """
        with doing(f"loading {self.model}", shown):
            return load_base(self.model, self.revision, self.dtype, self.device)


def chosen_model(
    options: AskCommand
    | BenchCommand
    | ChatCommand
    | CheckCommand
    | InspectCommand
    | ReportCommand,
    device: str | None = None,
) -> ModelChoice:
    """Return the model of the options, or else the one that the adapter was made for.

    Args:
        device: of this process, if several share the work; by default that of the options.

    Raises:
        ValueError: no model is given, there is no such adapter, or the device cannot be used.
    """
    device = device or default_device(options.device)
    require_device(device)
    config = None
    if options.adapter is not None:
        config = adapter_config(options.adapter, options.adapter_revision)
    model, revision = options.model, options.revision
    if not model:
        if config is None or not config.base_model_name_or_path:
            raise ValueError(
                "Give a model with --model: a Hub id, a local folder, a GGUF file, or smollm2."
            )
        model, revision = config.base_model_name_or_path, revision or config.revision
    return ModelChoice(model, revision, options.dtype, device, config)


def chosen_preset(name: str, r: int | None, lr: float | None, max_steps: int | None) -> Preset:
    """Return a preset, with the given settings in place of its own."""
    preset = find_preset(name)
    descent = given(lr=lr, max_steps=max_steps)
    return replace(
        preset,
        config=preset.config | given(r=r),
        descent=replace(preset.descent, **descent),
        batch_descent=replace(preset.batch_descent, **descent),
    )


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def chosen_unrelated(choice: str) -> Sequence[Unrelated]:
    """Return the texts that edits should not affect: the package's own (`general`), none, or those of a file."""
    if choice == "general":
        return GENERAL
    if choice == "none":
        return ()
    return read_unrelated(
        require_file(choice, "--unrelated", "a .jsonl or .json file, `general` or `none`")
    )


def require_file(path: str | Path, option: str, wanted: str) -> Path:
    """Return the path if the file exists; otherwise raise a ValueError that says what the option takes."""
    if not Path(path).is_file():
        raise ValueError(f"{option}: there is no file {path}. The option takes {wanted}.")
    return Path(path)


def require_known(kind: str, name: str, known: Collection[str]) -> None:
    """Raise a ValueError with the known names unless `name` is one of them."""
    if name not in known:
        raise ValueError(f"Unknown {kind} {name!r}; known are {', '.join(known)}.")
