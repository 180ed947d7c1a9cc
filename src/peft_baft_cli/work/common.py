"""What the commands share: which model and adapter are meant, on which device, with which settings."""

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
    """Turn a TypeError into a ValueError, around calls that raise it on purpose for what a user gave.

    A TypeError from anywhere else is a bug, and the command shows its traceback.
    """
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


def describe_split(processes: Processes, device: str, split: str) -> str | None:
    """Say how several processes or devices share the work; return None for one process on one device.

    Args:
        split: What is split over several processes.
    """
    if processes.world_size == 1:
        return "1 process: one model over all devices" if device == AUTO else None
    if device == AUTO:
        raise ValueError(
            "--device auto spreads one model over all devices, which several processes cannot share."
        )
    return f"{processes.world_size} processes: {split} split over them"


def default_device(device: str | None) -> str:
    """Return the device of the command line; where it names none, CUDA if there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def require_device(device: str) -> None:
    """Raise a ValueError unless tensors can be put on `device`, or it is `auto`."""
    if device == AUTO:
        return
    try:
        if torch.device(device).type == "meta":
            raise ValueError("it holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")[:160]
        raise ValueError(
            f"--device {device} cannot be used here ({reason}). Take cpu, cuda or cuda:N where there is a GPU, or auto."
        ) from None


def adapter_config(adapter: str, revision: str | None = None) -> PeftConfig:
    """Read the config of a saved adapter, before a model is loaded.

    Args:
        adapter: A folder or a Hub id. revision: A branch, tag or commit, for a Hub id alone.

    Raises:
        ValueError: There is no such adapter, or its config is damaged.
    """
    folder = Path(adapter)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"--adapter-revision belongs to an adapter on the Hub, but {adapter} is a folder here."
            )
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{adapter} holds no adapter: the file {CONFIG_NAME} is missing.")
    elif looks_like_path(adapter):
        raise ValueError(
            f"There is no adapter folder {adapter}. Name one that `baft edit --output` has made, or a Hub id."
        )
    try:
        return PeftConfig.from_pretrained(adapter, **_revision(revision))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0].rstrip(".")
        if folder.is_dir():
            raise ValueError(f"{folder / CONFIG_NAME} cannot be used ({reason}).") from None
        raise ValueError(
            f"There is no folder {adapter}, and no adapter of that name could be had from the Hugging Face Hub ({reason}). "
            "Check the name, and the network if it is on the Hub."
        ) from None


def adapter_folder(adapter: str, revision: str | None = None) -> Path:
    """Return the folder of an adapter with its journal and reports; of a Hub id, the folder that it is downloaded to.

    Args:
        adapter: A folder or a Hub id. revision: A branch, tag or commit, for a Hub id alone.

    Raises:
        ValueError: There is no such adapter.
    """
    adapter_config(adapter, revision)
    if Path(adapter).is_dir():
        return Path(adapter)
    return Path(snapshot_download(adapter, **_revision(revision)))


def attach_adapter(
    base: Any, adapter: str, revision: str | None = None, trainable: bool = False
) -> PeftModel:
    """Return `base` with a saved adapter on it, in evaluation mode."""
    return PeftModel.from_pretrained(
        base, adapter, is_trainable=trainable, **_revision(revision)
    ).eval()


def chosen_form(name: str, tokenizer: Any, adapter: PeftConfig | None) -> Template:
    """Return the form in which an adapter is asked; `auto` is its own. It warns of one that its facts were not taught in."""
    (template,) = chosen_templates(tokenizer, name, taught=asked_form(adapter))
    warn_of_another(adapter, {template.name}, tokenizer)
    return template


def _revision(revision: str | None) -> dict[str, Any]:
    return {} if revision is None else {"revision": revision}


def load_base(name: str, revision: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """Return the base model and its tokenizer, on a device or, with `auto`, over all of them."""
    return load_model(name, dtype, revision=revision, device_map=device)


@dataclass(frozen=True)
class Subject:
    """The model that a command is about: known, with the adapter on it, before anything is loaded.

    Args:
        adapter: The config of the adapter; None without one.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    adapter: PeftConfig | None

    def load_base(self, shown: bool = True) -> tuple[Any, Any]:
        """Return the base model and its tokenizer.

        Args:
            shown: Whether this process says on a terminal that it is loading.
        """
        with doing(f"loading {self.model}", shown):
            return load_base(self.model, self.revision, self.dtype, self.device)


def chosen_subject(
    options: AskCommand
    | BenchCommand
    | ChatCommand
    | CheckCommand
    | InspectCommand
    | ReportCommand,
    device: str | None = None,
) -> Subject:
    """Return what a command is about: the model that it names, or else the one that its adapter was made for.

    Args:
        device: The device of this process, where several share the work; by default that of the options.

    Raises:
        ValueError: No model is named, there is no such adapter, or the device cannot be used.
    """
    device = device or default_device(options.device)
    require_device(device)
    config = (
        None
        if options.adapter is None
        else adapter_config(options.adapter, options.adapter_revision)
    )
    model, revision = options.model, options.revision
    if not model:
        if config is None or not config.base_model_name_or_path:
            raise ValueError(
                "Say which model with --model: a Hub id, a local folder, a GGUF file, or smollm2."
            )
        model, revision = config.base_model_name_or_path, revision or config.revision
    return Subject(model, revision, options.dtype, device, config)


def chosen_preset(name: str, r: int | None, lr: float | None, max_steps: int | None) -> Preset:
    """Return the preset of that name with what the command line overrides."""
    preset = find_preset(name)
    chosen: dict[str, Any] = {"lr": lr, "max_steps": max_steps}
    chosen = {setting: value for setting, value in chosen.items() if value is not None}
    return replace(
        preset,
        config=preset.config | ({} if r is None else {"r": r}),
        descent=replace(preset.descent, **chosen),
        batch_descent=replace(preset.batch_descent, **chosen),
    )


def chosen_unrelated(choice: str) -> Sequence[Unrelated]:
    """Return the texts that edits should leave alone: the package's own (`general`), none, or those of a file."""
    if choice == "general":
        return GENERAL
    if choice == "none":
        return ()
    return read_unrelated(
        require_file(choice, "--unrelated", "a .jsonl or .json file, `general` or `none`")
    )


def require_file(path: str | Path, option: str, wanted: str) -> Path:
    """Return the path if a file is there; raise a ValueError that says what the option takes otherwise."""
    if not Path(path).is_file():
        raise ValueError(f"{option}: there is no file {path}. It takes {wanted}.")
    return Path(path)


def require_known(kind: str, name: str, known: Collection[str]) -> None:
    """Raise a ValueError that lists the known names unless `name` is one of them."""
    if name not in known:
        raise ValueError(f"Unknown {kind} {name!r}; known are {', '.join(known)}.")
