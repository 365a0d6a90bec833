"""Which files `perflow extract`, `merge`, `unmerge`, `to-lora` and `inspect` read, replace and leave alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from perflow_blocks import extract_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing.tiny import tiny_sdxl_unet
from tests.cli.test_delta import Run, done

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def difference() -> dict[str, Tensor]:
    return extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory, difference: dict[str, Tensor]) -> Path:
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    save_delta(difference, path, dtype=torch.float32)
    return path


@pytest.fixture
def published(tmp_path: Path, difference: dict[str, Tensor]) -> Path:
    """A delta as the authors publish it: a UNet's folder, of which there is one variant alone."""
    unet = tiny_sdxl_unet(0)
    unet.load_state_dict(difference)
    unet.save_pretrained(tmp_path / "published", variant="v0-1")
    return tmp_path / "published"


def refused(run: Run, *arguments: object) -> str:
    status, _, err = run(*arguments)
    assert status == 2
    return err.splitlines()[-1]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def state(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    model: Any = UNet2DConditionModel.from_pretrained(folder, variant=variant)
    return model.state_dict()


def assert_merged(folder: Path, variant: str | None = None, tolerance: float = 1e-6) -> None:
    found = state(folder, variant)
    for name, tensor in tiny_sdxl_unet(1).state_dict().items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=tolerance, atol=tolerance, msg=name)


def test_force_replaces_what_it_names_and_deletes_nothing_else(run: Run, delta: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_sdxl_unet(0).save_pretrained(base)
    tiny_sdxl_unet(0).half().save_pretrained(base, variant="fp16")
    for other in ("README.md", "mydelta.safetensors", f"{STEM}.bin"):
        (base / other).write_text("mine")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for variant, kept in ((["--variant", "fp16"], f"{STEM}.safetensors"), ([], f"{STEM}.fp16.safetensors")):
        message = refused(run, "merge", base, delta, "-o", base, "--force", *variant)
        for name in ("README.md", "mydelta.safetensors", f"{STEM}.bin", kept):
            assert name in message
        assert "--force does not delete" in message and "config.json" not in message
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    for other in ("README.md", "mydelta.safetensors", f"{STEM}.bin", f"{STEM}.safetensors"):
        (base / other).unlink()
    (base / "more").mkdir()
    assert "holds more too" in refused(run, "merge", base, delta, "-o", base, "--force", "--variant", "fp16")
    (base / "more").rmdir()
    done(run, "merge", base, delta, "-o", base, "--force", "--variant", "fp16")
    assert names(base) == ["config.json", f"{STEM}.fp16.safetensors"]
    assert_merged(base, "fp16", 2e-3)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_replaced_with_their_index(run: Run, delta: Path, tmp_path: Path, variant: str | None) -> None:
    base = tmp_path / "base"
    tiny_sdxl_unet(0).save_pretrained(base, variant=variant, max_shard_size="100KB")
    assert len(names(base)) > 4
    done(run, "merge", base, delta, "-o", base, "--force")
    assert names(base) == ["config.json", f"{STEM}.safetensors" if variant is None else f"{STEM}.fp16.safetensors"]
    assert_merged(base, variant)


def test_another_unets_folder_is_replaced_where_it_holds_only_that(run: Run, delta: Path, tmp_path: Path) -> None:
    tiny_sdxl_unet(0).save_pretrained(tmp_path / "base", variant="fp16")
    tiny_sdxl_unet(2).save_pretrained(tmp_path / "old")
    done(run, "merge", tmp_path / "base", delta, "-o", tmp_path / "old", "--force")
    assert names(tmp_path / "old") == ["config.json", f"{STEM}.safetensors"]
    assert_merged(tmp_path / "old")


def test_a_delta_as_it_is_published_goes_in_and_out(run: Run, published: Path, tmp_path: Path) -> None:
    tiny_sdxl_unet(0).save_pretrained(tmp_path / "base")
    one, two, lora = tmp_path / "one", tmp_path / "two", tmp_path / "lora.safetensors"
    done(run, "merge", tmp_path / "base", published, "-o", one)
    assert_merged(one)
    assert names(one) == ["config.json", f"{STEM}.safetensors"]
    done(run, "unmerge", one, published, "-o", two)
    back = state(two)
    for name, tensor in tiny_sdxl_unet(0).state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    done(run, "to-lora", published, "-o", lora, "--rank", 2, "--device", "cpu")
    assert done(run, "inspect", published).splitlines()[0] == f"{published}: UNet folder, delta"

    save_file({"conv_in.bias": torch.ones(16)}, published / f"{STEM}.v0-2.safetensors")
    chosen = ("--delta-variant", "v0-1")
    for command in (("merge", tmp_path / "base"), ("unmerge", one)):
        out = tmp_path / f"{command[0]}-again"
        message = refused(run, *command, published, "-o", out)
        assert "'v0-1', 'v0-2' and no variant was named" in message and "variant=" not in message
        done(run, *command, published, "-o", out, *chosen)
    assert_merged(tmp_path / "merge-again")
    assert "no variant was named" in refused(run, "to-lora", published, "-o", lora, "--rank", 2, "--force")
    done(run, "to-lora", published, "-o", lora, "--rank", 2, "--force", "--variant", "v0-1", "--device", "cpu")
    base = ("--base", published, "--base-variant")
    assert "of the model" not in done(run, "inspect", published, "--variant", "v0-1", *base, "v0-1")
    assert "has no " in refused(run, "inspect", published, "--variant", "v0-1", *base, "v0-2")


def test_whole_weights_make_no_lora_and_a_delta_has_no_delta(run: Run, delta: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out.safetensors"
    tiny_sdxl_unet(0).save_pretrained(base)
    assert "a model's whole weights" in refused(run, "to-lora", base, "-o", out, "--rank", 2)
    for pair, which in (((delta, base), "student"), ((base, delta), "base")):
        assert f"the {which} {delta} holds differences" in refused(run, "extract", *pair, "-o", out)
    assert not out.exists()


def test_an_old_residual_does_not_stay_beside_a_lora_without_one(
    run: Run, difference: dict[str, Tensor], tmp_path: Path
) -> None:
    delta, lora, residual = (tmp_path / f"{name}.safetensors" for name in ("delta", "lora", "residual"))
    save_file({name: difference[name] for name in difference if name.endswith("to_q.weight")}, delta)
    arguments = ("to-lora", delta, "-o", lora, "--rank", 2, "--device", "cpu", "--force")
    assert "Nothing is left" in done(run, *arguments)
    residual.write_text("old")
    out = done(run, *arguments, "--residual", residual)
    assert "no residual is written" in out and not residual.exists()
    shutil.copy(delta, residual)
    for option in (("-o", delta), ("--residual", delta)):
        assert "is the delta or another output" in refused(run, *arguments, *option)
        assert delta.read_bytes() == residual.read_bytes()
