"""What the training benchmark computes without a GPU, beside tensors with data; and its run on a GPU, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training, training_run
from benchmarks.measure import Setting, peak_bytes
from benchmarks.models import TINY, build_unet
from benchmarks.training_estimate import (
    CudaRules,
    Footprint,
    checkpoint_by_cuda_rules,
    footprint,
    student_footprint,
    teacher_footprint,
    unet_inputs,
    without_data,
)
from benchmarks.training_run import Case, measure, teacher_directory

CPU = torch.device("cpu")
SIZE = replace(TINY, latents=32, layers=2)
GB = 10**9


def student(checkpointing: bool, device: str = "cpu") -> Any:
    unet = build_unet(SIZE, device).requires_grad_(True).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def computed(checkpointing: bool) -> Footprint:
    unet = student(checkpointing, "meta")
    if checkpointing:
        checkpoint_by_cuda_rules(unet)
    with FakeTensorMode():
        without_data(unet)
        return footprint(unet, unet_inputs(SIZE, 1), autocast=None)


def saved_bytes(unet: Any, inputs: dict[str, Any]) -> int:
    """Of the distinct storages that a real forward pass saves, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in unet.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(**inputs)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.fixture(scope="module")
def footprints() -> dict[bool, Footprint]:
    return {checkpointing: computed(checkpointing) for checkpointing in (False, True)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_is_what_a_real_forward_pass_saves(
    checkpointing: bool, footprints: dict[bool, Footprint]
) -> None:
    real = saved_bytes(student(checkpointing), unet_inputs(SIZE, 1))
    assert footprints[checkpointing].kept == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_passes_take_what_torch_allocates_on_a_cpu(checkpointing: bool, footprints: dict[bool, Footprint]) -> None:
    unet, inputs = student(checkpointing), unet_inputs(SIZE, 1)

    peak = peak_bytes(lambda: unet(**inputs)[0].square().mean().backward(), CPU)
    # Scratch memory inside a CPU's operators, above all convolutions, is not computed.
    assert 0.9 * peak < footprints[checkpointing].peak <= 1.01 * peak


def test_checkpointing_keeps_less_and_computes_blocks_again(footprints: dict[bool, Footprint]) -> None:
    plain, saving = footprints[False], footprints[True]
    assert saving.kept < 0.5 * plain.kept and saving.peak < 0.8 * plain.peak
    assert 1.1 * plain.flop < saving.flop < 4 / 3 * plain.flop


@pytest.mark.parametrize(("checkpointing", "products"), [(False, 6), (True, 8)])
def test_operations_are_those_that_torch_counts(
    checkpointing: bool, products: int, footprints: dict[bool, Footprint]
) -> None:
    unet = student(checkpointing)
    # Torch has no formula for the fused kernel of CPUs; the plain one makes two products forward and four back.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(**unet_inputs(SIZE, 1))[0].square().mean().backward()
    again = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] // products  # by fused kernels, on the way back
    assert footprints[checkpointing].flop == pytest.approx(counter.get_total_flops() + again, rel=0.01)


def test_rules_of_cuda() -> None:
    with FakeTensorMode():
        query = torch.empty(1, 2, 48, 16, dtype=torch.bfloat16, requires_grad=True)
        saved: list[tuple[int, ...]] = []
        with CudaRules(), saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)), lambda x: x):
            assert functional.scaled_dot_product_attention(query, query, query).shape == query.shape
            assert (1, 2, 48) in saved and all(shape[-2:] != (48, 48) for shape in saved)
            with torch.autocast("cpu", torch.bfloat16):
                assert functional.layer_norm(query, (16,)).dtype == torch.float32
                assert functional.linear(query, torch.empty(4, 16)).dtype == torch.bfloat16
            assert functional.layer_norm(query, (16,)).dtype == torch.bfloat16


def test_a_lora_trains_its_factors_alone() -> None:
    found = {checkpointing: student_footprint(TINY, "lora", checkpointing, rank=2) for checkpointing in (False, True)}
    full = student_footprint(TINY, "full", False, rank=2)
    base = 2 * full.weights // 4  # bfloat16
    assert found[False].weights == base + found[False].trained
    assert found[True].kept < found[False].kept < full.kept
    assert full.trained == full.weights


def test_guidance_doubles_the_teachers_work() -> None:
    one, two = (teacher_footprint(TINY, rows).flop for rows in (1, 2))
    assert training.solves(teacher_footprint(TINY, 2)) == {"fixed": 10 * two, "sync": 10 * one}
    assert two == 2 * one


def test_optimizer_and_averages_take_what_is_reckoned_with() -> None:
    weights = [torch.nn.Parameter(torch.randn(200_000)) for _ in range(4)]
    size = sum(weight.nbytes for weight in weights)
    optimizer = torch.optim.AdamW(weights, foreach=True)  # as on CUDA
    averages = EMAModel(weights, foreach=True)

    def step() -> None:
        optimizer.step()

    for weight in weights:
        weight.grad = torch.randn_like(weight)
    step()
    states = [state for of_one in optimizer.state.values() for state in of_one.values() if state.dim()]
    assert sum(state.nbytes for state in states) == 2 * size
    assert peak_bytes(step, CPU) == pytest.approx(size, rel=0.3)
    assert sum(average.nbytes for average in averages.shadow_params) == size
    assert peak_bytes(lambda: averages.step(weights), CPU) == pytest.approx(size, rel=0.3)


def test_the_parts_of_an_update() -> None:
    blank = Footprint(weights=0, trained=0, optimizer={}, kept=0, peak=0, flop=0)
    beside = training.Neighbours(
        teacher=replace(blank, weights=5 * GB, peak=GB),
        vae=replace(blank, weights=GB, peak=3 * GB),
        text=2 * GB,
    )
    full = Footprint(
        weights=10 * GB,
        trained=10 * GB,
        optimizer={"adamw": 20 * GB, "adamw8bit": 5 * GB},
        kept=0,
        peak=14 * GB,
        flop=0,
    )
    plain = training.phases(full, beside, shared=False, optimizer="adamw", offload="none")
    assert [size // GB for size in plain.values()] == [51, 49, 62, 68, 58]
    saving = training.phases(full, beside, shared=False, optimizer="adamw8bit", offload="all")
    assert [size // GB for size in saving.values()] == [29, 31, 39, 35, 35]
    shared = training.phases(full, beside, shared=True, optimizer="adamw", offload="encoders")
    assert [size // GB for size in shared.values()] == [44, 41, 54, 60, 50]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_trainer_is_what_is_measured(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "RANK", 2)
    case = Case(student=kind, checkpointing=True, guidance="sync", offload="all", steps=1)
    with teacher_directory(TINY, CPU) as directory:
        timing, bare, peak = measure(case, TINY, directory, updates=2)
        assert not list((directory / "output").glob("**/*.safetensors"))
    assert len(timing.seconds) == len(bare.seconds) == 2 and min(*timing.seconds, *bare.seconds) > 0
    assert peak == 0  # a CPU's is not measured
    assert not directory.exists()


def test_the_table_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case, *_: Any) -> Any:
        if case.student == "full":
            raise torch.OutOfMemoryError("no room")
        return training_run.Timing((0.5, 0.25)), training_run.Timing((0.25, 0.25)), 9 * GB

    monkeypatch.setattr(training_run, "measure", fails)
    text = "\n".join(training._measured(TINY, Setting(device=CPU, quick=True)).parts)
    assert text.startswith("Measured on this GPU")
    assert "| lora | yes | fixed | adamw | none | 9.00 | 0.38 | 0.25 | 1.50 |" in text
    assert "| full | no | sync | adamw | none | out of memory | - | - | - |" in text
