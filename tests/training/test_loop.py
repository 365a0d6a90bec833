"""The loop on tiny teachers: both families, both students, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from perflow_blocks import PeRFlowScheduler, extract_delta, merge_delta
from perflow_blocks.delta.files import read_recipe
from perflow_blocks.testing.tiny import BETAS, tiny_sd_components, tiny_sdxl_components
from perflow_blocks.training.checkpoints import list_checkpoints
from perflow_blocks.training.loop import DivergenceError, Observer, Progress, Session, TrainingRun, train
from perflow_blocks.training.pairs import distillation_step
from perflow_blocks.training.teacher import Teacher
from tests.conftest import no_host_reads
from tests.training.conftest import losses, save_teacher, tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def teachers(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    v = DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, prediction_type="v_prediction")
    return {**teachers, "v": save_teacher(tmp_path_factory.mktemp("teachers") / "v", "sd", v)}


def unet(family: str) -> UNet2DConditionModel:
    return (tiny_sdxl_components() if family == "sdxl" else tiny_sd_components())["unet"]


def student_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "diffusion_pytorch_model.safetensors")


class Watches(Observer):
    def __init__(self) -> None:
        self.progress: list[Progress] = []

    def started(self, session: Session, step: int) -> None:
        self.session, self.steps = session, [step]

    def updated(self, session: Session, step: int) -> None:
        self.steps.append(step)

    def read(self, progress: Progress) -> None:
        self.progress.append(progress)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sdxl", {"windows__zero_snr_start": "true", "windows__times": "discrete"}),
        ("sdxl", {"teacher__starts": "trajectory", "teacher__on_policy_share": 0.5, "teacher__cfg_mode": "fixed"}),
        ("sd", {"windows__prediction_type": "diff_eps", "loss__kind": "huber"}),
        ("sd", {"windows__prediction_type": "velocity", "teacher__starts": "trajectory", "data__kind": "prompts"}),
        ("v", {"windows__prediction_type": "velocity", "windows__window_boundaries": "[1, 0.7, 0.3, 0]"}),
    ],
)
def test_full_students_of_every_kind_of_teacher(
    family: str, settings: dict[str, Any], teachers: dict[str, Path], tmp_path: Path
) -> None:
    if settings.get("data__kind") == "prompts":
        (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
        settings = {**settings, "data__path": tmp_path / "prompts.txt", "data__max_samples": "null"}
    watch, run = Watches(), tmp_path / "run"
    config = tiny_config(tmp_path, teachers[family], optimizer__max_steps=3, **settings)
    train(config, [watch])
    assert watch.steps == [0, 1, 2, 3] and len(losses(run)) == 3
    base, student = unet("sdxl" if family == "sdxl" else "sd"), student_of(run)
    assert any(tensor.any() for tensor in extract_delta(student, base).values())
    merge_delta(base, run / "delta.safetensors")
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, student[name], rtol=1e-2, atol=1e-3)
    recipe = read_recipe(run / "delta.safetensors")
    scheduler = PeRFlowScheduler.from_pretrained(run / "scheduler")
    assert recipe.prediction_type == scheduler.config.prediction_type == config.windows.prediction_type
    assert recipe.num_time_windows == scheduler.config.num_time_windows == config.windows.tile().num_windows
    assert recipe.window_boundaries == config.windows.window_boundaries
    assert (recipe.guidance_scale == 1.0) == (config.teacher.cfg_mode == "fixed")
    assert recipe.base_model == teachers[family].name
    assert recipe.noise_schedule() == {"num_train_timesteps": 1000, **BETAS}


def test_frozen_weights_stay_and_are_no_part_of_the_delta(teachers: dict[str, Path], tmp_path: Path) -> None:
    frozen = '["*transformer_blocks*", "conv_in.*"]'
    train(tiny_config(tmp_path, teachers["sdxl"], model__frozen=frozen))
    first, student = unet("sdxl").state_dict(), student_of(tmp_path / "run")
    kept = {name for name in first if "transformer_blocks" in name or name.startswith("conv_in.")}
    assert all(torch.equal(student[name], tensor) == (name in kept) for name, tensor in first.items())
    with safe_open(tmp_path / "run" / "delta.safetensors", "pt") as opened:
        assert set(opened.keys()) == first.keys() - kept and len(kept) > 10


def test_a_lora_student_is_its_delta(teachers: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model__student": "lora", "model__lora_rank": 4, "output__delta_dtype": "float32"}
    train(tiny_config(tmp_path, teachers["sdxl"], optimizer__learning_rate=0.05, **settings))
    run = tmp_path / "run"
    names = set(load_file(list_checkpoints(run)[-1] / "student.safetensors"))
    assert names and all(".lora_" in name for name in names) and not (run / "student").exists()
    by_delta, by_lora, before = unet("sdxl"), unet("sdxl"), unet("sdxl").state_dict()
    merge_delta(by_delta, run / "delta.safetensors")
    by_lora.load_lora_adapter(load_file(run / "lora.safetensors"), prefix="unet", adapter_name="x")
    by_lora.fuse_lora()
    by_lora.unload_lora()
    for name, tensor in by_lora.state_dict().items():
        torch.testing.assert_close(by_delta.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in by_lora.state_dict().items()) > 20
    with safe_open(run / "lora.safetensors", "pt") as opened:
        assert opened.metadata()["perflow.prediction_type"] == "ddim_eps"


def test_a_lora_s_frozen_weights_are_the_teacher_without_its_factors(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    session = Session(tiny_config(tmp_path, teachers["sdxl"], model__student="lora"))
    shared, source = session.teacher, session.source
    assert shared.unet is session.accelerator.unwrap_model(session.student)
    with torch.no_grad():
        for factor in session.trained.values():
            factor.add_(0.1)
    apart = Teacher(source.load_unet(), source.scheduler(), shared.encoder, shared.geometry, shared.config)
    pairs = session.pairs.next(0, 0.0, session.student)
    window = session.geometry.rows(pairs.index)
    torch.testing.assert_close(apart.solve(pairs.z_start, window, pairs.conditioning), pairs.z_end)
    drawn = distillation_step(session.student, pairs, session.geometry, session.config.loss)
    assert drawn.loss.requires_grad and all(factor.requires_grad for factor in session.trained.values())


def test_progress_says_what_happened(teachers: dict[str, Path], tmp_path: Path) -> None:
    watch = Watches()
    settings: dict[str, Any] = {"optimizer__batch_size": 4, "output__tracker": "tensorboard"}
    train(tiny_config(tmp_path, teachers["sd"], **settings), [watch])
    assert [p.step for p in watch.progress] == [2, 3, 4, 6]
    last = watch.progress[-1]
    assert last.loss == pytest.approx(sum(last.losses) / 2) and last.eta_seconds == 0.0
    assert last.samples_per_second > 0 and all(norm > 0 for norm in last.gradient_norms)
    text = last.describe()
    assert text.startswith("step 6/6  loss ") and text.endswith("ETA 0:00:00") and "samples/s" in text
    # Without weights the losses of the windows make up the loss.
    kept = [loss for loss in last.window_losses if loss is not None]
    assert min(kept) <= last.loss <= max(kept)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_the_averages_are_the_result(teachers: dict[str, Path], tmp_path: Path) -> None:
    watch = Watches()
    train(tiny_config(tmp_path, teachers["sd"], "ema", optimizer__ema_decay=0.5), [watch])
    train(tiny_config(tmp_path, teachers["sd"], "none", optimizer__ema_decay=0))
    assert losses(tmp_path / "ema") == losses(tmp_path / "none") and watch.session.ema is not None
    saved = student_of(tmp_path / "ema")
    for name, average in zip(watch.session.trained, watch.session.ema.shadow_params, strict=True):
        assert torch.equal(saved[name], average)
    assert not torch.equal(saved["conv_in.weight"], student_of(tmp_path / "none")["conv_in.weight"])


def test_accumulated_micro_steps_are_one_batch(teachers: dict[str, Path], tmp_path: Path) -> None:
    """The update of two micro-steps has the mean of their gradients: its norm and loss are those of both together."""
    settings: dict[str, Any] = {"optimizer__gradient_accumulation_steps": 2, "optimizer__seed": 3}
    run = TrainingRun(Session(tiny_config(tmp_path, teachers["sd"], **settings)))
    run.update()
    progress = run.read()
    session = Session(tiny_config(tmp_path, teachers["sd"], **settings))
    total = torch.zeros(())
    for number in range(2):
        pairs = session.pairs.next(number, 0.0, session.student)
        total = total + distillation_step(session.student, pairs, session.geometry, session.config.loss).loss / 2
    total.backward()
    norm = nn.utils.get_total_norm([p.grad for p in session.trained.values() if p.grad is not None])
    assert progress.gradient_norms == pytest.approx([float(norm)], rel=1e-4)
    assert progress.losses == pytest.approx([total.item()], rel=1e-4)


@pytest.mark.parametrize("starts", ["noised", "trajectory"])
def test_an_update_reads_nothing_from_the_device(
    starts: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The solver looks at times that lie on the host, which on this machine they all do; so do the counts of AdamW.
    monkeypatch.setattr("perflow_blocks.schedulers.pfode_solver._check_times", lambda *times: None)
    monkeypatch.setattr("accelerate.optimizer.AcceleratedOptimizer.step", lambda self, closure=None: None)
    session = Session(tiny_config(tmp_path, teachers["sdxl"], teacher__starts=starts, loss__weighting="endpoint"))
    session.pairs.batches = iter([next(session.pairs.batches)] * 4)
    run = TrainingRun(session)
    run.update()  # from here on embeddings are kept
    with no_host_reads(methods=False):
        for _ in range(2):
            run.update()
        with pytest.raises(AssertionError, match="reads from the device"):
            run.read().losses[0] + torch.ones(()).item()


def test_memory_savers_and_half_precision_stay_near(teachers: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config(tmp_path, teachers["sdxl"], "plain", optimizer__max_steps=2))
    settings: dict[str, Any] = {"optimizer__gradient_checkpointing": "true", "optimizer__channels_last": "true"}
    settings |= {"teacher__offload": "all", "teacher__text_cache": 0}
    train(tiny_config(tmp_path, teachers["sdxl"], "saving", optimizer__max_steps=2, **settings))
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "saving") == pytest.approx(plain, rel=1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"optimizer__mixed_precision": "bf16", "teacher__dtype": "bfloat16"}
    train(tiny_config(tmp_path, teachers["sdxl"], "half", optimizer__max_steps=2, **settings))
    assert losses(tmp_path / "half") == pytest.approx(plain, rel=0.2) and losses(tmp_path / "half") != plain


def test_repeated_blocks_of_both_unets_are_compiled(teachers: dict[str, Path], tmp_path: Path) -> None:
    session = Session(tiny_config(tmp_path, teachers["sdxl"], optimizer__compile="true"))
    for model in (session.accelerator.unwrap_model(session.student), session.teacher.unet):
        blocks = [m for m in model.modules() if type(m).__name__ == "BasicTransformerBlock"]
        assert blocks and all(block._compiled_call_impl is not None for block in blocks)
        assert model._compiled_call_impl is None


def test_a_diverging_run_stops_and_keeps_its_checkpoint(teachers: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer__max_steps": 40, "optimizer__max_grad_norm": 1e9}
    train(tiny_config(tmp_path, teachers["sd"]))
    settings["output__resume"] = "latest"
    for rate in (1e18, 1e3):  # to infinity, and to losses that are only large
        with pytest.raises(DivergenceError, match=r"step_00000006 is kept. To go on, lower optimizer.learning_rate"):
            train(tiny_config(tmp_path, teachers["sd"], optimizer__learning_rate=rate, **settings))
    kept = list_checkpoints(tmp_path / "run")[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "student.safetensors").values())
