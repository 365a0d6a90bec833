"""Where windows start: noised images, and trajectories whose windows follow on each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from perflow_blocks.core.distillation import window_endpoint
from perflow_blocks.testing.tiny import tiny_vae
from perflow_blocks.training.buckets import TrainingBatch
from perflow_blocks.training.config import WindowConfig
from perflow_blocks.training.pairs import NoisedStarts, TrajectoryStarts, generator_for
from perflow_blocks.training.teacher import LatentEncoder
from tests.conftest import no_host_reads
from tests.training.conftest import PointTeacher, toy_teacher

CPU = torch.device("cpu")


def batches(count: int = 64, rows: int = 4, side: int = 16, *, images: bool = True) -> Iterator[TrainingBatch]:
    """Prompts are numbers, counted up; from the third batch on images are twice as wide."""
    for number in range(count):
        size = (side, side if number < 2 else 2 * side)
        generator = torch.Generator().manual_seed(number)
        yield TrainingBatch(
            prompts=[str(number * rows + row) for row in range(rows)],
            pixels=torch.rand(rows, 3, *size, generator=generator) * 2 - 1 if images else None,
            original_sizes=[size] * rows,
            crop_tops_lefts=[(0, 0)] * rows,
            target_sizes=[size] * rows,
        )


def student(sample: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
    """One whose windows end far from the teacher's."""
    return (sample * 0.0 - 3.0,)


def noised(windows: WindowConfig | None = None, dropout: float = 0.0, index: int = 0, **settings: Any) -> NoisedStarts:
    return NoisedStarts(
        teacher=toy_teacher(PointTeacher(), windows, steps_per_window=2),
        latents=LatentEncoder(tiny_vae(), CPU),
        batches=batches(**settings),
        seed=0,
        process_index=index,
        caption_dropout=dropout,
    )


def trajectories(
    share: float = 0.0, *, dropout: float = 0.0, index: int = 0, rows: int = 4, **settings: Any
) -> TrajectoryStarts:
    teacher = toy_teacher(
        PointTeacher(), steps_per_window=2, starts="trajectory", on_policy_share=share, on_policy_from=0.5, **settings
    )
    return TrajectoryStarts(
        teacher=teacher,
        batches=batches(rows=rows, images=False),
        channels=4,
        vae_factor=2,
        device=CPU,
        batch_size=6,
        seed=0,
        process_index=index,
        caption_dropout=dropout,
    )


def test_noised_starts_are_marginals_of_the_images() -> None:
    """Over all seeds the mean of z_s / sqrt(abar) is the image's latent, and the noise has a variance of one."""
    source = noised(count=64, rows=16)
    latents = LatentEncoder(tiny_vae(), CPU)
    for batch, number in zip(batches(count=64, rows=16), range(64), strict=True):
        assert batch.pixels is not None
        pairs = source.next(number, 0.0, student)
        generator = generator_for(0, 0, number)
        x0 = latents.encode(batch.pixels, generator)
        window = source.teacher.geometry.rows(pairs.index)
        alpha = torch.as_tensor(window.alpha_start)[:, None, None, None]
        noise = (pairs.z_start - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        torch.testing.assert_close(noise, torch.randn(x0.shape, generator=generator), rtol=1e-3, atol=1e-3)
        assert pairs.conditioning.prompt_embeds.flatten().tolist() == [float(p) for p in batch.prompts]
        if number == 8:
            break
    assert set(pairs.index.tolist()) == {0, 1, 2, 3}


def test_zero_snr_starts_are_pure_noise_in_the_first_window_alone() -> None:
    plain, zero = (
        noised(WindowConfig(zero_snr_start=value), rows=16).next(0, 0.0, student) for value in (False, True)
    )
    first = plain.index == 0
    assert 0 < int(first.sum()) < 16 and torch.equal(plain.z_start[~first], zero.z_start[~first])
    generator = generator_for(0, 0, 0)
    torch.randn(16, 4, 8, 8, generator=generator)  # what the VAE draws
    noise = torch.randn(16, 4, 8, 8, generator=generator)
    assert torch.equal(zero.z_start[first], noise[first])
    assert not torch.equal(plain.z_start[first], noise[first])


def test_dropped_captions_are_dropped_for_teacher_and_student() -> None:
    source = noised(dropout=0.5, rows=16)
    pairs = source.next(0, 0.0, student)
    seen = pairs.conditioning.prompt_embeds.flatten()
    assert 2 < int((seen == 0).sum()) < 14
    unet: Any = source.teacher.unet
    assert torch.equal(unet.calls[0][1], seen)


def test_each_window_of_a_trajectory_starts_where_the_last_one_ended() -> None:
    source = trajectories()
    source.next(0, 0.0, student)
    rows = list(source.buffer)
    assert len(rows) == 4 and rows[0].starts.shape == (4, 4, 8, 8)
    for row in rows:
        assert torch.equal(row.starts[1:], row.ends[:-1])
    noise = torch.stack([row.starts[0] for row in rows])
    assert abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1.0, abs=0.1)
    # The toy's data is 0.5 plus the prompt's number, which the last window all but reaches.
    assert float(rows[1].ends[-1].mean()) == pytest.approx(1.5, abs=0.05)


def test_on_policy_windows_start_where_the_student_ended() -> None:
    early, late = trajectories(share=1.0), trajectories(share=1.0)
    early.next(0, 0.4, student)
    late.next(0, 0.6, student)
    geometry = late.teacher.geometry
    for row in early.buffer:
        assert torch.equal(row.starts[1:], row.ends[:-1])
    for row in late.buffer:
        window = geometry.rows(torch.arange(3))
        own = window_endpoint(row.starts[:3], torch.full((3, 4, 8, 8), -3.0), window, "ddim_eps")
        torch.testing.assert_close(row.starts[1:], own)
        assert not torch.allclose(row.starts[1:], row.ends[:-1])


def test_new_trajectories_come_every_so_many_steps_and_old_ones_go() -> None:
    source = trajectories(solve_every=3, buffer_size=8)
    prompts = []
    for number in range(7):
        source.next(number, 0.0, student)
        prompts.append([row.prompt for row in source.buffer])
    assert [len(row) for row in prompts] == [4, 4, 4, 8, 8, 8, 8]
    assert prompts[-1] == [str(i) for i in range(4, 12)]


def test_pairs_are_drawn_with_the_prompt_of_their_trajectory_and_one_size() -> None:
    source = trajectories(solve_every=1, buffer_size=16)
    widths = set()
    for number in range(8):
        pairs = source.next(number, 0.0, student)
        widths.add(pairs.z_start.shape[-1])
        for z_start, z_end, index, prompt in zip(
            pairs.z_start, pairs.z_end, pairs.index, pairs.conditioning.prompt_embeds.flatten(), strict=True
        ):
            row = next(row for row in source.buffer if row.prompt == str(int(prompt)))
            assert torch.equal(z_start, row.starts[index]) and torch.equal(z_end, row.ends[index])
    assert widths == {8, 16}


@pytest.mark.parametrize("kind", ["noised", "trajectory"])
def test_nothing_is_read_from_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It looks at times that lie on the host, which on this machine they all do.
    monkeypatch.setattr("perflow_blocks.schedulers.pfode_solver._check_times", lambda *times: None)
    source = noised() if kind == "noised" else trajectories(share=0.5)
    with no_host_reads(methods=False):
        for number in range(3):
            source.next(number, 0.9, student)
