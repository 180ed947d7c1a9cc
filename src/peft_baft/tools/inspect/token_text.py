"""Tokens as a person can read them: with the space before them, parts of characters as bytes, hidden characters as marks."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# Bytes that byte-level BPE writes as themselves.
_PRINTABLE = {
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
}
_BYTES = {chr(b): b for b in _PRINTABLE}
_BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_HEX = re.compile("[0-9a-f]{2}")
_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}


def token_text(tokenizer: Any, token: int) -> str:
    """Write what one token stands for: its text with the space before it; bytes of a part of a character as ‹E6 97›."""
    text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token) or ""
    if "\ufffd" in text:
        return _bytes_of(piece) or f"‹token {token}›"
    # SentencePiece drops the space of what begins a text
    if piece.startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    return text or f"‹token {token}›"


def visible(text: str) -> str:
    """Write `text` with marks for what cannot be seen: · for a space, ↵ and ⇥, and ‹U+200B› for other such characters."""
    hidden = {c for c in text if unicodedata.category(c)[0] in "CZ"}
    return "".join(_MARKS.get(c, f"‹U+{ord(c):04X}›") if c in hidden else c for c in text)


def _bytes_of(piece: str) -> str:
    """Text of a piece of byte-level BPE or of a byte token <0xE6>, broken characters as bytes; else empty."""
    named = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    if named is None and not _BYTES.keys() >= set(piece):
        return ""
    data = bytes.fromhex(named[1]) if named else bytes(_BYTES[c] for c in piece)
    text = data.decode("utf-8", "backslashreplace")
    return re.sub(
        r"(?:\\x[0-9a-f]{2})+",
        lambda broken: f"‹{' '.join(_HEX.findall(broken[0])).upper()}›",
        text,
    )
