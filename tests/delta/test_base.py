"""The way back by reading the base again: exact, with nothing kept beside the model but where it must be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from perflow_blocks import extract_delta, merge_delta, rescale_delta, unmerge_delta
from perflow_blocks.delta.record import merge_records, merge_state
from perflow_blocks.delta.reversible import bits
from perflow_blocks.testing.tiny import tiny_inpainting_unet, tiny_sdxl_unet
from tests.builder.conftest import checkpoint_components, save_checkpoint
from tests.delta.test_exact import Small, assert_bits, difference, state, summed

pytestmark = pytest.mark.behaviour


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


def test_nothing_is_kept_and_everything_comes_back(model: Small, base: Path) -> None:
    before = state(model)
    one, two = difference(1), difference(2)
    merge_delta(model, one, base=base)
    assert_bits(model, summed(before, [(one, 1.0)]))
    merge_delta(model, two, 0.3)  # the base is known
    assert_bits(model, summed(before, [(one, 1.0), (two, 0.3)]))
    rescale_delta(model, -2.0, two)
    assert_bits(model, summed(before, [(one, 1.0), (two, -2.0)]))
    assert merge_state(model).corrections.size == 0
    unmerge_delta(model, two)
    unmerge_delta(model, one)
    assert_bits(model, before)
    assert merge_records(model) == ()


def test_the_base_may_be_stored_in_a_wider_type(tmp_path: Path) -> None:
    unet = unet_folder(tmp_path / "unet", torch.bfloat16)
    before = state(unet)
    delta = extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))
    merge_delta(unet, delta, base=tmp_path / "unet")
    assert merge_state(unet).corrections.size == 0
    assert torch.equal(unet.conv_in.weight, (before["conv_in.weight"].float() + delta["conv_in.weight"]).bfloat16())
    unmerge_delta(unet)
    assert_bits(unet, before)


def test_a_whole_checkpoint_in_original_names_is_a_base(tmp_path: Path) -> None:
    """As DreamBooth models come: UNet, VAE and encoders in one file, named as Latent Diffusion did."""
    components = checkpoint_components()
    unet = components["unet"]
    path = save_checkpoint(tmp_path / "checkpoint.safetensors", components)
    before = state(unet)
    delta = {name: torch.full_like(tensor, 0.01) for name, tensor in before.items()}
    merge_delta(unet, delta, base=path)
    assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])
    unmerge_delta(unet)
    assert_bits(unet, before)


def test_part_of_an_inpainting_unets_input_layer(tmp_path: Path) -> None:
    unet = tiny_inpainting_unet(5)
    before = state(unet)
    unet.save_pretrained(tmp_path)
    merge_delta(unet, extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), base=tmp_path)
    assert not torch.equal(unet.conv_in.weight[:, :4], before["conv_in.weight"][:, :4])
    unmerge_delta(unet)
    assert_bits(unet, before)


def corrected(model: nn.Module) -> set[str]:
    """The weights for which what rounding lost is kept."""
    corrections = merge_state(model).corrections
    return {name for name in corrections.names() if not all(piece.reread for piece in corrections.pieces(name))}


def a_bit(weight: Tensor) -> None:
    """One value up and another down by a unit in the last place; the sum of bit patterns stays."""
    patterns = bits(weight).view(-1)
    lane = [i for i in range(0, len(patterns), 4) if weight.view(-1)[i].abs() > 0.1]
    patterns[lane[0]] += 1
    patterns[lane[1]] -= 1


ALTERATIONS: dict[str, Callable[[Tensor], object]] = {
    "another value": lambda weight: weight[0, 0].add_(1),
    "rows in another order": lambda weight: weight.copy_(weight.flip(0)),
    "columns in another order": lambda weight: weight.copy_(weight.roll(4, 1)),
    "two signs": lambda weight: weight.view(-1)[3:8:4].neg_(),
    "a bit more and a bit less": a_bit,
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_weights_that_are_not_the_bases_come_back_too(model: Small, base: Path, alteration: str) -> None:
    """Trained since, or with a LoRA fused: what rounding lost is kept for them, and the others are read again."""
    ALTERATIONS[alteration](model.get_parameter("up_w").data)
    before = state(model)
    merge_delta(model, difference(1), base=base)
    assert corrected(model) == {"up_w"}
    assert_bits(model, summed(before, [(difference(1), 1.0)]))
    merge_delta(model, difference(2), 0.5)
    unmerge_delta(model, difference(1))
    unmerge_delta(model)
    assert_bits(model, before)


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_weights_that_were_changed_since_are_found_out(model: Small, base: Path, alteration: str) -> None:
    merge_delta(model, difference(1), base=base)
    ALTERATIONS[alteration](model.get_parameter("up_w").data)
    changed = state(model)
    for use in (lambda: unmerge_delta(model), lambda: merge_delta(model, difference(2))):
        with pytest.raises(
            ValueError, match="up_w, or the delta in it, has changed since the merge, or its base has; undo"
        ):
            use()
        assert_bits(model, changed)


def test_moving_to_another_type_is_found_out(base: Path) -> None:
    model = Small(0, torch.float32)
    merge_delta(model, difference(1), base=state(model))
    model.half()
    with pytest.raises(ValueError, match="has changed since the merge"):
        unmerge_delta(model)


def test_weights_that_change_before_a_delta_gets_to_them(model: Small, base: Path) -> None:
    """Between two deltas, or while a factor is 0."""
    delta = difference(1)
    merge_delta(model, delta, base=base, scales={"down_b": 0.0})
    model.get_parameter("down_b")[3] += 1
    before = {**state(Small(0, torch.float16)), "down_b": state(model)["down_b"]}
    rescale_delta(model, 1.0)
    assert_bits(model, summed(before, [(delta, 1.0)]))
    assert corrected(model) == {"down_b"}
    unmerge_delta(model)
    assert_bits(model, before)


def test_a_base_need_not_hold_everything(model: Small) -> None:
    before, delta = state(model), difference(1)
    part = {name: tensor for name, tensor in before.items() if name != "down_b"} | {"up_w": torch.zeros(7, 9)}
    merge_delta(model, delta, base=part)
    assert corrected(model) == {"down_b", "up_w"}
    unmerge_delta(model)
    assert_bits(model, before)


def test_what_is_no_base_is_named(model: Small) -> None:
    before = state(model)
    for wrong, message in (
        ({"other": torch.zeros(2)}, "base=the mapping holds no weight of this Small; leave base out"),
        ("nowhere.safetensors", "nowhere.safetensors does not exist"),
        (3, "base=int is no base; pass a file, a folder or a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_delta(model, difference(1), base=wrong)
    assert_bits(model, before)


def test_the_models_own_memory_is_no_base(model: Small) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=r"base=the mapping shares its memory with the model \(up_w, .*copies"):
        merge_delta(model, difference(1), base=model.state_dict())
    assert_bits(model, before)


def test_the_base_may_be_named_with_a_later_delta(model: Small, base: Path) -> None:
    """What rounding lost stays kept where a delta is already; the weights that the first left alone are read again."""
    before, delta = state(model), difference(1)
    merge_delta(model, delta, scales={"up_*": 0.0})
    merge_delta(model, difference(2), base=base)
    assert corrected(model) == {"down_b", "one"}
    for gone in (delta, difference(2)):
        unmerge_delta(model, gone)
    assert_bits(model, before)


def test_a_base_that_is_written_to_meanwhile_is_no_way_back(model: Small, base: Path) -> None:
    merge_delta(model, difference(1), base=base)
    merged = state(model)
    base.write_bytes(base.read_bytes())
    for use in (lambda: unmerge_delta(model), lambda: merge_delta(model, difference(2))):
        with pytest.raises(ValueError, match=r"base\.safetensors was written to since it was opened; load the model"):
            use()
        assert_bits(model, merged)


def test_a_base_that_is_replaced_or_deleted_meanwhile_still_is(tmp_path: Path) -> None:
    """As by saving the merged model where it was loaded from: the open file keeps its contents."""
    unet = unet_folder(tmp_path)
    before = state(unet)
    merge_delta(unet, extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), base=tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.unlink()
    save_file(state(unet), file)
    unmerge_delta(unet)
    assert_bits(unet, before)


def test_a_mapping_that_changes_meanwhile_is_no_way_back(model: Small) -> None:
    base = state(model)
    merge_delta(model, difference(1), base=base)
    merged = state(model)
    base["up_w"][0, 0] += 1
    with pytest.raises(ValueError, match="up_w, or the delta in it, has changed since the merge, or its base has"):
        unmerge_delta(model)
    assert_bits(model, merged)


def test_a_sum_that_is_not_finite_leaves_no_trace(model: Small, base: Path) -> None:
    before, delta = state(model), difference(1)
    delta["one"] = torch.tensor(1e6)
    with pytest.raises(ValueError, match="would not be finite in their type"):
        merge_delta(model, delta, base=base)
    assert_bits(model, before)
    merge_delta(model, difference(1), 0.5, base=base)
    half = state(model)
    with pytest.raises(ValueError, match="would not be finite"):
        rescale_delta(model, 1e6)
    assert_bits(model, half)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_the_way_back_too(model: Small, base: Path, duplicate: Any) -> None:
    before = state(model)
    merge_delta(model, difference(1), base=base)
    other: nn.Module = duplicate(model)
    for one in (model, other):
        unmerge_delta(one)
        assert_bits(one, before)


def test_a_model_that_was_saved_with_a_delta_is_a_base(tmp_path: Path) -> None:
    """What it was loaded with stays in it, and the second delta comes out."""
    unet = unet_folder(tmp_path / "base")
    merge_delta(unet, extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)))
    unet.save_pretrained(tmp_path / "merged")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    before = state(unet)
    second = extract_delta(tiny_sdxl_unet(2), tiny_sdxl_unet(0))
    merge_delta(unet, second, base=tmp_path / "merged")
    assert len(merge_records(unet)) == 2
    unmerge_delta(unet, second)
    assert_bits(unet, before)
    assert len(merge_records(unet)) == 1


def test_a_model_that_was_loaded_in_inference_mode(base: Path) -> None:
    """Its weights may be changed in that mode only, and are put back outside of it too."""
    with torch.inference_mode():
        model = Small(0, torch.float16)
    before, delta = state(model), difference(1)
    merge_delta(model, delta, base=base)
    unmerge_delta(model)
    assert_bits(model, before)
    delta["one"] = torch.tensor(1e6)
    with pytest.raises(ValueError, match="would not be finite in their type"):
        merge_delta(model, delta, base=base)
    assert_bits(model, before)
