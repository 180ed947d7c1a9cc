"""The prompt format that a BaFT adapter was trained on, as stored in its config: raw text, the chat template, or both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
RAW, CHAT, BOTH = "raw", "chat", "both"
FIELDS = ("template", "template_hash")  # of a config, filled in by edits
OTHER_FORM = (
    "The facts of this adapter were taught in the prompt format %r, and are now used in %r. An edit works only in the prompt "
    "format it was trained on: use template='auto'."
)
OTHER_TEMPLATE = (
    "The facts of this adapter were taught in another chat template than that of this tokenizer (%s, not %s); they may "
    "not work in it."
)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of a tokenizer's chat template; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else hashlib.sha256(repr(template).encode()).hexdigest()[:16]


def remember(config: Any, form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add a prompt format to those in an adapter's config; do nothing for a config of another PEFT method.

    Args:
        form: `raw`, `chat` or `both`.
    """
    if not hasattr(config, "template_hash"):
        return
    config.template = form if config.template in (None, form) else BOTH
    if form != RAW:
        config.template_hash = template_hash(tokenizer)


def remembered_forms(configs: Iterable[Any]) -> Callable[[], None]:
    """Return a function that restores the prompt formats in configs; those of other PEFT methods are ignored."""
    before = [
        (config, config.template, config.template_hash)
        for config in configs
        if hasattr(config, "template_hash")
    ]

    def restore() -> None:
        for config, form, identity in before:
            config.template, config.template_hash = form, identity

    return restore


def form_fields(config: Any) -> dict[str, str | None]:
    """Return the fields with a config's prompt format, by name; empty for a config of another PEFT method."""
    return {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}


def taught_form(config: Any) -> str | None:
    """Return the prompt format that an adapter was trained on; None if unknown."""
    return getattr(config, "template", None)


def asked_form(config: Any) -> str:
    """Return the prompt format for questions: the adapter's own; chat if it has both; raw if unknown."""
    form = taught_form(config) or RAW
    return CHAT if form == BOTH else form


def warn_of_another(config: Any, forms: set[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if an adapter is used in a prompt format, or with a chat template, that it was not trained on.

    Args:
        forms: a subset of `raw` and `chat`.
    """
    taught = taught_form(config)
    if taught is None:
        return
    kind = getattr(config, "kind", None)  # absent from configs of other methods
    # Only training ties a fact to a format.
    works_in_all = taught == BOTH or (kind is not None and not kind.trains)
    known = {RAW, CHAT} if works_in_all else {taught}
    if not forms <= known:
        logger.warning(OTHER_FORM, taught, " and ".join(sorted(forms)))
    own, of_adapter = template_hash(tokenizer), getattr(config, "template_hash", None)
    if CHAT in forms and of_adapter not in (None, own):
        logger.warning(OTHER_TEMPLATE, own, of_adapter)
