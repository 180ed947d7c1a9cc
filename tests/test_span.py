"""Position arithmetic, held against a slow reference that walks over one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_baft.span import (
    IGNORED_LABEL,
    OUTSIDE,
    GenerationSpan,
    edited,
    relative_positions_of_input,
)

Row = list[tuple[int, int]]  # the sequences of a row, each (prompt tokens, answer tokens)
PAIR = st.tuples(st.integers(1, 5), st.integers(1, 4))


def relative_positions_by_hand(row: Row, width: int, left: bool) -> list[int]:
    """The definition: a token's index in its own sequence minus that sequence's prompt length."""
    relative_positions = []
    for prompt, answer in row:
        for index in range(prompt + answer):
            relative_positions.append(index - prompt)
    padding = [OUTSIDE] * (width - len(relative_positions))
    return padding + relative_positions if left else relative_positions + padding


def layout(rows: list[Row], left: bool, extra: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """real, position ids, labels and the expected relative positions of a padded batch, all (rows, width)."""
    width = max(sum(p + a for p, a in row) for row in rows) + extra
    real: list[list[Any]] = []
    positions: list[list[int]] = []
    labels: list[list[int]] = []
    for row in rows:
        index = [i for p, a in row for i in range(p + a)]
        marks = [label for p, a in row for label in [IGNORED_LABEL] * p + [5] * a]
        every = (
            (real, [True] * len(index), False),
            (positions, index, 0),
            (labels, marks, IGNORED_LABEL),
        )
        for kept, values, fill in every:
            padding = [fill] * (width - len(index))
            kept.append(padding + values if left else values + padding)
    expected = torch.tensor([relative_positions_by_hand(row, width, left) for row in rows])
    return torch.tensor(real), torch.tensor(positions), torch.tensor(labels), expected


def test_an_adapter_edits_the_last_prompt_positions_and_the_answer() -> None:
    relative_positions = torch.tensor([[OUTSIDE, -4, -3, -2, -1, 0, 1]])
    assert edited(relative_positions, 3).tolist() == [[False, False, True, True, True, True, True]]
    assert edited(relative_positions, 1).tolist() == [
        [False, False, False, False, True, True, True]
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(PAIR, min_size=1, max_size=4), st.booleans(), st.integers(0, 3))
def test_labels_and_lengths_tell_the_prompt_wherever_the_padding_is(
    pairs: Row, left: bool, extra: int
) -> None:
    real, positions, labels, expected = layout([[pair] for pair in pairs], left, extra)
    lengths = torch.tensor([prompt for prompt, _ in pairs])
    for given_positions in (None, positions):
        assert relative_positions_of_input(real, labels=labels, positions=given_positions).equal(
            expected
        )
        assert relative_positions_of_input(
            real, prompt_lengths=lengths, positions=given_positions
        ).equal(expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(PAIR, min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2),
)
def test_a_packed_row_is_many_sequences(rows: list[Row], left: bool, extra: int) -> None:
    real, positions, labels, expected = layout(rows, left, extra)
    assert relative_positions_of_input(real, positions=positions, labels=labels).equal(expected)
    if any(len(row) > 1 for row in rows):  # the control: without position ids a row is one sequence
        assert not relative_positions_of_input(real, labels=labels).equal(expected)
    whole = [[(p + a, 0) for p, a in row] for row in rows]
    assert relative_positions_of_input(real, positions=positions).equal(
        layout(whole, left, extra)[3]
    )
    real, positions, _, expected = layout(rows[:1], left, extra)
    lengths = torch.tensor([prompt for prompt, _ in rows[0]])
    assert relative_positions_of_input(real, positions=positions, prompt_lengths=lengths).equal(
        expected
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(PAIR, min_size=1, max_size=3), st.integers(0, 8))
def test_a_sequence_fed_in_two_pieces_has_the_same_relative_positions(pairs: Row, cut: int) -> None:
    real, _, _, expected = layout([[pair] for pair in pairs], left=True)
    cut = min(cut, real.shape[1] - 1)
    lengths = torch.tensor([prompt for prompt, _ in pairs])
    past = real[:, :cut].sum(1, keepdim=True)
    assert relative_positions_of_input(real[:, cut:], past, prompt_lengths=lengths).equal(
        expected[:, cut:]
    )


def test_a_row_without_labels_is_all_prompt() -> None:
    real = torch.ones(2, 4, dtype=torch.bool)
    labels = torch.tensor([[-100, -100, 7, 7], [-100, -100, -100, -100]])
    assert relative_positions_of_input(real, labels=labels).tolist() == [
        [-2, -1, 0, 1],
        [-4, -3, -2, -1],
    ]


def test_tokens_after_the_first_label_belong_to_the_answer_as_in_a_chat_of_many_turns() -> None:
    labels = torch.tensor([[-100, 7, 7, -100, -100, 7]])
    assert relative_positions_of_input(
        torch.ones(1, 6, dtype=torch.bool), labels=labels
    ).tolist() == [[-1, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    "past", [1, torch.tensor(1), torch.tensor([[1], [2]])], ids=["int", "0-d", "per row"]
)
def test_with_a_filled_cache_every_new_token_is_an_answer_token(past: int | Tensor) -> None:
    real = torch.ones(2, 3, dtype=torch.bool)
    assert (relative_positions_of_input(real, past) >= 0).all()
    # The control: an empty cache.
    assert relative_positions_of_input(real).tolist() == [[-3, -2, -1]] * 2


def test_prompt_lengths_outrank_labels() -> None:
    real, labels = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[-100, 7, 7, 7]])
    assert relative_positions_of_input(
        real, labels=labels, prompt_lengths=torch.tensor([3])
    ).tolist() == [[-3, -2, -1, 0]]


def test_lengths_of_fewer_rows_are_those_before_beams() -> None:
    real = torch.ones(6, 3, dtype=torch.bool)
    assert relative_positions_of_input(real, prompt_lengths=torch.tensor([1, 2]))[
        :, 0
    ].tolist() == [
        -1,
        -1,
        -1,
        -2,
        -2,
        -2,
    ]


@pytest.mark.parametrize("given_lengths", [[], [1, 2, 3], [1] * 8])
def test_lengths_that_fit_nothing_are_refused(given_lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"4 rows came with {len(given_lengths)}"):
        relative_positions_of_input(
            torch.ones(4, 3, dtype=torch.bool),
            prompt_lengths=torch.tensor(given_lengths, dtype=torch.long),
        )


# --- generate ---------------------------------------------------------------------------------------------------------


def generated_by_hand(rows: Row, columns: int, left: bool, beams: int) -> Tensor:
    """Relative positions of all columns of a generation: padded prompts, then as many answer tokens as there are columns left."""
    width, expected = max(prompt for prompt, _ in rows), []
    for prompt, _ in rows:
        relative_positions = relative_positions_by_hand([(prompt, 0)], width, left) + list(
            range(columns - width)
        )
        expected += [relative_positions] * beams
    return torch.tensor(expected)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(PAIR, min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 9),
    st.booleans(),
)
def test_a_span_knows_every_window_of_a_generation(
    rows: Row, left: bool, beams: int, past: int, tensor: bool
) -> None:
    real = layout([[(prompt, 0)] for prompt, _ in rows], left)[0]
    columns = real.shape[1] + 4
    past = min(past, columns - 1)
    expected = generated_by_hand(rows, columns, left, beams)
    span = GenerationSpan.from_prompt(real)
    for tokens in (1, columns - past):
        given_past = torch.tensor(past) if tensor else past
        assert span.relative_positions(given_past, len(rows) * beams, tokens).equal(
            expected[:, past : past + tokens]
        )


@pytest.mark.parametrize("left", [True, False])
def test_a_stated_length_moves_the_end_of_the_prompt(left: bool) -> None:
    real, _, _, expected = layout([[(2, 3)], [(1, 2)]], left)
    span = GenerationSpan.from_prompt(real, prompt_lengths=torch.tensor([2, 1]))
    assert span.relative_positions(0, 2, 5).equal(expected)
    answer = torch.tensor([[3], [2]])  # the next token goes on where the row's own tokens ended
    assert span.relative_positions(5, 2, 1).equal(answer)


def test_of_a_continued_chat_everything_after_the_cache_is_answer() -> None:
    real = torch.ones(1, 6, dtype=torch.bool)
    assert GenerationSpan.from_prompt(real, cached=4).relative_positions(4, 1, 3).tolist() == [
        [0, 1, 2]
    ]
    assert GenerationSpan.from_prompt(real).relative_positions(4, 1, 3).tolist() == [[-2, -1, 0]]
    stated = GenerationSpan.from_prompt(real, cached=4, prompt_lengths=torch.tensor([5]))
    assert stated.relative_positions(4, 1, 3).tolist() == [[-1, 0, 1]]


def test_rows_that_are_no_multiple_of_the_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts, but the model was called on 3 rows"):
        GenerationSpan.from_prompt(torch.ones(2, 4, dtype=torch.bool)).relative_positions(0, 3, 1)
