"""The divergence guard: it stops what went wrong, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perflow_blocks.training.guard import DivergenceError, DivergenceGuard, advice
from perflow_blocks.training.progress import WindowLosses
from tests.training.conftest import tiny_config

KEPT = "step_7 is kept"


def guard() -> DivergenceGuard:
    return DivergenceGuard("Lower it.")


def even(loss: float, updates: int) -> list[WindowLosses]:
    """Updates with rows of both windows, the second of which has a hundredth of the first one's loss."""
    return [(loss, loss / 100)] * updates


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_at_its_step(value: float) -> None:
    with pytest.raises(DivergenceError, match=rf"the loss is {value} at step 12; step_7 is kept. Lower it."):
        guard().check([1.0, 1.0, value], even(1.0, 3), [1.0, 1.0, 1.0], 10, KEPT)
    with pytest.raises(DivergenceError, match=f"the norm of the gradient is {value} at step 11"):
        guard().check([1.0, 1.0], even(1.0, 2), [1.0, value], 10, KEPT)


def test_an_explosion_stops_within_a_few_steps() -> None:
    watch = guard()
    watch.check([], even(1.0, 40), [], 1, KEPT)
    with pytest.raises(DivergenceError, match=r"exploded to 20 times the usual at step 51; step_7 is kept"):
        watch.check([], even(20.0, 20), [], 41, KEPT)


def test_a_window_alone_cannot_hide_an_explosion_nor_feign_one() -> None:
    """The rows of an update may be of any one window: only compared with its own usual loss does it say anything."""
    watch = guard()
    watch.check([], [(1.0, None), (None, 1e-4)] * 40, [], 1, KEPT)
    watch.check([], [(1.0, None)] * 40, [], 81, KEPT)  # ten thousand times the other window's
    with pytest.raises(DivergenceError):  # less than the first one's, and five hundred times its own
        watch.check([], [(None, 0.05)] * 20, [], 121, KEPT)


def test_single_jumps_falling_losses_and_windows_without_weight_do_not_stop() -> None:
    numbers, watch = random.Random(0), guard()
    for step in range(400):
        loss = numbers.choice([0.3, 1.0, 3.0]) * 0.99**step
        watch.check([loss], [(loss, 0.0)], [1.0], step, KEPT)
    watch.check([1e6] * 4, even(1e6, 4), [], 400, KEPT)


def drawn(seed: int, batch_size: int, updates: int, growth: Callable[[int], float]) -> int | None:
    """The step at which losses such as those of a demo student stop; None if they do not.

    Its windows' medians, and how far a picture's and a time's loss is from them: by a factor of e or more, either way.
    """
    medians, scatters = np.array([5e-4, 3e-4, 8e-4, 1e-2]), np.array([1.2, 1.2, 1.1, 1.9])
    numbers, watch = np.random.default_rng(seed), guard()
    for step in range(updates):
        index = numbers.integers(4, size=batch_size)
        rows = medians[index] * np.exp(scatters[index] * numbers.standard_normal(batch_size)) * growth(step)
        windows = tuple(float(rows[index == k].mean()) if (index == k).any() else None for k in range(4))
        try:
            watch.check([float(rows.mean())], [windows], [1.0], step, KEPT)
        except DivergenceError:
            return step
    return None


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sound_runs_are_never_stopped(batch_size: int) -> None:
    assert [drawn(seed, batch_size, 1000, lambda step: 1.0) for seed in (12, 32, 45)] == [None] * 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_real_explosions_are_found_soon(batch_size: int) -> None:
    for seed in range(3):
        sudden = drawn(seed, batch_size, 400, lambda step: 1.0 if step < 200 else 30.0)
        slow = drawn(seed, batch_size, 600, lambda step: 1.03 ** max(0, step - 200))
        assert sudden is not None and 200 <= sudden < 230
        assert slow is not None and 200 <= slow < 350


def test_what_came_before_a_resumption_counts() -> None:
    first = guard()
    first.check([], even(1.0, 40), [], 1, KEPT)
    with pytest.raises(DivergenceError):
        DivergenceGuard("Lower it.", first.losses).check([], even(50.0, 15), [], 41, KEPT)
    guard().check([], even(50.0, 15), [], 41, KEPT)


def test_advice_names_what_this_run_can_change(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "demo", data__resolution=64)
    plain = advice(config)
    assert "lower optimizer.learning_rate (now 0.001)" in plain and "optimizer.warmup_steps" in plain
    assert "guidance" not in plain and "bf16" not in plain and "weighting" not in plain
    other = config.changed({"teacher.cfg_mode": "fixed", "teacher.dtype": "float16", "loss.weighting": "endpoint"})
    assert all(part in advice(other) for part in ("guidance_scale (now 7.5)", "bf16", "loss.weighting='endpoint'"))
