"""The paper's formula: what Φ is, and what its lemma and theorem say about it."""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from adapters import intervene
from peft_baft import BaftConfig
from peft_baft.adapter.parameters import Gate, OrthonormalBasis
from peft_baft.intervention import gates, orthonormal_rows, rms_normalise, update

D, RANK = 16, 4


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def formula() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h (5, D), R, A, b, and gates w (5, RANK) in float64."""
    w = torch.sigmoid(draw(5, RANK, seed=5))
    return (
        draw(5, D, seed=1),
        orthonormal_rows(draw(RANK, D, seed=2)),
        draw(RANK, D, seed=3),
        draw(RANK, seed=4),
        w,
    )


# --- R ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8), (4, 16), (8, 8)])
def test_rows_become_orthonormal_and_keep_their_span(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    R = orthonormal_rows(weight)
    identity = torch.eye(shape[0], dtype=R.dtype)
    torch.testing.assert_close(R @ R.T, identity)
    # Nothing of the rows lies outside the span of R.
    torch.testing.assert_close(weight @ R.T @ R, weight)
    assert not torch.allclose(weight @ weight.T, identity)


def test_orthonormal_rows_come_back_as_they_were() -> None:
    R = orthonormal_rows(draw(RANK, D))
    flipped = R * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    torch.testing.assert_close(orthonormal_rows(R), R)
    torch.testing.assert_close(orthonormal_rows(flipped), flipped)  # no sign is preferred


def test_the_basis_is_a_smooth_function_of_its_weight() -> None:
    assert torch.autograd.gradcheck(orthonormal_rows, draw(3, 6).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_basis_of_a_weight_of_any_precision_is_orthonormal_in_float32(
    dtype: torch.dtype,
) -> None:
    R = orthonormal_rows(draw(RANK, D, dtype=dtype))
    assert R.dtype == torch.float32
    assert (R @ R.T - torch.eye(RANK)).abs().max() < 1e-5
    if dtype != torch.float32:  # the control: a basis in that precision is not
        assert (R.to(dtype).float() @ R.to(dtype).float().T - torch.eye(RANK)).abs().max() > 1e-5


def test_a_basis_on_the_meta_device_has_a_shape() -> None:
    assert orthonormal_rows(torch.empty(RANK, D, device="meta")).shape == (RANK, D)


def test_a_fresh_basis_has_orthonormal_rows() -> None:
    basis = OrthonormalBasis(RANK, D)
    torch.testing.assert_close(basis.weight @ basis.weight.T, torch.eye(RANK))
    torch.testing.assert_close(basis(), basis.weight)


def test_without_gradients_the_basis_is_computed_once() -> None:
    basis = OrthonormalBasis(RANK, D)
    with torch.no_grad():
        assert basis() is basis()
    assert basis() is not basis() and basis().requires_grad


def test_the_cached_basis_is_never_stale() -> None:
    basis = OrthonormalBasis(RANK, D)
    changes = [
        lambda: basis.weight.mul_(torch.linspace(1, 3, D)),  # in place
        lambda: basis.load_state_dict({"weight": draw(RANK, D, seed=8).float()}),
        lambda: setattr(basis.weight, "data", draw(RANK, D, seed=9).float()),
        lambda: basis.double(),
    ]
    for change in changes:
        with torch.no_grad():
            before = basis()
            change()
            assert basis().dtype != before.dtype or not torch.allclose(basis(), before)
            torch.testing.assert_close(basis(), orthonormal_rows(basis.weight))


def test_a_training_step_renews_the_cached_basis() -> None:
    basis = OrthonormalBasis(RANK, D)
    with torch.no_grad():
        before = basis()
    (basis() * draw(RANK, D, dtype=torch.float32)).sum().backward()
    # As sharding and old optimisers do: the weight's version stays the same.
    basis.weight.data -= basis.weight.grad
    with torch.no_grad():
        assert not torch.allclose(basis(), before)


def test_the_cached_basis_is_neither_pickled_nor_copied_nor_saved() -> None:
    basis = OrthonormalBasis(RANK, D)
    with torch.no_grad():
        basis()
    assert basis._cached is not None
    assert (
        pickle.loads(pickle.dumps(basis))._cached is None and copy.deepcopy(basis)._cached is None
    )
    torch.save(basis.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert list(torch.load(file)) == ["weight"]


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_every_gate_is_between_zero_and_one(size: float) -> None:
    w = gates(draw(50, D) * size, draw(RANK, D, seed=1), draw(RANK, seed=2))
    assert (
        w.shape == (50, RANK) and w.min() >= 0 and w.max() <= 1 and w.min() < 0.1 and w.max() > 0.9
    )


def test_a_gate_is_the_logistic_function_of_a_linear_one() -> None:
    h, U, c = draw(3, D), draw(RANK, D, seed=1), draw(RANK, seed=2)
    w = gates(h, U, c, offset=-2.0)
    for i in range(3):
        for k in range(RANK):
            torch.testing.assert_close(w[i, k], 1 / (1 + torch.exp(-(U[k] @ h[i] + c[k] - 2.0))))


def test_a_shared_gate_multiplies_all_others() -> None:
    h, U = draw(3, D), draw(RANK + 1, D, seed=1)
    each = gates(h, U)
    torch.testing.assert_close(gates(h, U, shared=True), each[:, :RANK] * each[:, RANK:])


def test_a_normalised_vector_has_direction_but_no_size() -> None:
    h = draw(3, D)
    torch.testing.assert_close(
        rms_normalise(h).square().mean(-1), torch.ones(3, dtype=h.dtype), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(rms_normalise(100 * h), rms_normalise(h), atol=1e-5, rtol=0)


def test_a_vector_of_zeros_stays_zero_and_eps_adds_to_the_mean_square() -> None:
    assert rms_normalise(torch.zeros(2, D)).equal(torch.zeros(2, D))
    # 2 / √(4 + 5)
    assert rms_normalise(torch.full((4,), 2.0), eps=5.0).tolist() == pytest.approx([2 / 3] * 4)


# --- Φ ----------------------------------------------------------------------------------------------------------------


def over_basis_vectors(h: Tensor, R: Tensor, A: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Eq. 2 in plain loops: each basis vector moves h by its own gated amount."""
    moved = h.clone()
    for i in range(h.shape[0]):
        for k in range(R.shape[0]):
            moved[i] += w[i, k] * (A[k] @ h[i] + b[k] - R[k] @ h[i]) * R[k]
    return moved


def test_lemma_2_4_the_sum_over_basis_vectors_is_the_matrix_form() -> None:
    h, R, A, b, w = formula()
    torch.testing.assert_close(intervene(h, R, A, b, w), over_basis_vectors(h, R, A, b, w))
    assert not torch.allclose(intervene(h, R, A, b), over_basis_vectors(h, R, A, b, w))


def test_with_open_gates_baft_is_reft() -> None:
    h, R, A, b, w = formula()
    reft = h + (h @ A.T + b - h @ R.T) @ R
    torch.testing.assert_close(intervene(h, R, A, b), reft)
    torch.testing.assert_close(intervene(h, R, A, b, torch.ones_like(w)), reft)
    # The new coordinates are the learned ones.
    torch.testing.assert_close(intervene(h, R, A, b) @ R.T, h @ A.T + b)


def test_with_closed_gates_nothing_moves() -> None:
    h, R, A, b, w = formula()
    assert torch.equal(intervene(h, R, A, b, torch.zeros_like(w)), h)


def test_one_gate_for_the_subspace_is_the_same_gate_for_each_basis_vector() -> None:
    h, R, A, b, w = formula()
    torch.testing.assert_close(
        intervene(h, R, A, b, w[:, :1]), intervene(h, R, A, b, w[:, :1].expand(-1, RANK))
    )


def test_what_is_orthogonal_to_the_basis_is_never_changed() -> None:
    h, R, A, b, w = formula()
    outside = torch.eye(D, dtype=h.dtype) - R.T @ R
    torch.testing.assert_close(intervene(h, R, A, b, w) @ outside, h @ outside)
    skew = draw(RANK, D)  # the control: rows that are not orthonormal span another complement
    assert not torch.allclose(intervene(h, skew, A, b, w) @ outside, h @ outside)


# --- Theorem 2.3 ------------------------------------------------------------------------------------------------------


def test_theorem_2_3_a_linear_edit_that_fits_moves_the_stable_ball_and_a_gated_one_need_not() -> (
    None
):
    """A linear update cannot be large on an edit and small on a whole ball beside it.

    ReFT's shift s(h) = A h + b - R h is affine, so along a line it changes at one rate: for h_edit outside the ball of
    radius ρ around h_ir, with e the ball's point nearest to h_edit at distance g, s(e) - s(e') over the diameter e'e,
    2ρ long, is 2ρ/g times s(h_edit) - s(e). If every shift in the ball is < δ, then |s(h_edit)| < δ + 2δ g/2ρ.
    """
    radius, gap, wanted = 4.0, 1.0, 1.0  # ρ, g, and the shift ε that the edit needs
    # δ: below what the bound leaves to any linear update
    allowed = 0.9 * wanted / (1 + gap / radius)
    R, direction = orthonormal_rows(draw(1, D, seed=2)), rms_normalise(draw(D, seed=6)) / D**0.5
    h_ir = draw(D, seed=7)
    h_edit = h_ir + (radius + gap) * direction
    diameter = [h_ir + x * direction for x in torch.linspace(-radius, radius, 41, dtype=R.dtype)]
    for seed in range(300):  # any linear update, scaled to fit the edit exactly
        A, b = R + draw(1, D, seed=seed), draw(1, seed=1000 + seed)
        fit = wanted / update(h_edit @ (A - R).T + b, R).norm()
        A, b = R + (A - R) * fit, b * fit
        assert max((intervene(h, R, A, b) - h).norm() for h in diameter) > allowed
    # And the best one in the sense of least squares, the edit weighing most.
    points = torch.stack([*diameter, h_edit])
    weights = torch.tensor([*[1.0] * 41, 1e4], dtype=R.dtype)[:, None]
    columns, goal = (
        torch.cat([points, torch.ones(42, 1, dtype=R.dtype)], 1),
        torch.zeros(42, 1, dtype=R.dtype),
    )
    goal[-1] = wanted
    best = torch.linalg.lstsq(columns * weights, goal * weights, driver="gelsd").solution.T
    moved = intervene(points, R, R + best[:, :D], best[:, D]) - points
    torch.testing.assert_close(
        moved[-1].norm(), torch.tensor(wanted, dtype=R.dtype), rtol=1e-3, atol=0
    )
    assert moved[:-1].norm(dim=-1).max() > allowed

    # A gate between ball and edit.
    U, c = (
        20 * direction[None],
        -20 * (h_ir @ direction + radius + gap / 2).reshape(1),
    )
    inside = (
        torch.nn.functional.normalize(draw(2000, D, seed=8), dim=-1)
        * torch.rand(2000, 1, dtype=R.dtype)
        * radius
    )
    ball = torch.cat([h_ir + inside, torch.stack(diameter)])
    # The same constant shift for all: only the gate tells apart.
    A, b = (
        R,
        torch.tensor([1.01 * wanted], dtype=R.dtype),
    )
    assert (intervene(h_edit, R, A, b, gates(h_edit, U, c)) - h_edit).norm() >= wanted
    assert (intervene(ball, R, A, b, gates(ball, U, c)) - ball).norm(dim=-1).max() < allowed / 100


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "at_4096", "at_3072"),
    [
        ({"weighting": "none"}, 393_264, 294_960),
        ({"gate_norm": "none"}, 589_872, 442_416),
        ({"gate_norm": "rms"}, 589_872, 442_416),
        (
            {"gate_norm": "scale"},
            606_256,
            454_704,
        ),  # these three have the size that the paper states
        ({"gate_norm": "center"}, 606_256, 454_704),
        ({"weighting": "product"}, 606_256, 454_704),
    ],
    ids=str,
)
def test_four_blocks_at_rank_twelve_have_the_papers_size(
    settings: dict, at_4096: int, at_3072: int
) -> None:
    config = BaftConfig(r=12, **settings)
    for width, expected in ((4096, at_4096), (3072, at_3072)):
        with torch.device("meta"):
            parts = [OrthonormalBasis(12, width), torch.nn.Linear(width, 12)]
            parts += [Gate(config, width)] if config.gate_count else []
        assert 4 * sum(p.numel() for part in parts for p in part.parameters()) == expected
