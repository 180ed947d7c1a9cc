"""Convert tokens to readable text: with leading spaces, partial characters as bytes, and invisible characters as marks."""

from __future__ import annotations

import re
import unicodedata

from transformers import PreTrainedTokenizerBase

# Bytes that byte-level BPE represents by the same character.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_BYTES = {chr(b): b for b in _PRINTABLE}
_BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_HEX = re.compile("[0-9a-f]{2}")
_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token, with its leading space; bytes of a partial character are written as ‹E6 97›."""
    text = str(tokenizer.decode([token]))
    piece = str(tokenizer.convert_ids_to_tokens(token) or "")
    if "\ufffd" in text:
        return _decode_piece(piece) or f"‹token {token}›"
    # SentencePiece drops the leading space of a text.
    if piece.startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    return text or f"‹token {token}›"


def visible(text: str) -> str:
    """Replace invisible characters by marks: · for a space, ↵, ⇥, and ‹U+200B› for other characters."""
    hidden = {c for c in text if unicodedata.category(c)[0] in "CZ"}
    return "".join(_MARKS.get(c, f"‹U+{ord(c):04X}›") if c in hidden else c for c in text)


def _decode_piece(piece: str) -> str:
    """Decode a piece of byte-level BPE or a byte token such as <0xE6>, partial characters as bytes; "" for other pieces."""
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
