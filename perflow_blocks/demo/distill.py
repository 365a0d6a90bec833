"""Distils the demo's student: guided teacher trajectories from pure noise, straightened window by window.

Starts at pure noise need no data, and train on the path that sampling takes. The teacher's guidance is baked in, so
the student needs one UNet row a step. From a third of the training on, some windows start where the student itself
ended the window before: the teacher then shows how to go on from the student's own mistakes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ..core.distillation import draw_times, make_student_example
from ..core.noise_schedule import make_alphas_cumprod
from ..core.parameterization import WindowAlpha, window_alpha, window_endpoint, window_table
from ..core.windows import TimeWindows
from ..schedulers import PFODESolverSDXL
from .checkpoint import Checkpoint
from .conditioning import CaptionEncoder, TextConditioning
from .models import LATENT_CHANNELS, LATENT_SIZE, SCHEDULE, build_teacher_scheduler, time_ids
from .pictures import Prompt

PREDICTION_TYPE = "ddim_eps"
SETTINGS_NAME = "distillation.json"
_START_SHARE = 0.5  # share of the training times that lie at a window's start
_CHECKPOINT_EVERY = 10  # rounds


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How the demo's student is trained. Each round solves new trajectories and then trains on the buffer."""

    rounds: int = 46
    trajectories: int = 48  # solved per round, each with one pair a window
    updates: int = 20  # student steps per round
    batch_size: int = 32
    buffer: int = 1536  # trajectories kept
    num_windows: int = 4
    teacher_steps: int = 5  # per window
    guidance_scale: float = 3.0
    on_policy_share: float = 0.5
    on_policy_from: float = 0.33  # share of the rounds before it begins
    lr: float = 5e-4
    frozen: tuple[str, ...] = ("*transformer_blocks*", "mid_block*", "down_blocks.2.resnets*conv2*")
    """Weights that stay the teacher's, as name patterns. They are no part of the delta, which halves its file."""
    seed: int = 0


@dataclass(kw_only=True)
class Trajectories:
    """Solved windows: `starts`, `ends` (count, windows, 4, 16, 16), and the prompts' conditioning, a row each."""

    starts: Tensor
    ends: Tensor
    text: TextConditioning

    def append(self, other: Trajectories, limit: int) -> Trajectories:
        """Both, the oldest left out beyond `limit`."""
        return Trajectories(
            starts=torch.cat([self.starts, other.starts])[-limit:],
            ends=torch.cat([self.ends, other.ends])[-limit:],
            text=TextConditioning(
                prompt_embeds=torch.cat([self.text.prompt_embeds, other.text.prompt_embeds])[-limit:],
                pooled_prompt_embeds=torch.cat([self.text.pooled_prompt_embeds, other.text.pooled_prompt_embeds])[
                    -limit:
                ],
            ),
        )


def is_frozen(name: str, config: DistillationConfig) -> bool:
    """Whether the student keeps the teacher's weight of this name."""
    return any(fnmatch(name, pattern) for pattern in config.frozen)


class Distiller:
    """The frozen teacher, the student, and the geometry they share."""

    def __init__(self, teacher: UNet2DConditionModel, encoder: CaptionEncoder, config: DistillationConfig) -> None:
        self.config = config
        self.encoder = encoder.eval().requires_grad_(False)
        self.teacher = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.student: UNet2DConditionModel = UNet2DConditionModel.from_config(teacher.config)
        self.student.load_state_dict(teacher.state_dict())
        self.student.to(memory_format=torch.channels_last).set_attn_processor(AttnProcessor())
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(not is_frozen(name, config))
        self.windows = TimeWindows.equal(config.num_windows)
        self.window_table = window_table(self.windows, make_alphas_cumprod(**SCHEDULE))
        self.solver = PFODESolverSDXL(build_teacher_scheduler())

    def window_rows(self, indices: Tensor) -> WindowAlpha:
        """The windows of the given indices (batch,) as float32 tensors of that shape."""
        starts = torch.tensor(self.windows.starts)[indices]
        return window_alpha(self.windows, self.window_table, starts)

    def student_output(self, sample: Tensor, timestep: Tensor, text: TextConditioning) -> Tensor:
        return self.student(
            sample.contiguous(memory_format=torch.channels_last),
            timestep,
            text.prompt_embeds,
            added_cond_kwargs={"text_embeds": text.pooled_prompt_embeds, "time_ids": time_ids(len(sample))},
            return_dict=False,
        )[0]

    @torch.no_grad()
    def solve_trajectories(self, index: int, on_policy_share: float) -> Trajectories:
        """Guided teacher solves of all windows from pure noise, for random prompts; reproducible by `index`."""
        config, count = self.config, self.config.trajectories
        rng = np.random.default_rng([config.seed, index])
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        text = self.encoder([Prompt.random(rng).text for _ in range(count)])
        empty = text.drop(torch.ones(count, dtype=torch.bool))
        on_policy = torch.rand(count, generator=generator) < on_policy_share
        z_start = torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        starts, ends = [], []
        for number in range(self.windows.num_windows):
            window = self.window_rows(torch.full((count,), number))
            z_end = self.solver.solve(
                z_start,
                self.teacher,
                window.start,
                window.end,
                prompt_embeds=text.prompt_embeds,
                pooled_prompt_embeds=text.pooled_prompt_embeds,
                negative_prompt_embeds=empty.prompt_embeds,
                negative_pooled_prompt_embeds=empty.pooled_prompt_embeds,
                add_time_ids=time_ids(1),
                guidance_scale=config.guidance_scale,
                num_steps=config.teacher_steps,
                num_windows=config.num_windows,
            )
            starts.append(z_start)
            ends.append(z_end)
            z_start = z_end
            if on_policy_share > 0 and number + 1 < self.windows.num_windows:
                output = self.student_output(starts[-1], window.start * SCHEDULE["num_train_timesteps"], text)
                own = window_endpoint(starts[-1], output, window, PREDICTION_TYPE)
                z_start = torch.where(on_policy[:, None, None, None], own, z_end)
        return Trajectories(starts=torch.stack(starts, 1), ends=torch.stack(ends, 1), text=text)

    def loss(self, buffer: Trajectories, generator: torch.Generator) -> Tensor:
        """The student's loss on random windows of random trajectories."""
        batch = self.config.batch_size
        rows = torch.randint(len(buffer.starts), (batch,), generator=generator)
        numbers = torch.randint(self.windows.num_windows, (batch,), generator=generator)
        window = self.window_rows(numbers)
        t = draw_times(window, torch.rand(batch, generator=generator), start_share=_START_SHARE)
        example = make_student_example(
            buffer.starts[rows, numbers], buffer.ends[rows, numbers], t, window, PREDICTION_TYPE
        )
        return example.loss(self.student_output(example.sample, example.timestep, buffer.text[rows]))


def distill(
    teacher: UNet2DConditionModel, encoder: CaptionEncoder, out: Path, config: DistillationConfig
) -> UNet2DConditionModel:
    """Trains the student and saves its averaged weights in `out/student`.

    Training goes on from `out/student_state.pt` when it exists, with a buffer that fills anew.
    """
    distiller = Distiller(teacher, encoder, config)
    student = distiller.student
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    total = config.rounds * config.updates
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=total, pct_start=0.04)
    ema = EMAModel(student.parameters(), decay=0.995)
    parts = {"student": student, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    checkpoint = Checkpoint(out / "student_state.pt", parts)
    first = checkpoint.load()

    buffer: Trajectories | None = None
    progress = tqdm(range(first, config.rounds), desc="student", unit="round", initial=first, total=config.rounds)
    for number in progress:
        share = config.on_policy_share if number >= config.on_policy_from * config.rounds else 0.0
        student.eval()
        solved = distiller.solve_trajectories(number, share)
        buffer = solved if buffer is None else buffer.append(solved, config.buffer)
        student.train()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 500_000 + number)
        losses = []
        for _ in range(config.updates):
            loss = distiller.loss(buffer, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            ema.step(student.parameters())
            losses.append(loss.detach())
        progress.set_postfix(loss=f"{torch.stack(losses).mean().item():.4f}")
        if (number + 1) % _CHECKPOINT_EVERY == 0:
            checkpoint.save(number + 1)

    ema.copy_to(student.parameters())
    student.save_pretrained(out / "student")
    (out / "student" / SETTINGS_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n")
    return student


def read_settings(out: Path) -> DistillationConfig:
    """What the student in `out/student` was distilled with."""
    settings = json.loads((out / "student" / SETTINGS_NAME).read_text())
    return DistillationConfig(**{**settings, "frozen": tuple(settings["frozen"])})
