"""What a memory of edits saves: one table of its tensors, and how edits are packed into them.

Every tensor has at least one entry, also in an empty memory: libraries that save whole models take all empty tensors for one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.kinds import SavedTensor

NUMBER, STOPS, QUESTION, SPACED, BARE = range(5)  # columns of `edits`
FEW = 1  # entries before the first edit's: of `edits` the largest number that was ever given, else zeros
# By name: dtype (None: floating point), and the sizes: d of the model, k of a key, None for what their number decides.
TABLE: dict[str, tuple[torch.dtype | None, tuple[Any, ...]]] = {
    # One row an edit: its number, whether its answer ends the reply, and how many tokens its question and its answer have, the
    # latter after a space and without.
    "edits": (torch.int32, (None, 5)),
    # Of each edit the ids of its question, of its answer after a space, and of its answer without.
    "tokens": (torch.int32, (None,)),
    # Of each token of a question but the first.
    "keys": (torch.int8, (None, "k")),
    # Of the base model and its tokenizer, the same for every memory: `Reading` in JSON, compressed; how states become keys; keys
    # of the wordings of common relations, and of each wording how many of these it has, its relation, and the kind of answer.
    "reading": (torch.uint8, (None,)),
    "mean": (torch.float32, ("d",)),
    "whitening": (torch.float16, ("d", "k")),
    "relation_keys": (torch.int8, (None, "k")),
    "wordings": (torch.int32, (None, 3)),
}
OF_EDITS = ("edits", "tokens", "keys")
OF_MODEL = tuple(name for name in TABLE if name not in OF_EDITS)


def saved_tensors(width: int | None, key_dimensions: int) -> dict[str, SavedTensor]:
    """Return the table for a model of `width` d and keys of k numbers."""
    sizes: dict[str, int | None] = {"d": width, "k": key_dimensions}
    return {
        name: SavedTensor(
            tuple(sizes[size] if isinstance(size, str) else size for size in shape), dtype
        )
        for name, (dtype, shape) in TABLE.items()
    }


def empty_tensors(width: int, key_dimensions: int) -> dict[str, Tensor]:
    """Return the tensors of a memory without edits, on a model that has not been measured."""
    made = {
        name: torch.zeros([1 if size is None else size for size in saved.shape], dtype=saved.dtype)
        for name, saved in saved_tensors(width, key_dimensions).items()
    }
    return {**made, "reading": packed({})}


def packed(value: Any) -> Tensor:
    """Compress what JSON can hold into bytes, uint8."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)


def unpacked(values: Tensor) -> Any:
    """Return what `packed` compressed.

    Raises:
        ValueError: these are other bytes.
    """
    try:
        return json.loads(zlib.decompress(bytes(values.cpu().numpy())))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the tensor `reading` of a memory is damaged ({error})") from None


@dataclass(frozen=True)
class StoredEdit:
    """One edit of a memory.

    Attributes:
        number: by which users know it. stops: whether its answer ends the reply.
        question: token ids, with one before the first word. keys: (n - 1, k) int8 of all but that one.
        spaced, bare: token ids of the answer, after a space and without.
    """

    number: int
    stops: bool
    question: tuple[int, ...]
    keys: Tensor
    spaced: tuple[int, ...]
    bare: tuple[int, ...]


def stored_edits(tensors: Mapping[str, Tensor]) -> list[StoredEdit]:
    """List the edits of a memory, in the order in which they were made."""
    rows = tensors["edits"][FEW:].tolist()
    ids, keys = tensors["tokens"][FEW:].tolist(), tensors["keys"][FEW:].cpu()
    found, at, at_key = [], 0, 0
    for row in rows:
        parts = []
        for length in row[QUESTION:]:
            parts.append(tuple(ids[at : at + length]))
            at += length
        last_key = at_key + row[QUESTION] - 1
        found.append(
            StoredEdit(row[NUMBER], bool(row[STOPS]), parts[0], keys[at_key:last_key], *parts[1:])
        )
        at_key = last_key
    return found


def with_edits(tensors: Mapping[str, Tensor], edits: Sequence[StoredEdit]) -> dict[str, Tensor]:
    """Return the tensors of edits with further ones after those that are there."""
    rows = [[e.number, int(e.stops), len(e.question), len(e.spaced), len(e.bare)] for e in edits]
    ids: list[int] = []
    for edit in edits:
        ids += (*edit.question, *edit.spaced, *edit.bare)
    device = tensors["edits"].device
    head = tensors["edits"][:FEW].clone()
    head[0, NUMBER] = max([int(head[0, NUMBER]), *(edit.number for edit in edits)])
    return {
        "edits": torch.cat([head, tensors["edits"][FEW:], _integers(rows, device)]),
        "tokens": torch.cat([tensors["tokens"], _integers(ids, device)]),
        "keys": torch.cat([tensors["keys"], *(edit.keys.to(device) for edit in edits)]),
    }


def only_edits(tensors: Mapping[str, Tensor], places: Iterable[int]) -> dict[str, Tensor]:
    """Return the tensors of edits with those at some places only, in this order."""
    edits = stored_edits(tensors)
    return with_edits({n: tensors[n][:FEW] for n in OF_EDITS}, [edits[place] for place in places])


def _integers(values: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def numbers_of(tensors: Mapping[str, Tensor]) -> list[int]:
    """List the numbers of the edits."""
    return tensors["edits"][FEW:, NUMBER].tolist()


def largest_number(tensors: Mapping[str, Tensor]) -> int:
    """Return the largest number that was ever given to an edit."""
    return int(tensors["edits"][0, NUMBER])


def require_whole(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError unless the tensors of a memory, which fit one by one, belong together."""
    edits, ids = tensors["edits"].long(), tensors["tokens"].long()
    rows = edits[FEW:]
    numbers = rows[:, NUMBER].tolist()
    is_whole = (
        len(edits) >= FEW
        and len(set(numbers)) == len(numbers)
        and all(1 <= number <= int(edits[0, NUMBER]) for number in numbers)
        and bool(((rows[:, STOPS] == 0) | (rows[:, STOPS] == 1)).all())
        and bool((rows[:, QUESTION:] >= 1).all())
        and len(ids) == FEW + int(rows[:, QUESTION:].sum())
        and len(tensors["keys"]) == FEW + int((rows[:, QUESTION] - 1).sum())
        and _is_model_whole(tensors, ids, bool(numbers))
    )
    if not is_whole:
        raise ValueError(
            f"The memory of edits in {where} does not hold together: its tensors are those of different numbers of edits or "
            "tokens. The file is damaged; take a good copy, or edit again."
        )


def _is_model_whole(tensors: Mapping[str, Tensor], ids: Tensor, has_edits: bool) -> bool:
    """Return whether what belongs to the base model holds together, and knows all tokens of the edits."""
    try:
        reading = unpacked(tensors["reading"])
    except ValueError:
        return False
    if not reading:
        return not has_edits
    if not isinstance(reading, dict):
        return False
    texts, names = reading.get("texts"), reading.get("relations")
    if not isinstance(texts, list) or not isinstance(names, list):
        return False
    lengths, relations, kinds = tensors["wordings"].long().unbind(1)
    return (
        bool(((ids >= 0) & (ids < len(texts))).all())
        and bool((lengths >= 1).all())
        and int(lengths.sum()) == len(tensors["relation_keys"])
        and bool(((relations >= 0) & (relations < len(names)) & (kinds >= 0)).all())
    )
