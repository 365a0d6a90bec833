"""Mistakes at `perflow extract`, `merge`, `unmerge`, `to-lora` and `inspect`: one line, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from perflow_blocks import extract_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing.tiny import tiny_sd_unet, tiny_sdxl_unet

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, sd (another architecture), gap (a weight is missing), int8, full (no UNet), and files."""
    path = tmp_path_factory.mktemp("place")
    tiny_sdxl_unet(0).save_pretrained(path / "base")
    tiny_sd_unet(0).save_pretrained(path / "sd")
    tiny_sdxl_unet(0).save_pretrained(path / "gap")
    file = path / "gap" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "conv_out.bias"}, file)
    (path / "int8").mkdir()
    config = {"_class_name": "UNet2DConditionModel", "quantization_config": {"quant_method": "torchao"}}
    (path / "int8" / "config.json").write_text(json.dumps(config))
    (path / "full").mkdir()
    (path / "full" / "mine.txt").write_text("mine")
    save_delta(extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), path / "delta.safetensors")
    save_delta(extract_delta(tiny_sd_unet(1), tiny_sd_unet(0)), path / "other.safetensors")
    (path / "text.safetensors").write_text("no weights")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("extract nowhere base -o new.safetensors", "'nowhere' does not exist"),
        ("extract sd base -o new.safetensors", "does not fit this UNet2DConditionModel"),
        ("extract text.safetensors base -o new.safetensors", "complete safetensors file"),
        ("extract base base -o delta.safetensors", "delta.safetensors exists; name another file, or pass --force"),
        ("extract base base -o full", "is a directory"),
        ("extract base base -o new.bin", "no .safetensors file"),
        ("extract base base -o new.safetensors --prediction-type x", "'--prediction-type'"),
        ("extract base base", "Missing option"),
        ("merge full delta.safetensors -o new", "model full holds no UNet"),
        ("merge delta.safetensors delta.safetensors -o new", "model delta.safetensors holds no UNet"),
        ("merge gap delta.safetensors -o new", "1 missing from the file (conv_out.bias)"),
        ("merge int8 delta.safetensors -o new", "model int8 is quantized; merge before quantizing"),
        ("merge base other.safetensors -o new", "does not fit this UNet2DConditionModel"),
        ("merge base delta.safetensors -o full", "--out full exists"),
        ("merge base delta.safetensors -o full --force", "holds more than a UNet"),
        ("merge base delta.safetensors -o text.safetensors", "is a file"),
        ("merge base delta.safetensors -o new --scale 0", "--scale 0.0 merges nothing"),
        ("merge base delta.safetensors -o new --variant fp16", "not 'fp16'"),
        ("to-lora delta.safetensors -o new.safetensors", "--rank and --energy: pass exactly one of the two"),
        ("to-lora delta.safetensors -o new.safetensors --energy 0", "--energy 0.0 must be a share"),
        ("to-lora delta.safetensors -o new.safetensors --rank 0", "'--rank'"),
        ("to-lora delta.safetensors -o new.safetensors --rank 4 --layout x", "'--layout'"),
        ("to-lora delta.safetensors -o n.safetensors --rank 4 --residual ./n.safetensors", "another output too"),
        ("to-lora delta.safetensors -o new.safetensors --rank 4 --residual other.safetensors", "--residual other"),
        ("compare a --out sheet.xyz", "--out sheet.xyz is of no kind of image that can be written"),
        ("compare a --out outputs.png --model base", "holds none of modular_model_index.json"),
        ("evaluate --demo --model nowhere/at/all", "--model nowhere/at/all does not exist"),
        ("evaluate --demo --unet full", "model full holds no UNet"),
        ("push full me/flow", "pass --token."),
        ("push nowhere me/flow", "'nowhere' does not exist"),
        ("export me/model full", "full exists; name another directory, or pass --force"),
        ("distill --config nowhere.toml", "'nowhere.toml' does not exist"),
        ("demo --out text.safetensors", "cannot write into text.safetensors"),
        ("inspect full", "holds no diffusion_pytorch_model.safetensors"),
        ("inspect text.safetensors", "complete safetensors file"),
        ("inspect delta.safetensors --base sd", "pass the base that"),
        ("inspect delta.safetensors --top -1", "'--top'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("computed"))
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    status, out, err = run(*arguments.split())
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("Error: ") and message in err
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_a_delta_twice_or_another_is_found_before_anything_is_written(run: Run, place: Path, tmp_path: Path) -> None:
    base, delta, merged, new = place / "base", place / "delta.safetensors", tmp_path / "merged", tmp_path / "new"
    assert run("merge", base, delta, "-o", merged)[0] == 0
    other = tmp_path / "other.safetensors"
    save_delta(extract_delta(tiny_sdxl_unet(2), tiny_sdxl_unet(0)), other)
    for arguments, message in (
        (("merge", merged, delta), "is merged into"),
        (("unmerge", base, delta), "no delta is merged into"),
        (("unmerge", merged, other), "that delta is not merged"),
        (("merge", base, base), "a model's whole weights"),
    ):
        status, _, err = run(*arguments, "-o", new)
        assert status == 2 and message in err.splitlines()[-1]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "other.safetensors"]
