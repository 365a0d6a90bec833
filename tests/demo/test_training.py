"""The demo's training stages, each for a few steps at small size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel

from perflow_blocks.demo import train_teacher
from perflow_blocks.demo.data import RenderedPictures, render_pictures
from perflow_blocks.demo.train_vae import encode_pictures, train_vae


@pytest.fixture(scope="module")
def pictures() -> RenderedPictures:
    return render_pictures(40, seed=7, workers=1)


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
