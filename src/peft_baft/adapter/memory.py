"""A memory of edits in an adapter: each edit owns a code in a basis that all share, and a router picks one of them, or none.

    h ← h + c R        R (r, d) orthonormal rows of a block, c (r,) the edit's own numbers in that block

In the terms of BaFT, A = R and the gates are those of edits and not of basis vectors: one is open, or none. Edits that share
nothing but a frozen basis cannot forget each other. A prompt that is routed to no edit is computed as without the adapter.
"""

from __future__ import annotations

import json
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.base_identity import SAMPLE, embedding_sample
from peft_baft.adapter.matching import INT8, Match, Question, Questions, Thresholds
from peft_baft.adapter.relations import Relations

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

OF_EDITS = ("numbers", "lengths", "codes", "scales")  # tensors with one entry an edit
# Those with one for each token of an edit's question but the first so many.
OF_TOKENS = {"ids": 0, "keys": 1}
# What a config's `memory_sizes` says, and of which tensor of the router that is the length.
SIZES = {
    "edits": "numbers",
    "tokens": "ids",
    **{n: n for n in ("texts", "relation_keys", "wordings", "relation_names", "before", "after")},
}
OTHER_MODEL = (
    "This memory of edits was made on another base model: what its edits add to hidden vectors, and how it finds them, means "
    "nothing in this one. Load the model that it was made on (base_model_name_or_path of its adapter_config.json), or teach the "
    "facts again."
)
LIKE = 0.1  # of their root mean square: two values that differ by less may be one in other precision, or fine-tuned a little


def orthonormal(block: int, rank: int, width: int) -> Tensor:
    """Make the basis of a block, (r, d) float32: the same for every memory, so that it need not be kept.

    Raises:
        ValueError: there are not so many directions.
    """
    if rank > width:
        raise ValueError(f"r must be at most the width of the model, {width}, not {rank}.")
    generator = torch.Generator().manual_seed(1_000_003 + block)
    random = torch.randn(width, rank, generator=generator, dtype=torch.float64, device="cpu")
    basis, triangle = torch.linalg.qr(random)
    # The signs of a QR decomposition are a library's own choice; these are not.
    return (basis * triangle.diagonal().sign()).mT.float().contiguous()


def packed(texts: Sequence[str]) -> Tensor:
    """Make texts into bytes, uint8."""
    return torch.frombuffer(
        bytearray(zlib.compress(json.dumps(list(texts)).encode(), 9)), dtype=torch.uint8
    )


def unpacked(texts: Tensor) -> list[str]:
    """Give the texts that `packed` made into bytes.

    Raises:
        ValueError: it made none of these.
    """
    try:
        found = json.loads(zlib.decompress(bytes(texts.cpu().numpy())))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"the texts of a memory are damaged ({error})") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError("the texts of a memory are damaged")
    return found


def of_edits(
    tensors: Mapping[str, Tensor], lengths: Sequence[int], places: Sequence[int]
) -> dict[str, Tensor]:
    """Give a memory's tensors with the edits at some places alone, in this order.

    Args:
        tensors: by names that end with what they are. lengths: of each edit's question, in tokens.
    """
    index = torch.tensor(list(places), dtype=torch.long)
    found = {}
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind in OF_EDITS:
            found[name] = tensor[index.to(tensor.device)]
        elif kind in OF_TOKENS and lengths:
            parts = tensor.split([length - OF_TOKENS[kind] for length in lengths])
            found[name] = torch.cat([tensor[:0], *(parts[place] for place in places)])
        else:
            found[name] = tensor
    return found


def keys_of(states: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Make keys (n, k) int8, of length 127, of states (n, d) of the key block."""
    white = (states.float() - mean) @ whitening.float()
    return (torch.nn.functional.normalize(white, dim=-1) * INT8).round().to(torch.int8)


@dataclass(frozen=True)
class KeyStatistics:
    """What belongs to a base model and is the same for every memory on it: how states of a block become keys.

    Attributes:
        mean: (d,). whitening: (d, k): the k directions of the largest spread, each divided by it.
        texts: of each token of the vocabulary, what it stands for, with the space before it.
        before, after: ids of the tokens that a chat template puts directly before a user's words, and behind them up to the
            reply; empty where the tokenizer has no template.
        sample: of the model's embeddings; zeros where they were not at hand.
        relation_keys, wordings, relation_names: of common relations, as `Relations` takes them; keys int8, of length 127.
    """

    mean: Tensor
    whitening: Tensor
    texts: Sequence[str]
    sample: Tensor
    relation_keys: Tensor
    wordings: Tensor
    relation_names: Sequence[str]
    before: Sequence[int] = ()
    after: Sequence[int] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Give them as a router keeps them."""
        return {
            "mean": self.mean.float(),
            "whitening": self.whitening.half(),
            "texts": packed(self.texts),
            "sample": self.sample,
            "relation_keys": self.relation_keys,
            "wordings": self.wordings,
            "relation_names": packed(self.relation_names),
            "before": torch.tensor(list(self.before), dtype=torch.int32),
            "after": torch.tensor(list(self.after), dtype=torch.int32),
        }


class _Kept(nn.Module):
    """Buffers that are replaced as a whole and never written into, so that to remember them is to remember their names."""

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Put these tensors in the place of those of the same names, on the device of those."""
        for name, tensor in tensors.items():
            self._buffers[name] = tensor.to(self._buffers[name].device)  # type: ignore[union-attr]
        self.changed()

    def changed(self) -> None:
        """Take note that the tensors are others."""

    def kept(self) -> dict[str, Tensor]:
        """Give all tensors by name."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Kept:
        """Move the tensors as the model moves; their types stay, since keys are compared with keys made before."""
        for name, buffer in self.kept().items():
            moved = fn(torch.empty(0, device=buffer.device))
            self._buffers[name] = (
                torch.empty_like(buffer, device="meta")
                if moved.is_meta
                else torch.zeros_like(buffer, device=moved.device)
                if buffer.is_meta
                else buffer.to(moved.device)
            )
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take tensors of any number of edits."""
        for name, buffer in self.kept().items():
            given = state_dict.get(prefix + name)
            if given is not None and given.shape != buffer.shape:
                self._buffers[name] = torch.empty_like(given, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.changed()


class EditCodes(_Kept):
    """The codes of all edits in one block.

    Each is (r,) int8, with the number that it is multiplied by.
    """

    def __init__(self, config: BaftConfig, block: int, width: int) -> None:
        super().__init__()
        self.block, self.rank, self.width = block, config.r, width
        edits = (config.memory_sizes or {}).get("edits", 0)
        self.register_buffer("codes", torch.zeros(edits, config.r, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros(edits))
        self._basis: Tensor | None = None

    def basis(self, device: torch.device) -> Tensor:
        """Give R, (r, d) float32."""
        if self._basis is None or self._basis.device != device:
            self._basis = orthonormal(self.block, self.rank, self.width).to(device)
        return self._basis

    def change(self, places: Tensor, device: torch.device) -> Tensor:
        """Compute what edits add to a hidden vector. places: (n,) of the edits. Returns (n, d) float32."""
        kept = self.kept()
        places = places.to(kept["codes"].device)
        code = kept["codes"][places].float() * kept["scales"][places][:, None]
        return code.to(device) @ self.basis(device)

    def with_codes(self, codes: Tensor) -> dict[str, Tensor]:
        """Give the tensors with the codes (n, r) of further edits behind those that are there, in int8."""
        kept = self.kept()
        device = kept["codes"].device
        scales = (codes.abs().amax(1).clamp(min=1e-12) / INT8).to(device)
        rounded = (codes.to(device) / scales[:, None]).round().to(torch.int8)
        return {
            "codes": torch.cat([kept["codes"], rounded]),
            "scales": torch.cat([kept["scales"], scales]),
        }

    def only(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Give the tensors with the edits at these places alone, in this order."""
        return of_edits(self.kept(), (), places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_basis": None}


class EditRouter(_Kept):
    """The keys of all edits, by which a prompt finds its edit.

    Of each edit: its number, by which users know it; ids of its question's tokens; and their keys (k,) int8, without the first
    token's. Those of all edits stand in a row, in the order of the edits.

    Args:
        config: of the adapter. Its `memory_sizes` says for how many edits there is room, and follows their number.
        width: d, of the states of the key block.
    """

    def __init__(self, config: BaftConfig, width: int) -> None:
        super().__init__()
        self.config, dimensions = config, config.key_dimensions
        sizes = config.memory_sizes or {}
        edits, tokens = sizes.get("edits", 0), sizes.get("tokens", 0)
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "numbers": ((edits,), torch.int32),
            "made": ((), torch.int32),
            "lengths": ((edits,), torch.int32),
            "ids": ((tokens,), torch.int32),
            "keys": ((tokens - edits, dimensions), torch.int8),
            "mean": ((width,), torch.float32),
            "whitening": ((width, dimensions), torch.float16),
            "texts": ((sizes.get("texts", 0),), torch.uint8),
            "sample": ((SAMPLE,), torch.float32),
            "relation_keys": ((sizes.get("relation_keys", 0), dimensions), torch.int8),
            "wordings": ((sizes.get("wordings", 0), 3), torch.int32),
            "relation_names": ((sizes.get("relation_names", 0),), torch.uint8),
            "before": ((sizes.get("before", 0),), torch.int32),
            "after": ((sizes.get("after", 0),), torch.int32),
        }
        for name, (shape, dtype) in kinds.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        # What was made ready, of which tensors: these are held, so that no other tensor can get the identity of one of them.
        self._ready: tuple[list[Tensor], list[int], Questions] | None = None
        self._is_of_model = False  # whether the model it stands in was found to be its own

    def changed(self) -> None:
        """Note in the config what the shapes are."""
        self._ready, self._is_of_model = None, False
        kept = self.kept()
        self.config.memory_sizes = {size: len(kept[name]) for size, name in SIZES.items()}

    @property
    def count(self) -> int:
        """How many edits there are."""
        return len(self.kept()["numbers"])

    @property
    def has_statistics(self) -> bool:
        """Tell whether the statistics of the base model have been measured."""
        return len(self.kept()["texts"]) > 0

    def require_model(self, model: nn.Module) -> None:
        """Raise a ValueError if the keys of the edits are those of another base model."""
        if self._is_of_model:
            return
        own, other = self.kept()["sample"].cpu(), embedding_sample(model)
        if other is not None and own.any():
            differences = (own - other).abs()
            if (differences < LIKE * own.square().mean().sqrt()).float().mean() < 0.5:
                raise ValueError(OTHER_MODEL)
        self._is_of_model = True

    def question(self, ids: Tensor, states: Tensor) -> Question:
        """Make of a prompt the question in it, with its keys.

        In the chat template, the question is the last message of the user.

        Args:
            ids: (n,) of the prompt's tokens. states: (n, d) of the key block.
        """
        kept, words = self.kept(), self.words_of_user(ids.tolist())
        keys = keys_of(states[words][1:], kept["mean"], kept["whitening"])
        return Question(ids[words].to(torch.int32), keys)

    def words_of_user(self, ids: Sequence[int]) -> slice:
        """Find the question in a prompt's tokens: the user's last message, or all of them if it is no chat."""
        kept = self.kept()
        return words_of_user(ids, kept["before"].tolist(), kept["after"].tolist())

    def stored(self) -> list[Question]:
        """List the questions of the edits."""
        kept = self.kept()
        lengths = kept["lengths"].tolist()
        ids, keys = kept["ids"].split(lengths), kept["keys"].split([n - 1 for n in lengths])
        return [Question(*parts) for parts in zip(ids, keys, strict=True)] if lengths else []

    def questions(self) -> Questions:
        """Give what finds the edit of a question; it is made when it is needed, and anew after a change."""
        kept = self.kept()
        tensors, versions = list(kept.values()), [tensor._version for tensor in kept.values()]
        if self._ready is not None:
            of_tensors, of_versions, questions = self._ready
            if versions == of_versions and all(map(operator.is_, tensors, of_tensors)):
                return questions
        questions = Questions(self.stored(), unpacked(kept["texts"]), self.relations())
        self._ready = (tensors, versions, questions)
        return questions

    def relations(self) -> Relations:
        """Give what tells which common relations a question asks for."""
        kept = self.kept()
        names = unpacked(kept["relation_names"]) if len(kept["relation_names"]) else []
        keys = kept["relation_keys"].float() / INT8
        return Relations(keys, kept["wordings"], names)

    def match(self, question: Question) -> Match:
        """Find the edit that a question asks for, by its place."""
        config = self.config
        thresholds = Thresholds(config.least_subject, config.strictness, config.most_unlike)
        return self.questions().match(question, thresholds)

    def with_questions(
        self, numbers: Sequence[int], questions: Sequence[Question]
    ) -> dict[str, Tensor]:
        """Give the tensors with further edits behind those that are there.

        Raises:
            ValueError: a question has a token that the tokenizer did not have when the statistics were measured.
        """
        kept, device = self.kept(), self.kept()["ids"].device
        known = len(unpacked(kept["texts"]))
        for question in questions:
            if len(question.ids) and int(question.ids.max()) >= known:
                raise ValueError(
                    f"A question has token {int(question.ids.max())}, and this memory of edits was made when the tokenizer had "
                    f"{known} tokens. Make a new memory with the tokenizer as it is now, or leave the added token out."
                )
        lengths = [len(question.ids) for question in questions]
        return {
            "numbers": torch.cat([kept["numbers"], _integers(numbers, device)]),
            "made": torch.tensor(max([int(kept["made"]), *numbers]), dtype=torch.int32),
            "lengths": torch.cat([kept["lengths"], _integers(lengths, device)]),
            "ids": torch.cat([kept["ids"], *(q.ids.to(device) for q in questions)]),
            "keys": torch.cat([kept["keys"], *(q.keys.to(device) for q in questions)]),
        }

    def only(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Give the tensors with the edits at these places alone, in this order."""
        return of_edits(self.kept(), self.kept()["lengths"].tolist(), places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def words_of_user(ids: Sequence[int], before: Sequence[int], after: Sequence[int]) -> slice:
    """Find where the user's last message stands in a prompt, with one token before it; the whole prompt if it is no chat.

    Args:
        before, after: ids of tokens, as of `KeyStatistics`.
    """
    ids, before, after = tuple(ids), tuple(before), tuple(after)
    if not before or not after or ids[-len(after) :] != after:
        return slice(0, len(ids))
    last = len(ids) - len(after)
    for first in range(last - 1, len(before) - 1, -1):
        if ids[first - len(before) : first] == before:
            return slice(first - 1, last)
    return slice(0, len(ids))
