"""Time windows, and the discrete noise schedule that continuous time reads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler

from perflow_blocks.core.noise_schedule import BETA_SCHEDULES, alpha_at, make_alphas_cumprod
from perflow_blocks.core.windows import TimeWindows, require_positive_int, tile_windows

pytestmark = pytest.mark.behaviour

UNEQUAL = TimeWindows(boundaries=(1.0, 0.9, 0.55, 0.2, 0.0))
each_layout = pytest.mark.parametrize(
    "windows", [TimeWindows.equal(4), TimeWindows.equal(3), UNEQUAL], ids=["4", "3", "unequal"]
)


@pytest.mark.parametrize("num_windows", [1, 2, 3, 7, 10, 40])
def test_equal_windows_tile_from_one_to_zero(num_windows: int) -> None:
    windows = TimeWindows.equal(num_windows)
    assert windows.num_windows == num_windows
    assert (windows.boundaries[0], windows.boundaries[-1]) == (1.0, 0.0)
    assert windows.ends[:-1] == windows.starts[1:]
    widths = [start - end for start, end in zip(windows.starts, windows.ends, strict=True)]
    assert widths == pytest.approx([1 / num_windows] * num_windows)


@each_layout
def test_every_time_lies_in_its_window(windows: TimeWindows) -> None:
    for timestep in range(1, 1001):
        k = windows.index(timestep / 1000)
        # A whole timestep never lies in the tolerance above an end without being that end (rounded down).
        assert windows.ends[k] < timestep / 1000 <= windows.starts[k] or timestep == int(windows.ends[k] * 1000)


def test_a_boundary_belongs_to_the_window_below_it() -> None:
    windows = TimeWindows.equal(4)
    assert windows.starts == (1.0, 0.75, 0.5, 0.25)  # as in the paper
    assert [windows.index(t) for t in (1.0, 0.76, 0.75, 0.74, 0.5, 0.25, 0.001)] == [0, 0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("total", [1000, 100])
def test_tolerance_just_above_a_boundary_is_a_tenth_of_a_timestep(total: int) -> None:
    windows = TimeWindows.equal(4, num_train_timesteps=total)
    assert windows.index(0.75 + 0.09 / total) == 1
    assert windows.index(0.75 + 0.11 / total) == 0


def test_times_outside_are_clamped() -> None:
    assert [UNEQUAL.index(t) for t in (7.0, 1.0001, 0.0, -3.0)] == [0, 0, 3, 3]
    assert torch.equal(UNEQUAL.index(torch.tensor([7.0, 0.0, -3.0])), torch.tensor([0, 3, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_layout
def test_batched_lookup_equals_the_scalar_one(windows: TimeWindows, dtype: torch.dtype) -> None:
    t = torch.arange(0, 1001, dtype=dtype).reshape(7, 143) / 1000
    index = windows.index(t)
    assert (index.shape, index.dtype) == (t.shape, torch.long)
    assert index.flatten().tolist() == [windows.index(k / 1000) for k in range(1001)]


def test_lookup_keeps_the_shape_of_any_tensor() -> None:
    assert torch.equal(UNEQUAL.index(torch.tensor(0.55)), torch.tensor(2))
    assert torch.equal(TimeWindows.equal(1).index(torch.rand(2, 3)), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "boundaries",
    [
        (1.0,),  # no window
        (1.0, 0.5, 0.5, 0.0),  # an empty one
        (0.0, 0.5, 1.0),  # ascending
        (1.0, 0.5, 0.4995, 0.0),  # narrower than a timestep
        (1.2, 0.5, 0.0),
        (1.0, float("nan"), 0.0),
    ],
)
def test_boundaries_that_are_no_windows(boundaries: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=rf"window_boundaries=\({boundaries[0]},"):
        TimeWindows(boundaries=boundaries)


def test_windows_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        UNEQUAL.boundaries = (1.0, 0.0)  # type: ignore[misc]
    with pytest.raises(TypeError):
        TimeWindows((1.0, 0.0))  # type: ignore[call-arg]


def test_given_boundaries_must_tile_the_whole_time() -> None:
    for boundaries in ([0.9, 0.5, 0.0], [1.0, 0.5, 0.1]):
        with pytest.raises(ValueError, match=rf"window_boundaries=\({boundaries[0]}, 0.5, {boundaries[-1]}\)"):
            tile_windows(num_windows=2, boundaries=boundaries)
    assert tile_windows(num_windows=4, boundaries=[0.9, 0.5, 0.1], t_noise=0.9, t_clean=0.1).num_windows == 2
    assert tile_windows(num_windows=4, boundaries=None) == TimeWindows.equal(4)


@pytest.mark.parametrize(
    ("num_steps", "counts"), [(4, [1, 1, 1, 1]), (5, [2, 1, 1, 1]), (7, [2, 2, 2, 1]), (8, [2, 2, 2, 2])]
)
def test_steps_are_shared_out_from_the_noisy_end(num_steps: int, counts: list[int]) -> None:
    times = UNEQUAL.distribute_steps(num_steps)
    assert [sum(UNEQUAL.index(t) == k for t in times) for k in range(4)] == counts
    assert set(UNEQUAL.starts) <= set(times)


def test_steps_inside_a_window_are_equally_spaced_and_leave_its_end_out() -> None:
    assert TimeWindows.equal(2).distribute_steps(5) == pytest.approx((1.0, 5 / 6, 4 / 6, 0.5, 0.25))
    with pytest.raises(ValueError, match=r"num_steps=3 .*num_windows=4"):
        UNEQUAL.distribute_steps(3)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
def test_counts_are_positive_integers(value: object) -> None:
    with pytest.raises(ValueError, match=f"^count={value!r} "):
        require_positive_int("count", value)
    with pytest.raises(ValueError, match=f"^num_windows={value!r} "):
        TimeWindows.equal(value)  # type: ignore[arg-type]


def test_numbers_that_would_fill_the_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="num_windows=1000000000000 must be at most num_train_timesteps=1000"):
        TimeWindows.equal(10**12)
    with pytest.raises(ValueError, match="num_train_timesteps=1000000000000 must be at most 1000000"):
        make_alphas_cumprod(num_train_timesteps=10**12)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_alphas_are_those_of_diffusers(schedule: str) -> None:
    ours = make_alphas_cumprod(beta_schedule=schedule)
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule).alphas_cumprod
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-7)
    assert bool((ours.diff() < 0).all())


def test_trained_betas_replace_the_schedule() -> None:
    alphas = make_alphas_cumprod(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.5])
    torch.testing.assert_close(alphas, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"trained_betas .*num_train_timesteps=3.* 2"):
        make_alphas_cumprod(num_train_timesteps=3, trained_betas=[0.1, 0.2])


def test_bad_schedules_are_named() -> None:
    with pytest.raises(ValueError, match=r"beta_schedule='sigmoid' .*linear, scaled_linear, squaredcos_cap_v2"):
        make_alphas_cumprod(beta_schedule="sigmoid")
    for beta_start, beta_end in ((0.1, 1.0), (0.0, 0.1), (-0.1, 0.1), (0.1, float("nan"))):
        with pytest.raises(ValueError, match=r"betas .*beta_start, beta_end"):
            make_alphas_cumprod(beta_start=beta_start, beta_end=beta_end)


def test_continuous_times_read_their_timestep_and_rounding_is_forgiven() -> None:
    index = torch.arange(1000.0)
    assert [alpha_at(index, t) for t in (1.0, 0.75, 0.001, 0.0005, 0.0)] == [999, 749, 0, 0, 0]
    assert [alpha_at(index, t) for t in (1.5, -1.0)] == [999, 0]
    assert alpha_at(index, 2 / 3) == 665
    assert alpha_at(index, 0.29) == 289  # 0.29 * 1000 is 289.99999999999994
    assert [alpha_at(index, k / 1000) for k in range(1, 1001)] == list(range(1000))
    assert [alpha_at(index, t) for t in (torch.arange(1, 1001) / 1000).tolist()] == list(range(1000))
