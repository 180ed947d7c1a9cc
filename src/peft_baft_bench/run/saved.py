"""Edits of any method in one safetensors file: codebooks, masks, LoRAs and deltas, with what their editor was started with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_baft.editing.editor import Editor
from peft_baft.editing.presets import find_preset
from peft_baft.loading import fingerprint
from peft_baft.storage import load_with_header, save_with_header
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.methods import method

FORMAT = 1


def save_edits(
    file: str | Path, editor: Editor, variant: str, *, preset: str = "plain", seed: int = 0
) -> None:
    """Write the edits of an editor into a file.

    Args:
        variant, preset, seed: the method as `baft bench --method` takes it, and what the editor was started with besides.

    Raises:
        ValueError: there is no such method or preset.
    """
    method(variant, find_preset(preset))  # raises for an unknown one before anything is written
    header: dict[str, Any] = {"format": FORMAT, "method": variant, "preset": preset, "seed": seed}
    header["model"] = _known_by(editor.model)
    save_with_header(Path(file), editor.state_dict(), header)


def load_edits(
    file: str | Path, base: Any, tokenizer: Any, setup: EditorSetup | None = None
) -> Editor:
    """Put the edits of a file on the unedited base model that they were made on.

    Args:
        setup: what further edits need, such as unrelated text; its seed is the saved one.

    Raises:
        ValueError: the file is damaged, of another format, or does not fit the model. FileNotFoundError: it is not there.
    """
    state, header = load_with_header(Path(file))
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{file} is no file of edits of format {FORMAT}, which `save_edits` of this version writes."
        )
    if header["model"] != _known_by(base):
        raise ValueError(
            f"{file} holds edits of {header['method']} on another model: its embeddings are {header['model']}, those of this "
            f"one {_known_by(base)}. Load the model that was edited."
        )
    setup = replace(setup or EditorSetup(), seed=header["seed"])
    settings = method(header["method"], find_preset(header["preset"])).settings
    editor = settings.start(base, tokenizer, setup)
    try:
        editor.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        editor.remove()
        raise ValueError(
            f"{file} holds no edits of {header['method']} as it is set here: {error}"
        ) from error
    return editor


def _known_by(model: Any) -> str:
    """Identify a model by its embeddings, which no method changes."""
    return fingerprint(model.get_input_embeddings())
