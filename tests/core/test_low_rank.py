"""The truncated singular value decomposition behind LoRA: as good as any of its rank, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perflow_blocks.core.low_rank import (
    Spectrum,
    balanced_factors,
    kept_energy,
    leading_spectrum,
    numerical_rank,
    rank_for_energy,
    squared_error,
)


def matrix_with(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix of the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator))
    return (left * values) @ right.mT


def decay(count: int) -> Tensor:
    return torch.arange(1, count + 1) ** -1.0


# With rank 8 the last two are sketched: their smaller side is above 4 times 24.
shapes = pytest.mark.parametrize(("rows", "columns"), [(12, 40), (40, 12), (150, 130), (120, 500)])


@shapes
def test_the_error_is_that_of_the_best_approximation(rows: int, columns: int) -> None:
    values, rank = decay(min(rows, columns)), 8
    matrix = matrix_with(values, rows, columns)
    spectrum = leading_spectrum(matrix, rank)
    factors = balanced_factors(spectrum, rank)
    assert factors.up.shape == (rows, rank) and factors.down.shape == (rank, columns)
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1))
    best = float(values[rank:].double().square().sum())
    assert squared_error(matrix, factors) == pytest.approx(best, rel=2e-3)
    torch.testing.assert_close(spectrum.values, values[:rank].double(), rtol=2e-3, atol=0)
    assert spectrum.squared_norm == pytest.approx(float(values.double().square().sum()), rel=1e-5)
    assert kept_energy(spectrum, rank) == pytest.approx(1 - best / spectrum.squared_norm, abs=1e-4)


def test_a_sketch_is_repeatable_and_leaves_the_random_state_alone() -> None:
    matrix = matrix_with(decay(100), 150, 130)
    state = torch.get_rng_state()
    one = leading_spectrum(matrix, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(17)
    assert torch.equal(leading_spectrum(matrix, 8).left, one.left)


def spectrum_of(*values: float) -> Spectrum:
    diagonal = torch.tensor(values)
    return leading_spectrum(torch.diag(diagonal), len(values))


@pytest.mark.parametrize(("energy", "rank"), [(0.1, 1), (16 / 25, 1), (0.65, 2), (24 / 25, 2), (0.961, 3), (1.0, 3)])
def test_the_least_rank_that_keeps_the_energy(energy: float, rank: int) -> None:
    spectrum = spectrum_of(4.0, 8**0.5, 1.0)
    assert rank_for_energy(spectrum, energy - 1e-6) == rank
    assert kept_energy(spectrum, rank) >= energy - 1e-6


@pytest.mark.parametrize("smallest", [1e-3, 3e-4, 1e-4])
def test_all_energy_is_every_value_above_rounding(smallest: float) -> None:
    """A value whose square is below the rounding of the sum of all squares is kept too."""
    for seed in range(5):
        values = torch.tensor([*([1.0] * 31), smallest])
        matrix = matrix_with(values, 32, 32, seed)
        spectrum = leading_spectrum(matrix, 32)
        assert rank_for_energy(spectrum, 1.0) == 32
        assert squared_error(matrix, balanced_factors(spectrum, 32)) < 1e-10
        assert rank_for_energy(spectrum, 1 - 1e-4) == 31


def test_rounding_has_no_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(40, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    spectrum = leading_spectrum(product, 30)
    assert len(spectrum.values) == 30
    assert numerical_rank(spectrum) == 2
    assert rank_for_energy(spectrum, 1.0) == 2
    nothing = leading_spectrum(torch.zeros(5, 4), 4)
    assert numerical_rank(nothing) == 0 and rank_for_energy(nothing, 0.5) == 0 and kept_energy(nothing, 0) == 1.0


def test_energy_counts_what_the_spectrum_leaves_out() -> None:
    spectrum = leading_spectrum(torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])), 2)
    assert kept_energy(spectrum, 2) == pytest.approx(5 / 8)
    assert rank_for_energy(spectrum, 0.45) == 1 and rank_for_energy(spectrum, 0.55) == 2
    assert rank_for_energy(spectrum, 0.9) == 2  # no more than there are values
