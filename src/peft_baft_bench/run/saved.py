"""Save the edits of any method in one safetensors file, with the settings of their editor in its header."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.editing.editor import Editor
from peft_baft.editing.presets import find_preset
from peft_baft.loading import fingerprint
from peft_baft.storage import load_with_header, save_with_header
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.methods import parse_method

FORMAT = 1


def save_edits(
    file: str | Path, editor: Editor, variant: str, *, preset: str = "plain", seed: int = 0
) -> None:
    """Save the edits of an editor to a file.

    Args:
        variant: the method with its settings, as `baft bench --method` takes it.
        preset, seed: the preset and the seed that the editor was started with.

    Raises:
        ValueError: there is no such method or preset.
    """
    # Raise for an unknown method before anything is written.
    parse_method(variant, find_preset(preset))
    header: dict[str, Any] = {"format": FORMAT, "method": variant, "preset": preset, "seed": seed}
    header["model"] = _embedding_fingerprint(editor.model)
    save_with_header(Path(file), editor.state_dict(), header)


def load_edits(
    file: str | Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setup: EditorSetup | None = None,
) -> Editor:
    """Apply the edits of a file to the unedited base model that they were made on.

    Args:
        setup: what further edits need, such as unrelated text; its seed is replaced by the saved one.

    Raises:
        ValueError: the file is damaged, has another format, or does not fit the model.
        FileNotFoundError: there is no such file.
    """
    state, header = load_with_header(Path(file))
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{file} is not a file of edits of format {FORMAT}, which this version's `save_edits` writes."
        )
    if header["model"] != _embedding_fingerprint(base):
        raise ValueError(
            f"{file} contains edits of {header['method']} on another model: its embeddings are {header['model']}, those of this "
            f"model are {_embedding_fingerprint(base)}. Load the model that was edited."
        )
    setup = replace(setup or EditorSetup(), seed=header["seed"])
    settings = parse_method(header["method"], find_preset(header["preset"])).settings
    editor = settings.start(base, tokenizer, setup)
    try:
        editor.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        editor.remove()
        raise ValueError(
            f"{file} does not contain edits of {header['method']} with its current settings: {error}"
        ) from error
    return editor


def _embedding_fingerprint(model: PreTrainedModel) -> str:
    """Identify a model by its embeddings, which no method changes."""
    return fingerprint(model.get_input_embeddings())
