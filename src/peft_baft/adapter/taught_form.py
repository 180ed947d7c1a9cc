"""What a BaFT adapter remembers of the form its facts were taught in: raw text, the chat template, or both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)
RAW, CHAT, BOTH = "raw", "chat", "both"
FIELDS = ("template", "template_hash")  # of a config, which edits fill in
OTHER_FORM = (
    "The facts of this adapter were taught in the form %r, and are now used in %r: an edit holds in the form in which it was "
    "taught. Take template='auto'."
)
OTHER_TEMPLATE = (
    "The facts of this adapter were taught in another chat template than the one that this tokenizer has (%s, not %s); they may "
    "not hold in it."
)


def template_hash(tokenizer: Any) -> str | None:
    """Identify a tokenizer's chat template; None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else hashlib.sha256(repr(template).encode()).hexdigest()[:16]


def remember(config: Any, form: str, tokenizer: Any) -> None:
    """Write into an adapter's config that facts were taught in a form, besides those it knows of.

    A config of another PEFT method is left alone.

    Args:
        form: `raw`, `chat` or `both`.
    """
    if not hasattr(config, "template_hash"):
        return
    config.template = form if config.template in (None, form) else BOTH
    if form != RAW:
        config.template_hash = template_hash(tokenizer)


def remembered_forms(configs: Iterable[Any]) -> Callable[[], None]:
    """Note what some adapters' configs remember; calling the result puts it back. Configs of other methods are left alone."""
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
    """Give the fields that hold what an adapter's config remembers, by name; none of a config of another method."""
    return {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}


def taught_form(config: Any) -> str | None:
    """Give the form in which the facts of an adapter were taught; None where it does not say."""
    return getattr(config, "template", None)


def asked_form(config: Any) -> str:
    """Give the form in which to ask an adapter: its own, the chat where it has both, raw text where it does not say."""
    form = taught_form(config) or RAW
    return CHAT if form == BOTH else form


def warn_of_another(config: Any, forms: set[str], tokenizer: Any) -> None:
    """Warn where an adapter is used in a form, or with a chat template, that its facts were not taught in.

    Args:
        forms: of `raw` and `chat`.
    """
    taught = taught_form(config)
    if taught is None:
        return
    kind = getattr(config, "kind", None)  # absent from configs of other methods
    # Only training ties a fact to a form.
    holds_in_all = taught == BOTH or (kind is not None and not kind.trains)
    known = {RAW, CHAT} if holds_in_all else {taught}
    if not forms <= known:
        logger.warning(OTHER_FORM, taught, " and ".join(sorted(forms)))
    own, of_adapter = template_hash(tokenizer), getattr(config, "template_hash", None)
    if CHAT in forms and of_adapter not in (None, own):
        logger.warning(OTHER_TEMPLATE, own, of_adapter)
