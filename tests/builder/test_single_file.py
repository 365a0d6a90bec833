"""Checkpoints in one file, loaded without network by a local directory of configurations."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perflow_blocks import PeRFlowPipelineBuilder
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing.tiny import tiny_vae
from tests.builder.conftest import MODELS, checkpoint_components, save_checkpoint, unet_keys
from tests.conftest import LOADABLE, latents, make_pipeline, problems, python, save_repository

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_repository(tmp_path_factory.mktemp("repository") / "tiny", **checkpoint_components())


@pytest.fixture(scope="module")
def config(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations, tokenizers and scheduler, without weights."""
    folder = tmp_path_factory.mktemp("config") / "sdxl"
    return Path(shutil.copytree(repository, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tuned.safetensors", checkpoint_components())


def single(checkpoint: Path, config: Path | None, **settings: Any) -> PeRFlowPipelineBuilder:
    return PeRFlowPipelineBuilder().from_single_file(checkpoint, config=config, **settings)


def test_a_checkpoint_is_the_models_it_was_written_from(checkpoint: Path, config: Path) -> None:
    pipe = single(checkpoint, config).build()
    for name in MODELS:
        expected = checkpoint_components()[name].state_dict()
        found = getattr(pipe, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not getattr(pipe, name).training
    assert torch.equal(latents(pipe), latents(make_pipeline(**checkpoint_components())))


def test_it_takes_a_delta(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    delta = tmp_path / "delta.safetensors"
    save_delta({k: torch.full_like(w, 1e-2) for k, w in checkpoint_components()["unet"].state_dict().items()}, delta)
    pipe = single(checkpoint, config).with_delta(delta).build()
    expected = latents(make_pipeline(**checkpoint_components()), delta=delta)
    assert torch.equal(latents(pipe), expected)
    assert not torch.equal(expected, latents(make_pipeline(**checkpoint_components())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_converted(checkpoint: Path, config: Path, dtype: torch.dtype) -> None:
    pipe = single(checkpoint, config, dtype=dtype).build()
    assert {getattr(pipe, name).dtype for name in MODELS} == {dtype}
    expected = checkpoint_components()["unet"].to(dtype).state_dict()
    assert all(torch.equal(weight, expected[key]) for key, weight in pipe.unet.state_dict().items())


def test_nothing_is_fetched(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    """In a process with an empty cache, where every connection is an error."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from perflow_blocks import PeRFlowPipelineBuilder\n"
        "pipe = PeRFlowPipelineBuilder().from_single_file(sys.argv[1], config=sys.argv[2]).build()\n"
        "print(pipe.unet.dtype, pipe.null_component_names)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    assert "torch.float32" in python("-c", code, checkpoint, config, environment=environment)


def test_it_is_loaded_once_and_given_parts_not_at_all(
    checkpoint: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    for kind in LOADABLE[:2]:
        original = kind.from_single_file

        def counted(cls: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            read.append(cls.__name__)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_single_file", classmethod(counted))
    vae = tiny_vae(5)
    chain = single(checkpoint, config)
    first = chain.with_vae(vae).build()
    assert (read, first.vae is vae) == (["UNet2DConditionModel"], True)
    second = chain.with_guidance(1.5).build()
    assert read == ["UNet2DConditionModel", "AutoencoderKL"]
    assert first.unet is second.unet and first.text_encoder_2 is second.text_encoder_2


@pytest.mark.parametrize("lacking", [("vae",), ("text_encoder", "text_encoder_2")])
def test_what_a_checkpoint_lacks_is_in_its_configuration_or_told(
    config: Path, repository: Path, tmp_path: Path, lacking: tuple[str, ...]
) -> None:
    file = save_checkpoint(tmp_path / "part.safetensors", checkpoint_components(), leave_out=lacking)
    text = problems(single(file, config))
    assert all(f"{name}: " in text and "holds no weights" in text for name in lacking)
    assert torch.equal(latents(single(file, repository).build()), latents(make_pipeline(**checkpoint_components())))
    given = single(file, config)
    for name in lacking:
        given = given.with_component(name, checkpoint_components()[name])
    assert given.problems() == []


def test_mistakes(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:-1])
    tensors = load_file(checkpoint)
    other = tmp_path / "other.safetensors"
    save_file({k: t for k, t in tensors.items() if "label_emb" not in k}, other)
    wide = tmp_path / "wide.safetensors"
    name = next(name for name in unet_keys(checkpoint_components()["unet"]) if "attn2.to_k" in name)
    save_file({**tensors, name: torch.ones(tensors[name].shape[0], 77)}, wide)
    partial = tmp_path / "partial.safetensors"
    save_file({k: t for k, t in tensors.items() if k != name}, partial)
    nothing = tmp_path / "nothing.safetensors"
    save_file({"weight": torch.ones(2)}, nothing)
    pickled = tmp_path / "model.ckpt"
    torch.save(tensors, pickled)
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "does not exist": single(tmp_path / "no.safetensors", config),
        "is no .safetensors file": single(pickled, config),
        "is no complete safetensors file": single(truncated, config),
        "holds no UNet": single(nothing, config),
        "of another family than the configuration: it has no label_emb": single(other, config),
        "instead of": single(wide, config),
        "1 missing from the file": single(partial, config),
        "holds no model_index.json": single(checkpoint, empty),
        "dtype='half' is wrong": single(checkpoint, config, dtype="half"),
    }
    for text, built in cases.items():
        assert text in problems(built)
        assert built.components_manager.components == {}


def test_a_unet_that_is_given_need_not_be_like_the_file_s(checkpoint: Path, config: Path) -> None:
    unet = checkpoint_components()["unet"]
    wider = type(unet).from_config({**unet.config, "in_channels": 9})
    assert single(checkpoint, config).with_unet(wider).build().unet is wider
