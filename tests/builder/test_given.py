"""Models that are given, and shared ones that were changed since: no adapter is lost, kept or switched off unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perflow_blocks import PeRFlowPipelineBuilder
from perflow_blocks.testing import load_tiny_ip_adapter
from perflow_blocks.testing.tiny import tiny_sdxl_components, tiny_sdxl_unet
from tests.blocks.conftest import write_delta
from tests.blocks.test_features_lora import write_lora
from tests.conftest import builder, latents, make_pipeline, problems
from tests.hub.conftest import save_ip_adapter

IP_FILE = "ip-adapter_sdxl.safetensors"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("loras") / "ink", seed=1)


@pytest.fixture(scope="module")
def ip_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_ip_adapter(folder)
    return folder


def with_ip_adapter(chain: PeRFlowPipelineBuilder, folder: Path) -> PeRFlowPipelineBuilder:
    return chain.with_ip_adapter(folder, subfolder="sdxl_models", weight_name=IP_FILE)


def failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("no")


def test_a_lora_of_another_pipeline_is_told_and_stays(
    repository: Path, tmp_path: Path, lora: Path, loads: list[str]
) -> None:
    unet = tiny_sdxl_unet()
    given = builder(repository).with_unet(unet)
    first = given.with_lora(lora, adapter_name="s").build()
    before = latents(first)
    loads.clear()
    delta = write_delta(tmp_path / "delta.safetensors")
    for chain in (given.with_lora(lora, adapter_name="s").with_delta(delta), given.with_lora(lora, 0.5, "other")):
        assert "the unet that is given holds LoRAs already (s)" in problems(chain)
    assert loads == []
    assert list(unet.peft_config) == ["s"]
    assert torch.equal(latents(first), before)


def test_what_a_builder_put_into_a_given_unet_is_not_taken_for_its_own(
    repository: Path, lora: Path, ip_adapter: Path
) -> None:
    unet = tiny_sdxl_unet()
    given = builder(repository).with_unet(unet)
    changed = given.with_lora(lora).build()
    assert "holds LoRAs already (ink)" in problems(given)
    changed.unload_lora_weights()
    assert torch.equal(latents(given.build()), latents(make_pipeline()))
    pictured = with_ip_adapter(given, ip_adapter).build()
    assert "the unet that is given holds an IP-Adapter already" in problems(given)
    pictured.unload_ip_adapter()
    assert given.problems() == []


def test_adapters_of_ones_own_stay(repository: Path, lora: Path) -> None:
    own = make_pipeline()
    own.load_lora_weights(lora, adapter_name="own")
    chain = builder(repository).with_unet(own.unet).with_text_encoder(own.text_encoder)
    pipe = chain.with_text_encoder(own.text_encoder_2, number=2).build()
    assert torch.equal(latents(pipe), latents(own))
    assert chain.with_guidance(1.5).with_config(num_time_windows=4).problems() == []
    assert "holds LoRAs already (own)" in problems(chain.with_lora(lora, adapter_name="s"))


def test_encoders_that_hold_the_lora_already_are_told(repository: Path, lora: Path) -> None:
    """The UNet is another one, so that diffusers would load the LoRA into all three again."""
    encoder = tiny_sdxl_components()["text_encoder_2"]
    chain = builder(repository).with_text_encoder(encoder, number=2).with_lora(lora)
    chain.build()
    assert chain.problems() == []
    assert "the text_encoder_2 that is given holds LoRAs already (ink)" in problems(chain.with_unet(tiny_sdxl_unet()))


CHANGES: dict[str, Callable[[Any, Path], Any]] = {
    "taken out": lambda pipe, other: pipe.unload_lora_weights(),
    "deleted": lambda pipe, other: pipe.unet.delete_adapters("ink"),
    "another one": lambda pipe, other: pipe.load_lora_weights(other, adapter_name="other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_whose_loras_were_changed_is_not_shared(
    repository: Path, tmp_path: Path, lora: Path, change: str
) -> None:
    chain = builder(repository).with_lora(lora)
    first = chain.build()
    expected = latents(first)
    CHANGES[change](first, write_lora(tmp_path / "other", seed=2))
    assert "shared, from" + f" {repository}/unet" not in chain.describe()
    again = chain.build()
    assert again.unet is not first.unet and again.vae is first.vae
    assert torch.equal(latents(again), expected)


def test_a_unet_whose_ip_adapter_was_taken_out_is_not_shared(repository: Path, ip_adapter: Path) -> None:
    chain = with_ip_adapter(builder(repository), ip_adapter)
    first = chain.build()
    assert chain.build().unet is first.unet
    first.unload_ip_adapter()
    assert chain.build().unet is not first.unet


@pytest.mark.parametrize("failure", ["set_adapters", "ip-adapter", "its scale", "device"])
def test_a_failure_leaves_given_models_and_the_manager_as_they_were(
    repository: Path, lora: Path, ip_adapter: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    parts = tiny_sdxl_components()
    chain = builder(repository, collection="own").with_lora(lora)
    chain.build()
    manager = chain.components_manager
    held, collections = dict(manager.components), {name: set(ids) for name, ids in manager.collections.items()}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        chain = chain.with_component(name, parts[name])
    chain = with_ip_adapter(chain, ip_adapter)
    assert chain.problems() == []
    processors, names = dict(parts["unet"].attn_processors), list(parts["unet"].state_dict())
    targets: dict[str, tuple[Any, str]] = {
        "set_adapters": (type(parts["unet"]), "set_adapters"),
        "ip-adapter": (type(parts["unet"]), "_convert_ip_adapter_image_proj_to_diffusers"),
        "its scale": (type(make_pipeline()), "set_ip_adapter_scale"),
        "device": (type(make_pipeline()), "to"),
    }
    monkeypatch.setattr(*targets[failure], failing)
    with pytest.raises((ValueError, RuntimeError), match=r"^(nothing was built: with_(lora|ip_adapter.*): )?no$"):
        chain.on("cpu").build()
    assert manager.components == held and manager.collections == collections
    assert list(parts["unet"].state_dict()) == names
    assert all(parts["unet"].attn_processors[name] is found for name, found in processors.items())
    assert parts["unet"].encoder_hid_proj is None and parts["unet"].config.encoder_hid_dim_type is None
    assert not any(getattr(parts[name], "peft_config", None) for name in ("unet", "text_encoder", "text_encoder_2"))
    assert torch.equal(latents(make_pipeline(**parts)), latents(make_pipeline()))


def test_an_ip_adapter_that_fails_leaves_the_one_that_was_there(repository: Path, ip_adapter: Path) -> None:
    own = make_pipeline()
    load_tiny_ip_adapter(own)
    processors, projection = dict(own.unet.attn_processors), own.unet.encoder_hid_proj
    text = problems(with_ip_adapter(builder(repository).with_unet(own.unet), ip_adapter))
    assert "the unet that is given holds an IP-Adapter already" in text
    assert own.unet.encoder_hid_proj is projection
    assert all(own.unet.attn_processors[name] is found for name, found in processors.items())


def test_an_ip_adapter_at_the_top_of_its_directory(repository: Path, ip_adapter: Path) -> None:
    chain = builder(repository).with_ip_adapter(ip_adapter / "sdxl_models", subfolder=None, weight_name=IP_FILE)
    assert chain.build().unet.encoder_hid_proj is not None


@pytest.mark.parametrize("damage", ["width", "lacking", "projection"])
def test_an_ip_adapter_for_another_unet_is_told_before_anything_is_loaded(
    repository: Path, tmp_path: Path, ip_adapter: Path, loads: list[str], damage: str
) -> None:
    tensors = load_file(ip_adapter / "sdxl_models" / IP_FILE)
    name = "ip_adapter.1.to_k_ip.weight"
    match damage:
        case "width":
            tensors[name] = torch.ones(tensors[name].shape[0], 77)
        case "lacking":
            del tensors[name]
        case "projection":
            tensors = {key: tensor for key, tensor in tensors.items() if "image_proj" not in key}
    (tmp_path / "sdxl_models").mkdir()
    save_file(tensors, tmp_path / "sdxl_models" / IP_FILE)
    chain = with_ip_adapter(builder(repository), tmp_path).with_component(
        "image_encoder", str(ip_adapter), subfolder="sdxl_models/image_encoder"
    )
    text = problems(chain)
    assert "is no IP-Adapter for this UNet: " in text
    assert {"width": "instead of", "lacking": "1 missing", "projection": "no image_proj"}[damage] in text
    assert loads == []
