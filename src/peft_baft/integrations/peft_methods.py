"""Make `PeftModel` write this package's model card for BaFT adapters instead of PEFT's.

`PeftModel.push_to_hub` is inherited from transformers: it overwrites PEFT's card with one for transformers models, which names
neither the base model nor the package to import. This file wraps two public methods of `PeftModel`. The wrappers do not change
the behaviour for models without a BaFT adapter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from peft_baft.adapter.registration import BAFT
from peft_baft.adapter.state import adapter_state_dict
from peft_baft.adapter.weights import FILE as WEIGHTS

MARK = "_peft_baft_wrapped"


def install() -> None:
    """Wrap the methods, unless they are wrapped already."""
    for name, wrapper in (
        ("create_or_update_model_card", _with_our_card),
        ("push_to_hub", _with_our_push),
    ):
        original = getattr(PeftModel, name)
        if not hasattr(original, MARK):
            wrapped = wraps(original)(wrapper(original))
            setattr(wrapped, MARK, True)
            setattr(PeftModel, name, wrapped)


def _with_our_card(original: Callable[..., None]) -> Callable[..., None]:
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        name = _own_adapter(self)
        if name is None:
            original(self, output_dir)
            return
        # Imported here, since an adapter is loaded without them.
        from peft_baft.integrations.card import CardSource, card_in, write_card

        folder = Path(output_dir)
        config: Any = self.peft_config[name]
        saved = _is_saved_in(folder, self, name)
        source = CardSource(config, subfolder=_subfolder(name), weights_are_saved=saved)
        write_card(folder, source, folder, card_in(folder))

    return create_or_update_model_card


def _with_our_push(original: Callable[..., Any]) -> Callable[..., Any]:
    def push_to_hub(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        name = _own_adapter(self)
        if name is None:
            return original(self, *args, **kwargs)
        return _push(self, name, *args, **kwargs)

    return push_to_hub


def _push(
    model: PeftModel,
    name: str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tags: Sequence[str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    **kwargs: Any,
) -> str:
    """Save a model's adapters and publish them with the card of the adapter `name`; see `push_to_hub` for the other arguments.

    Raises:
        ValueError: the base model's id on the Hub is unknown. Other errors are as for `hub.push`.
    """
    from peft_baft.integrations.base_model import require_on_hub
    from peft_baft.integrations.card import CardSource
    from peft_baft.integrations.hub import publish

    config: Any = model.peft_config[name]
    base = require_on_hub(config.base_model_name_or_path)
    source = CardSource(
        config, base, repo_id=repo_id, subfolder=_subfolder(name), tags=tuple(tags or ())
    )
    commit = {
        "commit_message": commit_message or "Upload adapter",
        "commit_description": commit_description,
        "create_pr": create_pr,
    }
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, **kwargs)
        folder = Path(temporary)
        return publish(folder, source, folder, private, revision, token, commit)


def _own_adapter(model: PeftModel) -> str | None:
    """Return the BaFT adapter that the card describes: the active one, or else the first one; None if there is none."""
    names = [name for name, config in model.peft_config.items() if config.peft_type == BAFT]
    active = [name for name in names if name in model.active_adapters]
    return next(iter([*active, *names]), None)


def _subfolder(name: str) -> str | None:
    """Return the subfolder in which PEFT saves an adapter; None for the folder itself."""
    return None if name == "default" else name


def _is_saved_in(folder: Path, model: PeftModel, name: str) -> bool:
    """Check whether a folder holds the adapter's current weights; PEFT writes the card before the weights."""
    try:
        saved = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError):
        return False
    state = adapter_state_dict(model, name)
    return saved.keys() == state.keys() and all(
        torch.equal(tensor, state[key].cpu()) for key, tensor in saved.items()
    )
