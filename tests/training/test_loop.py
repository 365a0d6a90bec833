"""The loop on tiny teachers: both families, both students, what it writes, and that it goes on exactly."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from perflow_blocks import PeRFlowScheduler, extract_delta, merge_delta
from perflow_blocks.delta.files import read_recipe
from perflow_blocks.testing.tiny import BETAS, tiny_sd_components, tiny_sdxl_components
from perflow_blocks.training.checkpoints import list_checkpoints
from perflow_blocks.training.guard import DivergenceError
from perflow_blocks.training.loop import Observer, _Run, train
from perflow_blocks.training.progress import Progress
from perflow_blocks.training.result import TrainingResult
from perflow_blocks.training.session import Session, open_session
from perflow_blocks.training.step import distillation_step
from tests.conftest import no_host_reads
from tests.training.conftest import save_teacher, tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def teachers(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    v = DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, prediction_type="v_prediction")
    return {**teachers, "v": save_teacher(tmp_path_factory.mktemp("teachers") / "v", "sd", v)}


def losses(folder: Path) -> list[float]:
    return [
        loss for line in (folder / "metrics.jsonl").read_text().splitlines() for loss in json.loads(line)["losses"]
    ]


def unet(family: str) -> UNet2DConditionModel:
    return (tiny_sdxl_components() if family == "sdxl" else tiny_sd_components())["unet"]


class Broken(BaseException):
    """Stands for a kill, after which nothing can be saved."""


class BreaksAt(Observer):
    def __init__(self, step: int) -> None:
        self.step = step

    def updated(self, session: Session, step: int) -> None:
        if step == self.step:
            raise Broken


class Watches(Observer):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.progress: list[Progress] = []
        self.session: Session | None = None
        self.from_step = -1

    def started(self, session: Session, step: int) -> None:
        self.session, self.from_step = session, step

    def updated(self, session: Session, step: int) -> None:
        self.steps.append(step)

    def read(self, progress: Progress) -> None:
        self.progress.append(progress)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sdxl", {"windows__zero_snr_start": "true", "windows__times": "discrete"}),
        ("sdxl", {"teacher__starts": "trajectory", "teacher__on_policy_share": 0.5, "teacher__cfg_mode": "fixed"}),
        ("sd", {"windows__prediction_type": "diff_eps", "teacher__latent_cache": 10, "loss__kind": "huber"}),
        ("sd", {"windows__prediction_type": "velocity", "teacher__starts": "trajectory", "data__kind": "prompts"}),
        ("v", {"windows__prediction_type": "velocity", "windows__window_boundaries": "[1, 0.7, 0.3, 0]"}),
    ],
)
def test_full_students_of_every_kind_of_teacher(
    family: str, settings: dict[str, Any], teachers: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    if settings.get("data__kind") == "prompts":
        settings = {**settings, "data__path": tmp_path / "prompts.txt"}
    watch = Watches()
    config = tiny_config(tmp_path, teachers[family], optimizer__max_steps=3, **settings)
    result = train(config, [watch])
    assert watch.steps == [1, 2, 3] and len(losses(result.directory)) == 3
    assert result.student is not None and result.lora is None
    base = unet("sdxl" if family == "sdxl" else "sd")
    student = UNet2DConditionModel.from_pretrained(result.student)
    delta = extract_delta(student, base)
    assert any(tensor.any() for tensor in delta.values())
    merge_delta(base, result.delta)
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, student.state_dict()[name], rtol=1e-2, atol=1e-3)
    recipe = read_recipe(result.delta)
    scheduler = PeRFlowScheduler.from_pretrained(result.scheduler)
    assert recipe.prediction_type == scheduler.config.prediction_type == config.windows.prediction_type
    assert recipe.num_time_windows == scheduler.config.num_time_windows == config.windows.tile().num_windows
    assert recipe.window_boundaries == config.windows.window_boundaries
    assert (recipe.guidance_scale == 1.0) == (config.teacher.cfg_mode == "fixed")
    assert recipe.base_model == teachers[family].name
    assert recipe.noise_schedule() == {"num_train_timesteps": 1000, **BETAS}


def test_frozen_weights_stay_and_are_no_part_of_the_delta(teachers: dict[str, Path], tmp_path: Path) -> None:
    frozen = '["*transformer_blocks*", "conv_in.*"]'
    watch = Watches()
    result = train(tiny_config(tmp_path, teachers["sdxl"], model__frozen=frozen), [watch])
    assert watch.session is not None and result.student is not None
    base = unet("sdxl")
    kept = {name for name in base.state_dict() if "transformer_blocks" in name or name.startswith("conv_in.")}
    trained = base.state_dict().keys() - kept
    assert watch.session.trained.keys() == trained and len(kept) > 10
    student = UNet2DConditionModel.from_pretrained(result.student).state_dict()
    assert all(torch.equal(student[name], tensor) == (name in kept) for name, tensor in base.state_dict().items())
    with safe_open(result.delta, "pt") as opened:
        assert set(opened.keys()) == trained
    merge_delta(base, result.delta)
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, student[name], rtol=1e-2, atol=1e-3)


def test_frozen_weights_of_another_start_are_in_the_delta(teachers: dict[str, Path], tmp_path: Path) -> None:
    start = unet("sdxl")
    with torch.no_grad():
        start.conv_in.bias += 1.0
    start.save_pretrained(tmp_path / "start")
    settings: dict[str, Any] = {"model__init_student": tmp_path / "start", "model__frozen": '["conv_in.*"]'}
    result = train(tiny_config(tmp_path, teachers["sdxl"], optimizer__max_steps=1, **settings))
    delta = load_file(result.delta)
    assert torch.equal(delta["conv_in.bias"], torch.ones_like(delta["conv_in.bias"]))
    assert "conv_in.weight" not in delta


def test_a_lora_student_is_its_delta_and_its_checkpoints_are_small(teachers: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model__student": "lora", "model__lora_rank": 4, "output__delta_dtype": "float32"}
    result = train(tiny_config(tmp_path, teachers["sdxl"], optimizer__learning_rate=0.05, **settings))
    assert result.student is None and result.lora is not None
    checkpoint = list_checkpoints(result.directory / "checkpoints")[-1]
    names = set(load_file(checkpoint / "adapter.safetensors"))
    assert names and all(".lora_" in name for name in names)
    assert not (checkpoint / "model.safetensors").exists()
    by_delta, by_lora = unet("sdxl"), unet("sdxl")
    merge_delta(by_delta, result.delta)
    by_lora.load_lora_adapter(load_file(result.lora), prefix="unet", adapter_name="x")
    by_lora.fuse_lora()
    by_lora.unload_lora()
    before = unet("sdxl").state_dict()
    changed = 0
    for name, tensor in by_lora.state_dict().items():
        torch.testing.assert_close(by_delta.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
        changed += not torch.equal(tensor, before[name])
    assert changed > 20
    with safe_open(result.lora, "pt") as opened:
        assert opened.metadata()["perflow.prediction_type"] == "ddim_eps"


def test_a_lora_s_frozen_weights_are_the_teacher_without_its_factors(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model__student": "lora", "teacher__starts": "trajectory", "optimizer__max_steps": 5}
    settings |= {"teacher__on_policy_share": 0.5, "teacher__solve_every": 1, "optimizer__learning_rate": 0.05}
    watch = Watches()
    shared = train(tiny_config(tmp_path, teachers["sdxl"], "shared", **settings), [watch])
    assert watch.session is not None
    assert watch.session.teacher._unet is watch.session.accelerator.unwrap_model(watch.session.student)
    monkeypatch.setattr("perflow_blocks.training.session._is_teacher", lambda config, accelerator: False)
    apart = train(tiny_config(tmp_path, teachers["sdxl"], "apart", **settings))
    assert losses(shared.directory) == pytest.approx(losses(apart.directory), rel=1e-5)


@pytest.mark.parametrize(("student", "starts"), [("full", "trajectory"), ("lora", "noised")])
def test_a_broken_run_goes_on_to_the_same_losses_and_weights(
    student: str, starts: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "model__student": student,
        "teacher__starts": starts,
        "optimizer__max_steps": 5,
        "optimizer__gradient_accumulation_steps": 2,
        "optimizer__schedule": "cosine",
        "teacher__on_policy_share": 0.5 if starts == "trajectory" else 0.0,
    }
    whole = train(tiny_config(tmp_path, teachers["sdxl"], "whole", **settings))
    with pytest.raises(Broken):
        train(tiny_config(tmp_path, teachers["sdxl"], "broken", **settings), [BreaksAt(4)])
    torch.manual_seed(123)
    watch = Watches()
    settings["output__resume"] = "latest"
    broken = train(tiny_config(tmp_path, teachers["sdxl"], "broken", **settings), [watch])
    assert watch.from_step == 3 and watch.steps == [4, 5]
    assert losses(broken.directory) == losses(whole.directory) and len(losses(whole.directory)) == 5
    one, other = load_file(whole.delta), load_file(broken.delta)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_without_resume_never_touches_another_s_checkpoints(teachers: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config(tmp_path, teachers["sd"]))
    with pytest.raises(ValueError, match=r"holds checkpoints up to step_00000006; pass output.resume=latest"):
        train(tiny_config(tmp_path, teachers["sd"]))
    with pytest.raises(ValueError, match=r"optimizer.batch_size is 2 there and 4 here"):
        train(tiny_config(tmp_path, teachers["sd"], output__resume="latest", optimizer__batch_size=4))
    with pytest.raises(ValueError, match=r"is no checkpoint"):
        train(tiny_config(tmp_path, teachers["sd"], output__resume=tmp_path))


def test_longer_and_slower_may_be_gone_on_with(teachers: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config(tmp_path, teachers["sd"]))
    watch = Watches()
    settings: dict[str, Any] = {
        "optimizer__max_steps": 8,
        "optimizer__learning_rate": 1e-4,
        "output__resume": "latest",
    }
    train(tiny_config(tmp_path, teachers["sd"], **settings), [watch])
    assert watch.steps == [7, 8] and [p.learning_rate for p in watch.progress] == [1e-4]


def test_only_the_last_checkpoints_stay_and_half_written_ones_are_never_taken(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    settings: dict[str, Any] = {"output__checkpoint_every": 1, "output__keep_checkpoints": 2}

    def stop(*arguments: object, **more: object) -> None:
        raise Broken

    class Sabotages(Observer):
        def updated(self, session: Session, step: int) -> None:
            if step == 4:
                monkeypatch.setattr("perflow_blocks.training.config.DistillConfig.flat", stop)

    with pytest.raises(Broken):
        train(tiny_config(tmp_path, teachers["sd"], **settings), [Sabotages()])
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == [".step_00000005.tmp", "step_00000003", "step_00000004"]
    (folder / "step_00000009").mkdir()  # without its last file
    watch = Watches()
    train(tiny_config(tmp_path, teachers["sd"], output__resume="latest", **settings), [watch])
    assert watch.steps == [5, 6]
    complete = [path.name for path in list_checkpoints(folder)]
    assert complete == ["step_00000005", "step_00000006"] and not list(folder.glob(".*"))


def test_a_diverging_run_stops_and_keeps_its_checkpoint(teachers: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer__max_steps": 40, "optimizer__max_grad_norm": 1e9}
    train(tiny_config(tmp_path, teachers["sd"]))
    with pytest.raises(DivergenceError, match=r"step_\d+ is kept. To go on, lower optimizer.learning_rate") as caught:
        train(
            tiny_config(tmp_path, teachers["sd"], output__resume="latest", optimizer__learning_rate=1e18, **settings)
        )
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step_00000003", "step_00000006"]
    assert kept[-1].name in str(caught.value)
    state = load_file(kept[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_progress_says_what_happened(teachers: dict[str, Path], tmp_path: Path) -> None:
    watch = Watches()
    result = train(tiny_config(tmp_path, teachers["sd"], optimizer__batch_size=4), [watch])
    assert [p.step for p in watch.progress] == [2, 3, 4, 6]
    last = watch.progress[-1]
    assert last.loss == pytest.approx(sum(last.losses) / 2) and last.eta_seconds == 0.0
    assert last.samples_per_second > 0 and all(norm > 0 for norm in last.gradient_norms)
    text = last.describe()
    assert text.startswith("step 6/6  loss ") and text.endswith("ETA 0:00:00") and "samples/s" in text
    # Without weights the losses of the windows make up the loss.
    kept = [loss for loss in last.window_losses if loss is not None]
    assert min(kept) <= last.loss <= max(kept)
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]


def test_tensorboard_gets_the_figures(teachers: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_config(tmp_path, teachers["sd"], output__tracker="tensorboard"))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_the_averages_are_the_result(teachers: dict[str, Path], tmp_path: Path) -> None:
    watch = Watches()
    with_ema = train(tiny_config(tmp_path, teachers["sd"], "ema", optimizer__ema_decay=0.5), [watch])
    without = train(tiny_config(tmp_path, teachers["sd"], "none", optimizer__ema_decay=0))
    assert losses(with_ema.directory) == losses(without.directory)
    assert watch.session is not None and watch.session.ema is not None
    averages = dict(zip(watch.session.trained, watch.session.ema.shadow_params, strict=True))
    saved = _student(with_ema)
    assert all(torch.equal(saved[name], tensor) for name, tensor in averages.items())
    assert not torch.equal(saved["conv_in.weight"], _student(without)["conv_in.weight"])


def test_accumulated_micro_steps_are_one_batch(teachers: dict[str, Path], tmp_path: Path) -> None:
    """The update of two micro-steps has the mean of their gradients: its norm and loss are those of both together."""
    watch = Watches()
    settings: dict[str, Any] = {
        "optimizer__gradient_accumulation_steps": 2,
        "optimizer__max_steps": 1,
        "optimizer__seed": 3,
    }
    train(tiny_config(tmp_path, teachers["sd"], "two", **settings), [watch])

    class Gradients(Observer):
        norm = loss = 0.0

        def started(self, session: Session, step: int) -> None:
            unwrapped = session.accelerator.unwrap_model(session.student)
            total = []
            for number in range(2):
                pairs = session.pairs.next(number, 0.0, unwrapped)
                total.append(distillation_step(unwrapped, pairs, session.geometry, session.config.loss).loss / 2)
            sum(total).backward()  # type: ignore[union-attr]
            grads = [p.grad for p in session.trained.values() if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(grads))
            self.loss = sum(part.item() for part in total)
            raise Broken

    direct = Gradients()
    with pytest.raises(Broken):
        train(tiny_config(tmp_path, teachers["sd"], "direct", **settings), [direct])
    assert watch.progress[0].gradient_norms[0] == pytest.approx(direct.norm, rel=1e-4)
    assert watch.progress[0].losses[0] == pytest.approx(direct.loss, rel=1e-4)


@pytest.mark.parametrize("starts", ["noised", "trajectory"])
def test_an_update_reads_nothing_from_the_device(
    starts: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The solver looks at times that lie on the host, which on this machine they all do; so do the counts of AdamW.
    monkeypatch.setattr("perflow_blocks.schedulers.pfode_solver._check_times", lambda *times: None)
    monkeypatch.setattr("accelerate.optimizer.AcceleratedOptimizer.step", lambda self, closure=None: None)
    session = open_session(tiny_config(tmp_path, teachers["sdxl"], teacher__starts=starts, loss__weighting="endpoint"))
    pairs: Any = session.pairs
    pairs._batches = iter([next(pairs._batches)] * 4)
    run = _Run(session, [])
    run.meter.finish_update(run._update())  # from here on embeddings are kept
    with no_host_reads(methods=False):
        for _ in range(2):
            run.meter.finish_update(run._update())
        with pytest.raises(AssertionError, match="reads from the device"):
            run.meter.read(3, 0.1)[0].losses[0] + torch.ones(()).item()


def test_memory_savers_change_nothing_but_memory(
    teachers: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(tiny_config(tmp_path, teachers["sdxl"], "plain", optimizer__max_steps=2))
    settings: dict[str, Any] = {"optimizer__gradient_checkpointing": "true", "optimizer__channels_last": "true"}
    settings |= {"teacher__offload": "all", "teacher__text_cache": 0, "teacher__latent_cache": 4}
    with caplog.at_level(logging.WARNING):
        saving = train(tiny_config(tmp_path, teachers["sdxl"], "saving", optimizer__max_steps=2, **settings))
    assert losses(saving.directory) == pytest.approx(losses(plain.directory), rel=1e-3)


def test_half_precision_stays_near(teachers: dict[str, Path], tmp_path: Path) -> None:
    plain = train(tiny_config(tmp_path, teachers["sdxl"], "plain", optimizer__max_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings: dict[str, Any] = {"optimizer__mixed_precision": "bf16", "teacher__dtype": "bfloat16"}
    half = train(tiny_config(tmp_path, teachers["sdxl"], "half", optimizer__max_steps=2, **settings))
    assert losses(half.directory) == pytest.approx(losses(plain.directory), rel=0.2)
    assert losses(half.directory) != losses(plain.directory)


def _student(result: TrainingResult) -> dict[str, torch.Tensor]:
    assert result.student is not None
    return load_file(result.student / "diffusion_pytorch_model.safetensors")
