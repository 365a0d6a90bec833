"""The way back by reading the base again: exact, nothing kept beside the model, refused where it is no way back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from perflow_blocks import extract_delta, merge_delta, rescale_delta, unmerge_delta
from perflow_blocks.components.delta_fit import BaseDiffersError
from perflow_blocks.components.delta_record import merge_records, merge_state
from perflow_blocks.components.weight_files import MappingWeights
from perflow_blocks.testing.tiny import tiny_inpainting_unet, tiny_sdxl_unet

from .single_file_support import checkpoint_components, save_checkpoint
from .test_delta_exact import Small, assert_bits, difference, state, summed


@pytest.fixture
def model() -> Small:
    return Small(0, torch.float16)


@pytest.fixture
def base(model: Small, tmp_path: Path) -> Path:
    """The file that the model could have been loaded from."""
    path = tmp_path / "base.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state(model).items()}, path)
    return path


class Counted(MappingWeights):
    """Weights that know which of their tensors were read."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.read: list[str] = []

    def tensor(self, name: str) -> Tensor:
        self.read.append(name)
        return super().tensor(name)


def unet_folder(path: Path, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """A tiny UNet that was loaded from this folder, where it is float32."""
    tiny_sdxl_unet(0).save_pretrained(path)
    return UNet2DConditionModel.from_pretrained(path, dtype=dtype)


def test_nothing_is_kept_and_everything_comes_back(model: Small, base: Path) -> None:
    before = state(model)
    one, two = Counted(difference(1)), difference(2)
    merge_delta(model, one, base=base)
    assert_bits(model, summed(before, [(difference(1), 1.0)]))
    merge_delta(model, two, 0.3)  # the base is known
    assert_bits(model, summed(before, [(difference(1), 1.0), (two, 0.3)]))
    rescale_delta(model, -2.0, two)
    assert_bits(model, summed(before, [(difference(1), 1.0), (two, -2.0)]))
    assert merge_state(model).corrections.size == 0
    unmerge_delta(model, two)
    one.read.clear()
    unmerge_delta(model, one)
    assert not one.read  # only the base is
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


def test_weights_that_are_not_the_bases_are_named_and_stay(model: Small, base: Path) -> None:
    """In the last but one; by then others may have been written to."""
    model.get_parameter("one").add_(1)
    before = state(model)
    with pytest.raises(BaseDiffersError, match="one of this Small is not what base holds; pass the weights that"):
        merge_delta(model, difference(1), base=base)
    assert_bits(model, before)
    assert merge_records(model) == () and not merge_state(model).broken
    merge_delta(model, difference(1))  # without, it is merged as ever
    unmerge_delta(model)
    assert_bits(model, before)


def test_a_base_of_other_names_or_shapes_is_refused(model: Small) -> None:
    before, delta = state(model), difference(1)
    lacking = {name: tensor for name, tensor in before.items() if name != "down_b"}
    misshapen = {**before, "up_w": torch.zeros(7, 9)}
    for wrong, message in (
        (lacking, r"base=the mapping is not what this Small was loaded from: 1 missing from the base \(down_b\)"),
        (misshapen, r"1 of another shape \(up_w is \[7, 9\] instead of \[9, 7\]\)"),
    ):
        with pytest.raises(BaseDiffersError, match=message):
            merge_delta(model, delta, base=wrong)
    with pytest.raises(ValueError, match="does not exist"):
        merge_delta(model, delta, base="nowhere.safetensors")
    assert_bits(model, before)


def test_the_models_own_memory_is_no_base(model: Small) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=r"base=the mapping shares its memory with the model \(up_w, .*copies"):
        merge_delta(model, difference(1), base=model.state_dict())
    assert_bits(model, before)


def test_the_base_is_named_with_the_first_delta(model: Small, base: Path) -> None:
    merge_delta(model, difference(1))
    with pytest.raises(ValueError, match="already; pass base= with the first delta, or take that out before"):
        merge_delta(model, difference(2), base=base)
    unmerge_delta(model)
    merge_delta(model, difference(2), base=base)
    assert merge_state(model).corrections.size == 0


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
    with pytest.raises(ValueError, match="up_w of the base has changed since the merge; load the model again"):
        unmerge_delta(model)
    assert_bits(model, merged)


def test_weights_that_were_changed_since_are_found_out(model: Small, base: Path) -> None:
    merge_delta(model, difference(1), base=base)
    model.get_parameter("down_b")[3] += 1
    changed = state(model)
    for use in (lambda: unmerge_delta(model), lambda: merge_delta(model, difference(2))):
        with pytest.raises(ValueError, match="down_b, or the delta in it, has changed since the merge; undo"):
            use()
        assert_bits(model, changed)


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
