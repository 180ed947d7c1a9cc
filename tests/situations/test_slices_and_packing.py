"""Packed rows and slices of sequences: each token is edited as in its own whole sequence, or the call is refused."""

# mypy: disable-error-code="attr-defined, operator, union-attr, index"
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import VOCABULARY
from peft_baft.adapter import find_context
from peft_baft.adapter.model_call import UnknownPositionError
from side_by_side import adapted

IDS = torch.randint(3, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
COLUMNS, PROMPT = torch.arange(16), 11
LABELS = torch.where(COLUMNS < PROMPT, -100, IDS)
# Two sequences of 6 and 10 tokens, with prompts of 4 and 7.
LENGTHS, PROMPTS = [6, 10], [4, 7]
WITHIN = torch.cat([torch.arange(6), torch.arange(10)])[None]
RELATIVE = (WITHIN - torch.tensor([4] * 6 + [7] * 10))[0].tolist()
PACKED_LABELS = torch.where(torch.tensor(RELATIVE) < 0, -100, IDS)


@torch.no_grad()
def positions(model: Any, **inputs: Any) -> list[int]:
    model(**inputs)
    return find_context(model).relative_positions[0].tolist()


def test_slices_with_the_prompt_lengths_of_the_whole() -> None:
    model = adapted("baft")
    found = []
    for part in (slice(0, 8), slice(8, 16)):
        inputs = {"input_ids": IDS[:, part], "position_ids": COLUMNS[None, part]}
        found += positions(model, **inputs, prompt_lengths=[PROMPT])
    assert found == (COLUMNS - PROMPT).tolist()


@pytest.mark.parametrize("told", ["labels", "shift_labels", "nothing"])
def test_a_slice_without_them_is_refused(told: str) -> None:
    shifted = torch.cat([LABELS[:, 1:], torch.full((1, 1), -100)], 1)
    given: dict[str, Any] = {
        "labels": {"labels": LABELS[:, 8:]},
        "shift_labels": {"labels": shifted[:, 8:], "shift_labels": shifted[:, 8:]},
        "nothing": {},
    }[told]
    model = adapted("baft")
    with pytest.raises(UnknownPositionError, match=r"above 0.*prompt_lengths"):
        model(input_ids=IDS[:, 8:], position_ids=COLUMNS[None, 8:], **given)
    # The control: the same on a whole sequence.
    model(input_ids=IDS[:, 8:], position_ids=COLUMNS[None, :8], **given)


def test_a_later_sequence_of_a_row_that_begins_above_0_is_refused() -> None:
    torn = torch.cat([torch.arange(6), torch.arange(3, 13)])[None]
    with pytest.raises(UnknownPositionError, match="above 0"):
        adapted("baft")(input_ids=IDS, position_ids=torn, labels=PACKED_LABELS)


@pytest.mark.parametrize("counts_padding", [False, True])
def test_padding_on_the_left_is_no_slice(counts_padding: bool) -> None:
    mask = (COLUMNS >= 5).long()[None]
    ids = COLUMNS[None] if counts_padding else (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    model = adapted("baft")
    got = positions(model, input_ids=IDS, attention_mask=mask, position_ids=ids, labels=LABELS)
    assert got[5:] == (COLUMNS - PROMPT).tolist()[5:]


def test_labels_that_are_shifted_by_the_trainer_tell_the_same_boundary() -> None:
    shifted = torch.cat([LABELS[:, 1:], torch.full((1, 1), -100)], 1)
    model = adapted("baft")
    wanted = positions(model, input_ids=IDS, labels=LABELS)
    assert wanted == (COLUMNS - PROMPT).tolist()
    assert positions(model, input_ids=IDS, labels=shifted, shift_labels=shifted) == wanted


def block_diagonal(dtype: torch.dtype) -> Tensor:
    number = torch.tensor([0] * 6 + [1] * 10)
    allowed = (number[:, None] == number) & (COLUMNS[:, None] >= COLUMNS)
    if dtype == torch.bool:
        return allowed[None, None]
    return torch.where(allowed, 0.0, torch.finfo(dtype).min)[None, None]


PACKED: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": WITHIN},
    "cu_seq_lens": {
        "cu_seq_lens_q": torch.tensor([0, 6, 16]),
        "cu_seq_lens_k": torch.tensor([0, 6, 16]),
        "max_length_q": 10,
        "max_length_k": 10,
    },
    "seq_idx": {"seq_idx": torch.tensor([[0] * 6 + [1] * 10])},
    "4-D mask": {"attention_mask": block_diagonal(torch.float32)},
    "4-D bool mask": {"attention_mask": block_diagonal(torch.bool)},
}


@pytest.mark.parametrize("told", PACKED)
def test_a_packed_row_is_edited_as_its_sequences(told: str) -> None:
    model = adapted("baft")
    assert positions(model, input_ids=IDS, labels=PACKED_LABELS, **PACKED[told]) == RELATIVE
    assert positions(model, input_ids=IDS, prompt_lengths=PROMPTS, **PACKED[told]) == RELATIVE
    # The control: without what tells of the packing it is one sequence.
    assert positions(model, input_ids=IDS, labels=PACKED_LABELS) != RELATIVE


def test_a_causal_4d_mask_is_one_sequence() -> None:
    mask = (COLUMNS[:, None] >= COLUMNS)[None, None]
    found = positions(adapted("baft"), input_ids=IDS, labels=LABELS, attention_mask=mask)
    assert found == (COLUMNS - PROMPT).tolist()


def test_boundaries_with_position_ids_that_begin_anew_too() -> None:
    given = {**PACKED["cu_seq_lens"], **PACKED["position_ids"]}
    assert positions(adapted("baft"), input_ids=IDS, labels=PACKED_LABELS, **given) == RELATIVE
