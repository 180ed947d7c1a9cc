"""Which prompt lengths are taken, and which are refused before anything is computed with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_baft.span import integer_lengths

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
NO_INTEGERS = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.bool,
]


@pytest.mark.parametrize(
    "lengths",
    [[3, 0, 5], (3, 0, 5), *(torch.tensor([3, 0, 5], dtype=t) for t in INTEGERS)],
    ids=str,
)
def test_integers_of_any_kind_become_long(lengths: Any) -> None:
    taken = integer_lengths(lengths)
    assert taken.dtype == torch.long and taken.tolist() == [3, 0, 5]


@pytest.mark.parametrize("dtype", NO_INTEGERS, ids=str)
def test_a_tensor_of_another_kind_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="prompt_lengths must be integers, one per sequence"):
        integer_lengths(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("lengths", [[3.0, 2.0], [3, 2.5], [True, False], [3j], 2.0, True], ids=str)
def test_numbers_that_only_look_like_integers_are_refused(lengths: Any) -> None:
    """3.0 and True have an integer value: whoever passes them has mistaken a mask or a score for lengths."""
    with pytest.raises(TypeError, match="prompt_lengths must be integers, one per sequence"):
        integer_lengths(lengths)


def test_a_negative_length_is_refused_and_zero_is_not() -> None:
    assert integer_lengths([0]).tolist() == [0]
    with pytest.raises(ValueError, match=r"0 or more, not \[2, -1\]"):
        integer_lengths([2, -1])


def test_one_number_is_the_length_of_one_sequence() -> None:
    lengths: Any = 4
    assert integer_lengths(lengths).tolist() == [4]
