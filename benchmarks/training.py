"""Memory and time of distilling at SDXL's size: measured on a GPU, computed without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from . import training_run
from .measure import Setting
from .models import SDXL, TINY, Size
from .report import Report, table
from .training_estimate import Footprint, encoder_footprints, student_footprint, teacher_footprint
from .training_run import RANK, STEPS, Case, Kind

Offload = Literal["none", "encoders", "all"]
GPU, PEAK = "H200 SXM", 989e12
"""NVIDIA's data sheet: dense bfloat16 operations a second (half of what it gives with sparsity)."""
SHARES = (0.5, 0.3)
ROWS = {"fixed": 2, "sync": 1}
"""Of a call of the teacher, by `teacher.cfg_mode`."""

COMPUTED = """Computed, not measured: no GPU was used. The trainer's student, of SDXL's shapes, was run forward and
backward on tensors without data (PyTorch's fake tensors), and each storage that an operator made was counted once
until it was released. Batch 1, {pixels} x {pixels} pixels, LoRA of rank {rank} or full weights,
`mixed_precision = "bf16"`, `teacher.dtype = "bfloat16"`, noised starts. GB are 10^9 bytes."""

PARTS_TEXT = """What it is made of, in GB. A full student's weights are float32; a LoRA has a bfloat16 base and
float32 factors. Gradients and averages (`ema_decay`) are float32. *Kept* is what the forward pass leaves for the
backward pass beside the weights: activations, and autocast's bfloat16 copies of trained weights. *Passes* is the most
that lives at once beside the weights during both passes: what is kept, gradients as they are made, and with
checkpointing the block that is computed again. AdamW8bit is reckoned by bitsandbytes' layout: two bytes a weight, a
float32 scale for 256 of each average, and float32 in tensors of fewer than 4096 weights."""

PARTS_ASSUMED = """Assumed: norms in float32 under autocast, as on CUDA; attention by a fused kernel (flash or
memory-efficient), which keeps queries, keys, values, result and a logarithm a row, and never the matrix."""

PEAK_TEXT = """The most of an update, in GB, by `optimizer.name` and `teacher.offload`: the largest of encoding the
image, the teacher's calls under guidance, the student's passes, the optimizer's step and that of the averages, with
all that lives beside them; the last column names it for the first offload. AdamW's step on CUDA holds one more
float32 tensor for each trained weight, and so does averaging; the 8-bit one works in place. A LoRA's base is its
teacher too; a full student has its teacher beside it ({teacher} GB, and {teacher_peak} GB during a call) unless that
is offloaded. Text encoders are {text} GB, the VAE is {vae} GB in float32 and takes {vae_peak} GB while it encodes.
Left out: the CUDA context, workspaces of kernels, cuDNN's among them, what the allocator holds back between blocks,
and kept embeddings."""

TIME_TEXT = """Operations of an update in TFLOP, by PyTorch's formulas in the same runs, and seconds by arithmetic
alone: operations divided by {peak:.0f} TFLOP/s (the {gpu}'s dense bfloat16 peak by NVIDIA's data sheet) times an
assumed share of it, {high:.0%} to {low:.0%}. The teacher makes {steps} calls, of two rows with guidance ("fixed") and
of one without ("sync"). Left out: encoding ({vae_tflop} TFLOP in float32 an image), the optimizer, elementwise work,
which memory bounds, reading data, and copies for offloading."""

MEASURED = """Measured on this GPU: the trainer itself (`perflow_blocks.training`) on a teacher with random weights of
SDXL's sizes, batch 1, {pixels} x {pixels} pixels, LoRA of rank {rank} or full weights, `mixed_precision = "bf16"`,
`teacher.dtype = "bfloat16"`, noised starts, {steps} steps of the teacher. Seconds are the median of {updates} updates
after {warm_up}; *calls* is that of the same networks' calls alone (the teacher's forward, the student's forward and
backward, on the inputs of the first update), timed in turns with the updates, and *ratio* is the one over the other.
Memory is `torch.cuda.max_memory_allocated` over them, all weights and states included. GB are 10^9 bytes."""

HEAD = ("student", "checkpointing", "guidance", "optimizer", "offload")

Students = Mapping[tuple[Kind, bool], Footprint]
"""By kind, with and without checkpointing."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The models beside the student."""

    teacher: Footprint
    vae: Footprint
    text: int


def run(setting: Setting) -> Iterator[Report]:
    size = TINY if setting.quick else SDXL
    yield _measured(size, setting) if setting.device.type == "cuda" else _computed(size)


def _computed(size: Size) -> Report:
    vae, text = encoder_footprints(size)
    beside = Neighbours(teacher=teacher_footprint(size, ROWS["fixed"]), vae=vae, text=text)
    students = {
        (kind, checkpointing): student_footprint(size, kind, checkpointing, RANK)
        for kind, checkpointing in training_run.students()
    }
    notes = PEAK_TEXT.format(
        teacher=_gb(beside.teacher.weights),
        teacher_peak=_gb(beside.teacher.peak),
        text=_gb(text),
        vae=_gb(vae.weights),
        vae_peak=_gb(vae.peak),
    )
    times = TIME_TEXT.format(
        peak=PEAK / 1e12, gpu=GPU, high=SHARES[0], low=SHARES[1], steps=STEPS, vae_tflop=_tflop(vae.flop)
    )
    return Report(
        title="Training at SDXL's size, computed",
        parts=(
            COMPUTED.format(pixels=size.pixels, rank=RANK),
            PARTS_TEXT,
            _parts_table(students),
            PARTS_ASSUMED,
            notes,
            _peak_table(students, beside),
            times,
            _time_table(students, beside.teacher),
        ),
    )


def phases(
    student: Footprint, beside: Neighbours, *, shared: bool, optimizer: str, offload: Offload
) -> dict[str, int]:
    """The most bytes that live at once in each part of an update after the first.

    Args:
        student: what is trained.
        beside: the other models.
        shared: the student's frozen weights are the teacher's.
        optimizer: "adamw" or "adamw8bit".
        offload: as `teacher.offload`.
    """
    teacher = 0 if shared else beside.teacher.weights
    encoders = beside.text + beside.vae.weights
    standing = student.weights + student.trained + student.optimizer[optimizer]  # with the averages
    standing += (encoders if offload == "none" else 0) + (0 if offload == "all" else teacher)
    temporary = student.trained if optimizer == "adamw" else 0
    return {
        "encoding": standing + beside.vae.peak + (0 if offload == "none" else beside.vae.weights),
        "teacher": standing + beside.teacher.peak + (teacher if offload == "all" else 0),
        "passes": standing + student.peak,
        "optimizer": standing + student.trained + temporary,
        "averages": standing + student.trained,
    }


def _parts_table(students: Students) -> str:
    return table(
        ("student", "checkpointing", "weights", "gradients", "AdamW", "AdamW8bit", "averages", "kept", "passes"),
        (
            (
                *_head(*case),
                *(
                    _gb(size)
                    for size in (
                        found.weights,
                        found.trained,
                        found.optimizer["adamw"],
                        found.optimizer["adamw8bit"],
                        found.trained,
                        found.kept,
                        found.peak,
                    )
                ),
            )
            for case, found in students.items()
        ),
    )


def _peak_table(students: Students, beside: Neighbours) -> str:
    return table(
        ("student", "checkpointing", "optimizer", *(f"offload {name}" for name in get_args(Offload)), "largest"),
        _peak_rows(students, beside),
    )


def _peak_rows(students: Students, beside: Neighbours) -> Iterator[tuple[object, ...]]:
    for (kind, checkpointing), found in students.items():
        for optimizer in found.optimizer:
            each = [
                phases(found, beside, shared=kind == "lora", optimizer=optimizer, offload=offload)
                for offload in get_args(Offload)
            ]
            peaks = [_gb(max(bytes_of.values())) for bytes_of in each]
            yield *_head(kind, checkpointing), optimizer, *peaks, max(each[0], key=each[0].__getitem__)


def _time_table(students: Students, teacher: Footprint) -> str:
    return table(
        ("student", "checkpointing", "guidance", "teacher", "student", "update", "seconds, arithmetic"),
        (
            (*_head(*case), mode, *map(_tflop, (solve, found.flop, solve + found.flop)), _seconds(solve + found.flop))
            for case, found in students.items()
            for mode, solve in solves(teacher).items()
        ),
    )


def solves(teacher: Footprint) -> dict[str, int]:
    """Operations of a solved window, by `teacher.cfg_mode`; `teacher` is a call of as many rows as "fixed" takes."""
    return {mode: STEPS * teacher.flop * rows // ROWS["fixed"] for mode, rows in ROWS.items()}


def _measured(size: Size, setting: Setting) -> Report:
    updates = setting.rounds(training_run.UPDATES)
    rows: list[tuple[object, ...]] = []
    with training_run.teacher_directory(size, setting.device) as directory:
        for case in training_run.make_cases():
            head = (*_head(case.student, case.checkpointing), case.guidance, case.optimizer, case.offload)
            rows.append((*head, *_measured_cells(case, size, directory, updates)))
    return Report(
        title="Training at SDXL's size, measured",
        parts=(
            MEASURED.format(pixels=size.pixels, rank=RANK, steps=STEPS, updates=updates, warm_up=training_run.WARM_UP),
            table(
                (
                    "student",
                    "checkpointing",
                    "guidance",
                    "optimizer",
                    "offload",
                    "peak GB",
                    "seconds",
                    "calls",
                    "ratio",
                ),
                rows,
            ),
        ),
    )


def _measured_cells(case: Case, size: Size, directory: Path, updates: int) -> tuple[str, ...]:
    try:
        timing, bare, peak = training_run.measure(case, size, directory, updates)
    except torch.OutOfMemoryError:  # the other cases may go on
        return "out of memory", "-", "-", "-"
    return _gb(peak), f"{timing.median:.2f}", f"{bare.median:.2f}", f"{timing.median / bare.median:.2f}"


def _head(student: str, checkpointing: bool) -> tuple[str, str]:
    return student, "yes" if checkpointing else "no"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e10 else f"{size / 1e9:.2f}"


def _tflop(operations: int) -> str:
    return f"{operations / 1e12:.1f}"


def _seconds(operations: int) -> str:
    fast, slow = (operations / (PEAK * share) for share in SHARES)
    return f"{fast:.2f} to {slow:.2f}"
