"""The demo's training stages, each for a few steps at small size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel

from perflow_blocks.core.parameterization import window_endpoint
from perflow_blocks.demo import distill, train_teacher
from perflow_blocks.demo.conditioning import CaptionEncoder
from perflow_blocks.demo.data import RenderedPictures, render_pictures
from perflow_blocks.demo.distill import DistillationConfig, Distiller
from perflow_blocks.demo.models import build_text_encoders, build_tokenizer, build_unet
from perflow_blocks.demo.train_vae import encode_pictures, train_vae


@pytest.fixture(scope="module")
def pictures() -> RenderedPictures:
    return render_pictures(40, seed=7, workers=1)


@pytest.fixture(scope="module")
def encoder() -> CaptionEncoder:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return CaptionEncoder(tokenizer, *build_text_encoders(tokenizer))


def small_config(**changes: float) -> DistillationConfig:
    settings = {"rounds": 2, "trajectories": 4, "updates": 2, "batch_size": 4, "teacher_steps": 1, "buffer": 6}
    return DistillationConfig(**{**settings, **changes})  # type: ignore[arg-type]


def small_distiller(encoder: CaptionEncoder, **changes: float) -> Distiller:
    torch.manual_seed(1)
    return Distiller(build_unet((16, 32, 32), 1), encoder, small_config(**changes))


def test_the_autoencoder_trains_and_scales_its_latents(pictures: RenderedPictures, tmp_path: Path) -> None:
    vae = train_vae(pictures, tmp_path / "vae", steps=3, batch_size=4)
    latents = encode_pictures(vae, pictures)
    assert latents.shape == (40, 4, 16, 16)
    assert float(latents.std() * vae.config.scaling_factor) == pytest.approx(1.0, rel=1e-3)


def test_an_interrupted_teacher_goes_on_as_if_nothing_had_happened(
    pictures: RenderedPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_teacher, "_CHECKPOINT_EVERY", 2)
    latents = torch.randn(40, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def train(name: str) -> dict[str, torch.Tensor]:
        unet, _ = train_teacher.train_teacher(latents, pictures, tmp_path / name, steps=4, batch_size=2)
        return unet.state_dict()

    unbroken = train("unbroken")
    step, taken = EMAModel.step, []

    def interrupt(self: EMAModel, parameters: object) -> None:
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        step(self, parameters)

    monkeypatch.setattr(EMAModel, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train("broken")
    monkeypatch.setattr(EMAModel, "step", step)
    resumed = train("broken")
    for name, weight in unbroken.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)


def test_trajectories_chain_from_window_to_window(encoder: CaptionEncoder) -> None:
    distiller = small_distiller(encoder)
    solved = distiller.solve_trajectories(0, on_policy_share=0.0)
    assert torch.equal(solved.starts[:, 1:], solved.ends[:, :-1])
    again = distiller.solve_trajectories(0, on_policy_share=0.0)
    assert torch.equal(solved.ends, again.ends)


def test_on_policy_windows_start_where_the_student_ended(encoder: CaptionEncoder) -> None:
    distiller = small_distiller(encoder)
    solved = distiller.solve_trajectories(0, on_policy_share=1.0)
    window = distiller.window_rows(torch.zeros(4, dtype=torch.long))
    with torch.no_grad():
        output = distiller.student_output(solved.starts[:, 0], torch.full((4,), 1000.0), solved.text)
    own = window_endpoint(solved.starts[:, 0], output, window, distill.PREDICTION_TYPE)
    torch.testing.assert_close(solved.starts[:, 1], own)
    assert not torch.allclose(solved.starts[:, 1], solved.ends[:, 0])


def test_the_buffer_keeps_the_newest(encoder: CaptionEncoder) -> None:
    distiller = small_distiller(encoder)
    first, second = (distiller.solve_trajectories(index, 0.0) for index in (0, 1))
    buffer = first.append(second, limit=6)
    assert torch.equal(buffer.starts, torch.cat([first.starts[-2:], second.starts]))
    assert torch.equal(buffer.text.pooled_prompt_embeds[2:], second.text.pooled_prompt_embeds)


def test_the_students_loss_falls_and_the_teacher_stays(encoder: CaptionEncoder) -> None:
    distiller = small_distiller(encoder, batch_size=16)
    before = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    buffer = distiller.solve_trajectories(0, 0.0)
    optimizer = torch.optim.AdamW(distiller.student.parameters(), 2e-3)
    losses = []
    for _ in range(25):
        loss = distiller.loss(buffer, torch.Generator().manual_seed(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


def test_distillation_writes_a_student(encoder: CaptionEncoder, tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher = build_unet((16, 32, 32), 1)
    config = small_config(on_policy_from=0.5)
    student = distill.distill(teacher, encoder, tmp_path, config)
    assert distill.read_settings(tmp_path) == config
    assert (tmp_path / "student" / "config.json").exists()
    before = teacher.state_dict()
    kept = {name for name, weight in student.state_dict().items() if torch.equal(weight, before[name])}
    assert kept == {name for name in before if distill.is_frozen(name, config)}
    assert 0 < len(kept) < len(before)
