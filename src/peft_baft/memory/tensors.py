"""The saved tensors of a memory: one table of them, and how edits are packed into them.

No tensor is empty, even in a memory without edits: libraries that save whole models take empty tensors for duplicates of each
other.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.kinds import SavedTensor

NUMBER, STOPS, QUESTION, SPACED, BARE = range(5)  # columns of `edits`
# Entries before those of the first edit. In `edits` it holds the largest number that was ever assigned, elsewhere zeros.
HEADER = 1
# By name: the dtype (None: floating point) and the sizes. "d" is the model's width, "k" the size of a key, None any size.
TABLE: dict[str, tuple[torch.dtype | None, tuple[str | int | None, ...]]] = {
    # One row per edit: its number, whether its answer ends the reply, and the token counts of its question, of its answer after a
    # space, and of its answer without one.
    "edits": (torch.int32, (None, 5)),
    # Token ids of each edit: its question, its answer after a space, and its answer without one.
    "tokens": (torch.int32, (None,)),
    # One key for each token of a question except the first.
    "keys": (torch.int8, (None, "k")),
    # The rest belongs to the base model and its tokenizer and is the same in every memory on them: a `PromptFormat` as compressed
    # JSON, how hidden states become keys, the keys of the wordings of common relations, and for each wording its number of keys,
    # its relation and its kind of answer.
    "reading": (torch.uint8, (None,)),
    "mean": (torch.float32, ("d",)),
    "whitening": (torch.float16, ("d", "k")),
    "relation_keys": (torch.int8, (None, "k")),
    "wordings": (torch.int32, (None, 3)),
}
PER_EDIT = ("edits", "tokens", "keys")
PER_MODEL = tuple(name for name in TABLE if name not in PER_EDIT)


def saved_tensors(width: int | None, key_dimensions: int) -> dict[str, SavedTensor]:
    """Return the table for a model of `width` d and keys of k dimensions."""
    sizes: dict[str, int | None] = {"d": width, "k": key_dimensions}
    table = {}
    for name, (dtype, shape) in TABLE.items():
        resolved = tuple(sizes[size] if isinstance(size, str) else size for size in shape)
        table[name] = SavedTensor(resolved, dtype)
    return table


def empty_tensors(width: int, key_dimensions: int) -> dict[str, Tensor]:
    """Return the tensors of a memory without edits and without measurements of the base model."""
    tensors = {
        name: torch.zeros([1 if size is None else size for size in saved.shape], dtype=saved.dtype)
        for name, saved in saved_tensors(width, key_dimensions).items()
    }
    return {**tensors, "reading": pack_json({})}


def pack_json(value: Any) -> Tensor:
    """Compress a value that JSON can represent into bytes, uint8."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)


def unpack_json(values: Tensor) -> Any:
    """Return the value that `pack_json` compressed.

    Raises:
        ValueError: the bytes are damaged.
    """
    try:
        return json.loads(zlib.decompress(bytes(values.cpu().numpy())))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the tensor `reading` of a memory is damaged ({error})") from None


@dataclass(frozen=True)
class StoredEdit:
    """One edit of a memory.

    Attributes:
        number: identifies the edit for users.
        stops: whether its answer ends the reply.
        question: token ids, including one before the first word.
        keys: (n - 1, k) int8, of all tokens of the question except the first.
        spaced, bare: token ids of the answer, after a space and without one.
    """

    number: int
    stops: bool
    question: tuple[int, ...]
    keys: Tensor
    spaced: tuple[int, ...]
    bare: tuple[int, ...]


def stored_edits(tensors: Mapping[str, Tensor]) -> list[StoredEdit]:
    """Return the edits of a memory, in the order in which they were made."""
    rows = tensors["edits"][HEADER:].tolist()
    ids, keys = tensors["tokens"][HEADER:].tolist(), tensors["keys"][HEADER:].cpu()
    edits, token, key = [], 0, 0
    for row in rows:
        parts = []
        for length in row[QUESTION:]:
            parts.append(tuple(ids[token : token + length]))
            token += length
        question, spaced, bare = parts
        last_key = key + len(question) - 1
        edit_keys = keys[key:last_key]
        edits.append(StoredEdit(row[NUMBER], bool(row[STOPS]), question, edit_keys, spaced, bare))
        key = last_key
    return edits


def add_edits(tensors: Mapping[str, Tensor], edits: Sequence[StoredEdit]) -> dict[str, Tensor]:
    """Return the per-edit tensors with further edits after the existing ones."""
    rows = [[e.number, int(e.stops), len(e.question), len(e.spaced), len(e.bare)] for e in edits]
    ids: list[int] = []
    for edit in edits:
        ids += (*edit.question, *edit.spaced, *edit.bare)
    device = tensors["edits"].device
    header = tensors["edits"][:HEADER].clone()
    header[0, NUMBER] = max([int(header[0, NUMBER]), *(edit.number for edit in edits)])
    return {
        "edits": torch.cat([header, tensors["edits"][HEADER:], _integers(rows, device)]),
        "tokens": torch.cat([tensors["tokens"], _integers(ids, device)]),
        "keys": torch.cat([tensors["keys"], *(edit.keys.to(device) for edit in edits)]),
    }


def select_edits(tensors: Mapping[str, Tensor], edits: Sequence[StoredEdit]) -> dict[str, Tensor]:
    """Return the per-edit tensors with these edits in place of the existing ones."""
    return add_edits({name: tensors[name][:HEADER] for name in PER_EDIT}, edits)


def _integers(values: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def edit_numbers(tensors: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of the edits."""
    numbers: list[int] = tensors["edits"][HEADER:, NUMBER].tolist()
    return numbers


def largest_number(tensors: Mapping[str, Tensor]) -> int:
    """Return the largest number that was ever assigned to an edit."""
    return int(tensors["edits"][0, NUMBER])


def require_consistent(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError unless the tensors of a memory, each of which has the right shape, belong together."""
    edits, ids = tensors["edits"].long(), tensors["tokens"].long()
    rows = edits[HEADER:]
    numbers = rows[:, NUMBER].tolist()
    is_consistent = (
        len(edits) >= HEADER
        and len(set(numbers)) == len(numbers)
        and all(1 <= number <= int(edits[0, NUMBER]) for number in numbers)
        and bool(((rows[:, STOPS] == 0) | (rows[:, STOPS] == 1)).all())
        and bool((rows[:, QUESTION:] >= 1).all())
        and len(ids) == HEADER + int(rows[:, QUESTION:].sum())
        and len(tensors["keys"]) == HEADER + int((rows[:, QUESTION] - 1).sum())
        and _is_model_part_consistent(tensors, ids, bool(numbers))
    )
    if not is_consistent:
        raise ValueError(
            f"The tensors of the memory of edits in {where} do not fit together: they have different numbers of edits or tokens. "
            "The file is damaged; use an intact copy, or make the edits again."
        )


def _is_model_part_consistent(tensors: Mapping[str, Tensor], ids: Tensor, has_edits: bool) -> bool:
    """Return whether the tensors of the base model fit together, and cover all tokens of the edits."""
    try:
        prompt_format = unpack_json(tensors["reading"])
    except ValueError:
        return False
    if not prompt_format:
        return not has_edits
    if not isinstance(prompt_format, dict):
        return False
    texts, names = prompt_format.get("texts"), prompt_format.get("relations")
    if not isinstance(texts, list) or not isinstance(names, list):
        return False
    lengths, relations, kinds = tensors["wordings"].long().unbind(1)
    return (
        bool(((ids >= 0) & (ids < len(texts))).all())
        and bool((lengths >= 1).all())
        and int(lengths.sum()) == len(tensors["relation_keys"])
        and bool(((relations >= 0) & (relations < len(names)) & (kinds >= 0)).all())
    )
