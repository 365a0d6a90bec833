"""Merged deltas change, combine and come out again bit for bit, in every type and order."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from perflow_blocks import extract_delta, merge_delta, rescale_delta, unmerge_delta
from perflow_blocks.delta import corrections as delta_corrections
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.record import merge_record, merge_records
from perflow_blocks.delta.reversible import bits
from perflow_blocks.demo import weights_directory
from perflow_blocks.demo.models import build_unet

pytestmark = pytest.mark.behaviour

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Small(nn.Module):
    """A matrix, a kernel in another memory order, a vector, one number, nothing at all, an integer buffer."""

    def __init__(self, seed: int, dtype: torch.dtype, spread: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(seed))
        generator = torch.Generator().manual_seed(seed)
        shapes: dict[str, tuple[int, ...]] = {
            "up.w": (9, 7),
            "up.k": (5, 4, 3, 3),
            "down.b": (11,),
            "one": (),
            "no": (0, 3),
        }
        for name, shape in shapes.items():
            exponent = torch.randn(shape, generator=generator).mul(3 * spread).clamp(-12, 5)
            value = torch.randn(shape, generator=generator) * 2**exponent
            value[value.abs() < 0.05] = -0.0
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.to(dtype), requires_grad=False))
        kernel = self.get_parameter("up_k")
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_bits(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """Also tells 0.0 from -0.0."""
    for name, tensor in module.state_dict().items():
        same = (tensor, expected[name]) if name == "count" else (bits(tensor), bits(expected[name]))
        assert torch.equal(*same), name


def difference(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in Small(seed, dtype, 0.5).state_dict().items() if name != "count"}


def summed(base: dict[str, Tensor], terms: list[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    """What must come out, formed in one go."""
    out = {}
    for name, weight in base.items():
        if name == "count" or not terms:
            out[name] = weight
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = sum(
            (delta[name].to(wide) * factor for delta, factor in terms[1:]), terms[0][0][name].to(wide) * terms[0][1]
        )
        out[name] = (weight.to(wide) + change).to(weight.dtype)
    return out


@given(
    dtype=st.sampled_from(TYPES),
    stored=st.sampled_from([torch.float16, torch.float32]),
    seeds=st.lists(st.integers(1, 10**6), min_size=1, max_size=3, unique=True),
    scales=st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    reread=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_deltas_at_any_scales_come_out_in_any_order(
    dtype: torch.dtype, stored: torch.dtype, seeds: list[int], scales: list[float], order: list[int], reread: bool
) -> None:
    """Whether what rounding lost is kept for it, or the base is read again."""
    model = Small(0, dtype)
    base, deltas = state(model), [difference(seed, stored) for seed in seeds]
    there: list[tuple[dict[str, Tensor], float]] = []
    for delta, scale in zip(deltas, scales, strict=False):
        merge_delta(model, delta, scale, base=base if reread and not there else None)
        there.append((delta, scale))
        assert_bits(model, summed(base, there))
    there[0] = (deltas[0], scales[-1] / 2)
    rescale_delta(model, scales[-1] / 2, deltas[0])
    assert_bits(model, summed(base, there))
    for i in (i for i in order if i < len(deltas)):
        unmerge_delta(model, deltas[i])
        there = [term for term in there if term[0] is not deltas[i]]
        assert_bits(model, summed(base, there))
    assert_bits(model, base)
    assert merge_records(model) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_demo_models_delta_comes_out_exactly_and_gives_the_student(dtype: torch.dtype, tmp_path: Path) -> None:
    """In float32 the student's every bit; in half precision one rounding."""
    folder = weights_directory()
    unet = build_unet()
    unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    base = {name: tensor.float() for name, tensor in state(unet).items()}
    student = dict(base)
    for name, tensor in load_file(folder / "perflow_delta.safetensors").items():
        student[name] = base[name] + tensor.float()
    delta = extract_delta(student, base)
    unet.to(dtype)
    before = state(unet)
    for scale in (0.5, 1.0):
        merge_delta(unet, delta, scale)
        expected = {name: (before[name].float() + scale * delta[name]).to(dtype) for name in base}
        for name, tensor in unet.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    if dtype == torch.float32:
        assert all(torch.equal(tensor, student[name]) for name, tensor in unet.state_dict().items())
    merge_delta(unet, delta, 0.0)
    assert_bits(unet, before)


def test_patterns_scale_blocks(caplog: pytest.LogCaptureFixture) -> None:
    model, delta = Small(0, torch.float32), difference(1)
    base = state(model)
    record = merge_delta(model, delta, 2.0, scales={"up_w": 0.0, "up_*": 0.5})
    assert record.scales == (("up_w", 0.0), ("up_*", 0.5))
    factors = {"up_w": 0.0, "up_k": 1.0, "down_b": 2.0, "one": 2.0, "no": 2.0}
    for name, factor in factors.items():
        expected = base[name] + factor * delta[name] if factor else base[name]
        assert torch.equal(bits(model.state_dict()[name]), bits(expected)), name
    assert merge_delta(model, delta, 2.0, scales={"up_w": 0.0, "up_*": 0.5}) is merge_record(model)
    assert "already; nothing was changed" in caplog.text
    rescale_delta(model, 1.0)
    assert_bits(model, summed(base, [(delta, 1.0)]))
    for bad, message in (
        ({"mid.*": 1.0}, r"mid\.\*, which match no weight"),
        ({"up_w": float("nan")}, "no finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            rescale_delta(model, 1.0, scales=bad)
    unmerge_delta(model)
    assert_bits(model, base)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_its_own_way_back(duplicate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_corrections, "IN_MEMORY", 16)  # on disk from the start
    model = Small(0, torch.float16)
    base = state(model)
    merge_delta(model, difference(1))
    other = duplicate(model)
    unmerge_delta(model)
    assert_bits(model, base)
    unmerge_delta(other)
    assert_bits(other, base)


def test_weights_that_were_changed_since_are_found_out() -> None:
    """As by a LoRA that was fused, or training: what was merged is then not there to be taken out."""
    model = Small(0, torch.float16)
    merge_delta(model, difference(1))
    model.get_parameter("down_b")[3] += 1
    changed = state(model)
    for use in (lambda: unmerge_delta(model), lambda: merge_delta(model, difference(2))):
        with pytest.raises(ValueError, match=r"down_b, or the delta in it, has changed since the merge"):
            use()
        assert_bits(model, changed)


def test_a_delta_that_was_changed_since_is_found_out() -> None:
    model, delta = Small(0, torch.float16), difference(1)
    merge_delta(model, delta)
    merged = state(model)
    delta["one"].add_(1)
    with pytest.raises(ValueError, match="one, or the delta in it, has changed"):
        unmerge_delta(model)
    assert_bits(model, merged)


def test_moving_to_another_type_is_found_out() -> None:
    model = Small(0, torch.float32)
    merge_delta(model, difference(1))
    model.half()
    with pytest.raises(ValueError, match="has changed since the merge"):
        unmerge_delta(model)


def test_which_delta_is_meant_must_be_clear() -> None:
    model, one, two = Small(0, torch.float32), difference(1), difference(2)
    with pytest.raises(ValueError, match="no delta is merged into this Small"):
        unmerge_delta(model)
    with pytest.raises(ValueError, match="0 deltas are merged"):
        rescale_delta(model, 1.0)
    merge_delta(model, one)
    with pytest.raises(ValueError, match="that delta is not merged into this Small"):
        unmerge_delta(model, two)
    merge_delta(model, two)
    with pytest.raises(ValueError, match="2 deltas are merged"):
        rescale_delta(model, 1.0)
    assert len(unmerge_delta(model)) == 2
    assert_bits(model, state(Small(0, torch.float32)))


def test_wrong_arguments_are_named() -> None:
    model, delta = Small(0, torch.float32), difference(1)
    before = state(model)
    for arguments, message in (
        ({"scale": "0.5"}, "scale='0.5' is no finite number"),
        ({"scale": None}, "scale=None is no finite number"),
        ({"scale": True}, "scale=True is no finite number"),
        ({"scales": ["up_*"]}, r"scales=\['up_\*'\] is no mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_delta(model, delta, **arguments)
    for wrong in (None, 3, model):
        with pytest.raises(ValueError, match=f"delta={type(wrong).__name__} is no delta; pass a file"):
            merge_delta(model, wrong)
    assert_bits(model, before)
    merge_delta(model, delta)
    with pytest.raises(ValueError, match=r"mid\.\*, which match no weight"):
        merge_delta(model, delta, scales={"mid.*": 1.0})


def test_a_copy_needs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    save_delta(difference(1), path, dtype=torch.float32)
    model = Small(0, torch.float32)
    base = state(model)
    merge_delta(model, path)
    path.unlink()
    other = copy.deepcopy(model)
    unmerge_delta(model)
    rescale_delta(other, 0.5)
    unmerge_delta(other)
    assert_bits(model, base)
    assert_bits(other, base)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(-8, 8))
def test_the_student_comes_back(seed: int, exponent: float) -> None:
    """Bit for bit within a factor of 2 of the base, else but for one unit in the last place of the larger."""
    base = torch.randn(512, generator=torch.Generator().manual_seed(seed))
    student = torch.randn(512, generator=torch.Generator().manual_seed(seed + 1)) * 2**exponent
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(base.clone(), requires_grad=False))
    merge_delta(model, extract_delta({"w": student}, {"w": base}))
    reached, larger = model.get_parameter("w"), torch.maximum(student.abs(), base.abs())
    assert bool(((reached - student).abs() <= larger * torch.finfo(torch.float32).eps).all())
    ratio = student / base
    near = (ratio >= 0.5) & (ratio <= 2)
    assert torch.equal(reached[near], student[near])
