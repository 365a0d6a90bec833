"""Merged deltas change, combine and come out again: bit for bit from the base, to one rounding without one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from perflow_blocks import extract_delta, merge_delta, rescale_delta, unmerge_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.files import open_weights
from perflow_blocks.delta.merge import find_merged, merge_record, merge_records
from perflow_blocks.testing.tiny import tiny_sdxl_unet

pytestmark = pytest.mark.behaviour

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
copies = pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])


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


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns as integers, which tell 0.0 from -0.0."""
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_bits(module: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        same = (tensor, expected[name]) if name == "count" else (bits(tensor), bits(expected[name]))
        assert torch.equal(*same), name


def assert_near(module: nn.Module, expected: dict[str, Tensor], delta: dict[str, Tensor], roundings: int = 2) -> None:
    """Within some roundings of weights as large as the largest that were rounded: with the delta and without."""
    for name, tensor in module.state_dict().items():
        if name != "count" and tensor.numel():
            size = expected[name].double().abs() + 4 * delta[name].double().abs()
            error = (tensor.double() - expected[name].double()).abs()
            assert bool((error <= roundings * size * torch.finfo(tensor.dtype).eps).all()), name


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


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning since the last look."""
    found = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    caplog.clear()
    return found


@pytest.fixture
def model() -> Small:
    return Small(0, torch.float16)


@pytest.fixture
def base(model: Small, tmp_path: Path) -> Path:
    """The file that the model could have been loaded from."""
    path = tmp_path / "base.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state(model).items()}, path)
    return path


def unet_folder(path: Path, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """A tiny UNet that was loaded from this folder, where it is float32."""
    tiny_sdxl_unet(0).save_pretrained(path)
    return UNet2DConditionModel.from_pretrained(path, dtype=dtype)


def unet_delta() -> dict[str, Tensor]:
    return extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))


# With a base


@given(
    dtype=st.sampled_from(TYPES),
    stored=st.sampled_from([torch.float16, torch.float32]),
    seeds=st.lists(st.integers(1, 10**6), min_size=1, max_size=3, unique=True),
    scales=st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3), min_size=3, max_size=3),
    order=st.permutations(range(3)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_deltas_at_any_scales_come_out_in_any_order(
    dtype: torch.dtype, stored: torch.dtype, seeds: list[int], scales: list[float], order: list[int]
) -> None:
    model = Small(0, dtype)
    base, deltas = state(model), [difference(seed, stored) for seed in seeds]
    there: list[tuple[dict[str, Tensor], float]] = []
    for delta, scale in zip(deltas, scales, strict=False):
        merge_delta(model, delta, scale, base=None if there else base)
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


@given(
    dtype=st.sampled_from(TYPES),
    stored=st.sampled_from([torch.float16, torch.float32]),
    scales=st.tuples(*[st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)] * 2),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_without_a_base_a_delta_comes_out_to_one_rounding(
    dtype: torch.dtype, stored: torch.dtype, scales: tuple[float, float]
) -> None:
    model, delta = Small(0, dtype), difference(1, stored)
    before = state(model)
    merge_delta(model, delta, scales[0])
    assert_bits(model, summed(before, [(delta, scales[0])]))
    rescale_delta(model, scales[1])
    assert_near(model, summed(before, [(delta, scales[1])]), delta)
    unmerge_delta(model)
    assert_near(model, before, delta, roundings=3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_that_diffusers_loaded_finds_its_base(
    tmp_path: Path, dtype: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Stored in float32, also where it was loaded in another type."""
    unet, delta = unet_folder(tmp_path / "unet", dtype), unet_delta()
    before = state(unet)
    merge_delta(unet, delta)
    assert torch.equal(
        unet.conv_in.weight, (before["conv_in.weight"].float() + delta["conv_in.weight"]).to(unet.dtype)
    )
    rescale_delta(unet, 0.3)
    unmerge_delta(unet)
    assert_bits(unet, before)
    assert warnings(caplog) == []
    # The configuration alone does not make the files a base.
    other = UNet2DConditionModel.from_config(unet.config)
    merge_delta(other, delta)
    assert "differ from" in warnings(caplog)[0] or "no base" in warnings(caplog)[0]


def fuse(model: nn.Module, name: str = "up_w") -> None:
    model.get_parameter(name).data[0, 0] += 0.25


def test_a_base_that_is_written_to_meanwhile_is_found_out(model: Small, base: Path) -> None:
    merge_delta(model, difference(1), base=base)
    merged = state(model)
    base.write_bytes(base.read_bytes())
    for use in (lambda: unmerge_delta(model), lambda: merge_delta(model, difference(2))):
        with pytest.raises(ValueError, match=r"base\.safetensors was written to since it was opened"):
            use()
        assert_bits(model, merged)


@copies
@pytest.mark.parametrize("place", ["file", "mapping"])
def test_a_copy_of_a_model_can_be_unmerged_too(model: Small, base: Path, duplicate: Any, place: str) -> None:
    before = state(model)
    merge_delta(model, difference(1), base=base if place == "file" else before)
    other: nn.Module = duplicate(model)
    assert merge_records(other) == merge_records(model)
    for one in (model, other):
        unmerge_delta(one)
        assert_bits(one, before)


def test_a_model_that_was_saved_with_a_delta_is_a_base(tmp_path: Path) -> None:
    """What it was loaded with stays in it, and the second delta comes out."""
    unet = unet_folder(tmp_path / "base")
    before = state(unet)
    first, second = unet_delta(), extract_delta(tiny_sdxl_unet(2), tiny_sdxl_unet(0))
    merge_delta(unet, first)
    unet.save_pretrained(tmp_path / "merged")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    loaded = state(unet)
    merge_delta(unet, second)
    assert len(merge_records(unet)) == 2
    unmerge_delta(unet, second)
    assert_bits(unet, loaded)
    assert len(merge_records(unet)) == 1
    # With the delta and the base's own files the first comes out exactly as well.
    rescale_delta(unet, 0.5, first, base=tmp_path / "base")
    assert_bits(unet, summed(before, [(first, 0.5)]))
    unmerge_delta(unet)
    assert_bits(unet, before)


# Interrupts and threads


class Interrupted(dict[str, Tensor]):
    """A delta whose n-th tensor cannot be read."""

    left = 10**6

    def __getitem__(self, name: str) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().__getitem__(name)


def interrupt(use: Callable[[], object], delta: Interrupted, at: int) -> bool:
    """Whether the n-th reading of a tensor came and was interrupted."""
    delta.left = at
    try:
        use()
    except KeyboardInterrupt:
        return True
    finally:
        delta.left = 10**6
    return False


@pytest.mark.parametrize("operation", ["merge", "rescale", "unmerge", "second"])
@pytest.mark.parametrize("known", [True, False])
def test_after_an_interrupt_at_any_tensor_the_next_call_is_right_or_names_the_remedy(
    operation: str, known: bool
) -> None:
    values, second = difference(1), difference(2)
    delta = Interrupted(values)
    refused = 0

    def use() -> object:
        match operation:
            case "merge":
                return merge_delta(model, delta, base=before if known else None)
            case "rescale":
                return rescale_delta(model, -1.5, delta)
            case "unmerge":
                return unmerge_delta(model, delta)
            case _:
                return merge_delta(model, second, 2.0)

    expected = {
        "merge": [(values, 1.0)],
        "rescale": [(values, -1.5)],
        "unmerge": [],
        "second": [(values, 0.5), (second, 2.0)],
    }[operation]
    for at in range(1, 60):
        model = Small(0, torch.float16)
        before = state(model)
        if operation != "merge":
            merge_delta(model, delta, 0.5, base=before if known else None)
        if not interrupt(use, delta, at):
            break
        try:
            use()
        except ValueError as error:
            assert not known and "half merged" in str(error) and "base=" in str(error)
            refused += 1
            merge_delta(model, difference(3), 0.5, base=before)  # which puts the weights right first
            unmerge_delta(model)
            assert_bits(model, before)
            continue
        if known:
            assert_bits(model, summed(before, expected))
        else:
            assert_near(model, summed(before, expected), values, roundings=4)
    else:
        pytest.fail("never finished")
    assert at > 4 and (known or refused)


def test_threads_that_merge_one_model_merge_once(model: Small, base: Path) -> None:
    delta, before = difference(1), state(model)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: merge_delta(model, dict(delta), base=base), range(8)))
    assert_bits(model, summed(before, [(delta, 1.0)]))
    assert [record.scale for record in merge_records(model)] == [1.0]

    def in_and_out(number: int) -> None:
        merge_delta(model, difference(number), 0.5)
        unmerge_delta(model, difference(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(in_and_out, range(2, 10)))
    assert_bits(model, summed(before, [(delta, 1.0)]))


# Which delta, at which factors


def test_patterns_scale_blocks(caplog: pytest.LogCaptureFixture) -> None:
    model, delta = Small(0, torch.float32), difference(1)
    base = state(model)
    record = merge_delta(model, delta, 2.0, scales={"up_w": 0.0, "up_*": 0.5}, base=base)
    assert record.scales == (("up_w", 0.0), ("up_*", 0.5))
    factors = {"up_w": 0.0, "up_k": 1.0, "down_b": 2.0, "one": 2.0, "no": 2.0}
    for name, factor in factors.items():
        expected = base[name] + factor * delta[name] if factor else base[name]
        assert torch.equal(bits(model.state_dict()[name]), bits(expected)), name
    assert merge_delta(model, delta, 2.0, scales={"up_w": 0.0, "up_*": 0.5}) is merge_record(model)
    assert "already; nothing was changed" in caplog.text
    rescale_delta(model, 1.0)
    assert_bits(model, summed(base, [(delta, 1.0)]))
    unmerge_delta(model)
    assert_bits(model, base)


def test_a_delta_that_was_changed_since_is_found_out(model: Small) -> None:
    delta = difference(1)
    merge_delta(model, delta, base=state(model))
    merged = state(model)
    delta["one"].add_(1)
    with pytest.raises(ValueError, match="the mapping was changed since it was merged"):
        unmerge_delta(model)
    assert_bits(model, merged)


def test_weights_that_are_loaded_over_a_merge_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """All deltas are gone then; a fused LoRA or training leaves them."""
    unet, delta = tiny_sdxl_unet(0), unet_delta()
    before = state(unet)
    merge_delta(unet, delta, base=before)
    merged = state(unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01 * parameter)
    assert len(merge_records(unet)) == 1
    unet.load_state_dict(merged)
    assert len(merge_records(unet)) == 1
    for assign in (False, True):
        unet.load_state_dict({name: tensor.clone() for name, tensor in before.items()}, assign=assign)
        assert merge_records(unet) == () and "_perflow_merges" not in unet.config
        assert any("not in the weights" in warning for warning in warnings(caplog))
        merge_delta(unet, delta)
        assert_bits(unet, merged)


def test_a_lora_that_is_larger_than_the_delta_does_not_hide_it() -> None:
    small = {name: 0.02 * tensor for name, tensor in unet_delta().items()}
    for seed in (9, 20, 22):  # the first 32 values of each weight tell it wrongly
        unet = tiny_sdxl_unet(0)
        merge_delta(unet, small)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if parameter.dim() > 1:
                    up, down = (torch.randn(n, 2, generator=generator) for n in parameter.flatten(1).shape)
                    change = (up @ down.T).reshape(parameter.shape)
                    parameter += 6 * change * small[name].norm() / change.norm()
        assert len(merge_records(unet)) == 1


def test_the_source_is_the_path_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, and not resolved: in the Hub's cache the file behind a link is named by its hash."""
    save_delta(difference(1), tmp_path / "0a1b2c", dtype=torch.float32)
    (tmp_path / "delta.safetensors").symlink_to(tmp_path / "0a1b2c")
    monkeypatch.chdir(tmp_path)
    for delta in ("delta.safetensors", open_weights("delta.safetensors")):
        model = Small(0, torch.float32)
        assert merge_delta(model, delta).source == str(tmp_path / "delta.safetensors")


@pytest.mark.parametrize("place", ["_witness", "setattr"])
def test_an_interrupt_while_the_record_is_written_leaves_weights_and_configuration_alike(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perflow_blocks.delta import merge

    unet, delta = tiny_sdxl_unet(0), unet_delta()
    before, config = state(unet), dict(unet.config)

    def failing(*args: Any) -> None:
        if place == "_witness" or args[2].records:
            raise KeyboardInterrupt
        setattr(*args)

    with monkeypatch.context() as patch:
        patch.setattr(merge, place, failing, raising=False)
        with pytest.raises(KeyboardInterrupt):
            merge_delta(unet, delta, base=before)
    assert merge_records(unet) == () and dict(unet.config) == config
    assert_bits(unet, before)


@pytest.mark.parametrize("known", [True, False])
def test_a_sum_that_is_not_finite_leaves_no_trace(model: Small, base: Path, known: bool) -> None:
    before, delta = state(model), difference(1)
    delta["one"] = torch.tensor(1e6)
    with pytest.raises(ValueError, match=r"one would not be finite"):
        merge_delta(model, delta, base=base if known else None)
    assert_bits(model, before)
    assert merge_records(model) == ()
    merge_delta(model, difference(1), 0.5, base=base if known else None)
    half = state(model)
    with pytest.raises(ValueError, match="would not be finite"):
        rescale_delta(model, 1e6)
    assert_bits(model, half)
    assert [record.scale for record in merge_records(model)] == [0.5]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fused_lora_stays_and_its_weights_are_named(
    model: Small, base: Path, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The other weights come back exactly."""
    delta, expected = difference(1), state(model)
    expected["up_w"][0, 0] += 0.25
    if when == "before":
        fuse(model)
    merge_delta(model, delta, base=base)
    if when == "after":
        assert not warnings(caplog)
        fuse(model)
    unmerge_delta(model)
    warning = warnings(caplog)[0]
    assert "up_w" in warning and "base.safetensors" in warning and "down_b" not in warning
    assert_near(model, expected, delta, roundings=4)
    assert_bits(model, {**expected, "up_w": model.state_dict()["up_w"]})


@pytest.mark.parametrize("given_base", [True, False])
def test_converting_a_merged_model_to_another_type(given_base: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Taken out it is the base in the new type, exactly where the base can be read."""
    wide, delta = Small(0, torch.float32), difference(1)
    before = state(wide)
    merge_delta(wide, delta, base=before if given_base else None)
    wide.to(torch.bfloat16)
    warnings(caplog)
    converted = {name: tensor.bfloat16() if name != "count" else tensor for name, tensor in before.items()}
    rescale_delta(wide, 0.5)
    unmerge_delta(wide)
    if given_base:
        assert_bits(wide, converted)
    else:
        assert_near(wide, converted, delta, roundings=4)
    assert bool(warnings(caplog)) != given_base


def test_the_base_may_come_later_and_in_part(model: Small, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, delta = state(model), difference(1)
    merge_delta(model, delta)
    unmerge_delta(model, base=base)
    assert_bits(model, before)
    warnings(caplog)
    part = {name: tensor for name, tensor in before.items() if name != "down_b"} | {"up_w": torch.zeros(7, 9)}
    merge_delta(model, delta, base=part)
    assert "2 weights (up_w, down_b)" in warnings(caplog)[0]
    unmerge_delta(model)
    assert_near(model, before, delta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "0.5"}, "scale='0.5'"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scales": {"mid.*": 1.0}}, r"mid\.\*, which matches no weight"),
        ({"base": {"other": torch.zeros(2)}}, "base=the mapping holds no weight of this Small"),
        ({"base": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ({"delta": None}, "delta=NoneType"),
    ],
)
def test_wrong_arguments_are_named(model: Small, arguments: dict[str, Any], message: str) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=message):
        merge_delta(model, **{"delta": difference(1), **arguments})
    assert_bits(model, before)


def test_which_delta_is_meant_must_be_clear(model: Small) -> None:
    base, one, two = state(model), difference(1), difference(2)
    with pytest.raises(ValueError, match="no delta is merged into this Small"):
        unmerge_delta(model)
    merge_delta(model, one, base=base)
    with pytest.raises(ValueError, match="that delta is not merged; into this Small are merged"):
        unmerge_delta(model, two)
    record = merge_delta(model, two)
    with pytest.raises(ValueError, match="name the delta that is meant"):
        rescale_delta(model, 1.0)
    unmerge_delta(model, record)
    assert_bits(model, summed(base, [(one, 1.0)]))


def test_a_delta_file_that_changes_is_read_again(tmp_path: Path, model: Small) -> None:
    path, base = tmp_path / "delta.safetensors", state(model)
    save_delta(difference(1), path, dtype=torch.float32)
    record = merge_delta(model, path, base=base)
    path.touch()
    assert find_merged(model, path) == record
    save_delta(difference(2), path, dtype=torch.float32)
    assert find_merged(model, path) is None
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        find_merged(model, path)
    unmerge_delta(model)
    assert_bits(model, base)
