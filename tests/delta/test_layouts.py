"""The layouts that weights are published in: folders, variants, shards, wrappers' prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perflow_blocks import extract_delta, merge_delta, unmerge_delta
from perflow_blocks.delta.extract import open_difference, save_delta
from perflow_blocks.delta.files import open_weights
from perflow_blocks.delta.merge import merge_record, merge_records
from perflow_blocks.testing.tiny import tiny_sdxl_unet
from tests.checkpoints import MODELS, save_checkpoint

pytestmark = pytest.mark.behaviour

STEM = "diffusion_pytorch_model"


def difference() -> dict[str, Tensor]:
    return extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))


def merged(delta: Any) -> dict[str, Tensor]:
    unet = tiny_sdxl_unet(0)
    merge_delta(unet, delta)
    return unet.state_dict()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return merged(difference())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_variant_is_chosen_by_name_and_need_not_be_where_it_is_alone(
    tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    save_file(difference(), tmp_path / f"{STEM}.v0-1.safetensors")
    assert_same(merged(open_weights(tmp_path, "v0-1")), expected)
    assert_same(merged(tmp_path), expected)
    with pytest.raises(ValueError, match=r"holds the variants 'v0-1' and not 'v0-2'; name one as the variant"):
        open_weights(tmp_path, "v0-2")
    save_file({"conv_in.bias": torch.ones(1)}, tmp_path / f"{STEM}.v0-2.safetensors")
    with pytest.raises(ValueError, match=r"'v0-1', 'v0-2' and no variant was named; .* pass its file") as caught:
        open_weights(tmp_path)
    named = str(caught.value).rsplit(" ", 1)[1].removesuffix(".")
    assert_same(merged(named), expected)  # the file in the message is one that can be passed
    save_file({"conv_in.bias": torch.ones(1)}, tmp_path / f"{STEM}.safetensors")
    assert list(open_weights(tmp_path).shapes) == ["conv_in.bias"]


@pytest.mark.parametrize("variant", [None, "fp16", "v0-1"])
def test_shards_as_diffusers_writes_them_are_read(tmp_path: Path, variant: str | None) -> None:
    unet = tiny_sdxl_unet(1)
    unet.save_pretrained(tmp_path, variant=variant, max_shard_size="100KB")
    parts = list(tmp_path.glob("*-of-*"))
    assert len(parts) > 2
    for asked in {variant, None}:
        weights = open_weights(tmp_path, asked)
        assert weights.shapes.keys() == unet.state_dict().keys()
        assert_same({name: weights.tensor(name) for name in weights.shapes}, unet.state_dict())
    with pytest.raises(ValueError, match=r"holds the variants \S+( one without a name)? and not 'other'"):
        open_weights(tmp_path, "other")
    parts[0].unlink()
    with pytest.raises(ValueError, match=rf"not there \({parts[0].name}\)"):
        open_weights(tmp_path)


def test_the_index_is_taken_before_a_whole_file_and_older_names_of_shards_are_known(tmp_path: Path) -> None:
    unet, file = tiny_sdxl_unet(1), tmp_path / f"{STEM}.v0-1.safetensors"
    unet.save_pretrained(tmp_path, variant="v0-1", max_shard_size="100KB")
    save_file({"conv_in.bias": torch.ones(1)}, file)
    assert len(open_weights(tmp_path, "v0-1").shapes) == len(unet.state_dict())
    for part in (*tmp_path.glob("*-of-*"), *tmp_path.glob("*.json")):
        part.unlink()
    file.rename(tmp_path / f"{STEM}-00001-of-00001.fp16.safetensors")
    with pytest.raises(ValueError, match=rf"holds no {STEM}\.safetensors"):
        open_weights(tmp_path)
    index = {"weight_map": {"conv_in.bias": f"{STEM}-00001-of-00001.fp16.safetensors"}}
    (tmp_path / f"{STEM}.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert list(open_weights(tmp_path, "fp16").shapes) == ["conv_in.bias"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "unet.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_away(prefix: str, expected: dict[str, Tensor]) -> None:
    delta = {prefix + name: tensor for name, tensor in difference().items()}
    unet = tiny_sdxl_unet(0)
    merge_delta(unet, delta, base=tiny_sdxl_unet(0).state_dict())
    assert_same(unet.state_dict(), expected)
    unmerge_delta(unet, difference())  # the same by any name
    assert_same(unet.state_dict(), tiny_sdxl_unet(0).state_dict())


def test_loras_and_original_names_are_refused(tmp_path: Path) -> None:
    for key in ("unet.conv_in.lora_A.weight", "lora_unet_conv_in.alpha"):
        with pytest.raises(ValueError, match=r"is a LoRA .*load_lora_weights"):
            merge_delta(tiny_sdxl_unet(0), {key: torch.ones(1)})
    file = save_checkpoint(tmp_path / "single.safetensors", {"unet": tiny_sdxl_unet(0)}, MODELS[1:])
    with pytest.raises(ValueError, match=r"single\.safetensors has the original names .*from_single_file"):
        open_weights(file)


def test_a_merged_student_and_its_base_are_a_delta(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    for seed in (0, 1):
        tiny_sdxl_unet(seed).save_pretrained(tmp_path / str(seed))
    delta = open_difference(tmp_path / "1", tmp_path / "0")
    assert_same(merged(delta), expected)
    unet = tiny_sdxl_unet(0)
    merge_delta(unet, delta, 0.5, base=tmp_path / "0")
    assert merge_delta(unet, delta, 0.5) is merge_record(unet) and len(merge_records(unet)) == 1
    unmerge_delta(unet)
    assert_same(unet.state_dict(), tiny_sdxl_unet(0).state_dict())
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"do not match: .*missing from the student"):
        open_difference(tmp_path / "other.safetensors", tmp_path / "0")


@pytest.mark.parametrize("wrong", ["student", "base"])
def test_a_delta_is_no_model_to_take_a_difference_of(tmp_path: Path, wrong: str) -> None:
    save_delta(difference(), tmp_path / "delta.safetensors")
    tiny_sdxl_unet(0).save_pretrained(tmp_path / "model")
    pair = {"student": tmp_path / "model", "base": tmp_path / "model", wrong: tmp_path / "delta.safetensors"}
    with pytest.raises(ValueError, match=r"delta\.safetensors holds differences"):
        open_difference(pair["student"], pair["base"])


def test_whole_weights_are_no_delta(tmp_path: Path) -> None:
    """A merged UNet, taken for a delta, would double the weights."""
    unet, student = tiny_sdxl_unet(0), tiny_sdxl_unet(0)
    for tensor in student.state_dict().values():
        tensor.mul_(1.01).add_(0.001)
    with pytest.raises(ValueError, match=r"holds a model's whole weights"):
        merge_delta(unet, student.state_dict())
    assert_same(unet.state_dict(), tiny_sdxl_unet(0).state_dict())
