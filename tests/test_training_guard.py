"""The divergence guard: it stops what went wrong, and nothing else."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from perflow_blocks.training.guard import DivergenceError, DivergenceGuard, advice

from .training_support import tiny_config

KEPT = "step_7 is kept"


def guard() -> DivergenceGuard:
    return DivergenceGuard("Lower it.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_at_its_step(value: float) -> None:
    with pytest.raises(DivergenceError, match=rf"the loss is {value} at step 12; step_7 is kept. Lower it."):
        guard().check([1.0, 1.0, value], [1.0, 1.0, 1.0], 10, KEPT)
    with pytest.raises(DivergenceError, match=f"the norm of the gradient is {value} at step 11"):
        guard().check([1.0, 1.0], [1.0, value], 10, KEPT)


def test_an_explosion_stops_within_a_few_steps() -> None:
    watch = guard()
    watch.check([1.0] * 40, [], 1, KEPT)
    with pytest.raises(DivergenceError, match=r"exploded to 10.5 at step 45, from 1"):
        watch.check([20.0] * 10, [], 41, KEPT)


def test_single_jumps_and_falling_losses_do_not_stop() -> None:
    numbers, watch = random.Random(0), guard()
    for step in range(400):  # losses that differ by windows, by a factor of a thousand, and fall
        watch.check([numbers.choice([0.001, 0.01, 0.1, 1.0]) * 0.99**step], [1.0], step, KEPT)
    watch.check([1e6, 1e6], [], 400, KEPT)


def test_what_came_before_a_resumption_counts() -> None:
    first = guard()
    first.check([1.0] * 30, [], 1, KEPT)
    with pytest.raises(DivergenceError):
        DivergenceGuard("Lower it.", first.losses).check([50.0] * 10, [], 31, KEPT)
    guard().check([50.0] * 10, [], 31, KEPT)


def test_advice_names_what_this_run_can_change(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "demo", data__resolution=64)
    plain = advice(config)
    assert "lower optimizer.learning_rate (now 0.001)" in plain and "optimizer.warmup_steps" in plain
    assert "guidance" not in plain and "bf16" not in plain and "weighting" not in plain
    other = dataclasses.replace(
        config,
        teacher=dataclasses.replace(config.teacher, cfg_mode="fixed", dtype="float16"),
        loss=dataclasses.replace(config.loss, weighting="endpoint"),
    )
    assert all(part in advice(other) for part in ("guidance_scale (now 7.5)", "bf16", "loss.weighting='endpoint'"))
