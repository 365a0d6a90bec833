"""Every row of `docs/from-classic.md` runs, with tiny models for the Hub's and the CPU for a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionXLPipeline

import perflow_blocks
from perflow_blocks.blocks.block_source import INDEX
from perflow_blocks.testing import tiny_controlnet, tiny_image, tiny_mask, tiny_sdxl_components, tiny_vae
from perflow_blocks.testing.tiny import IMAGE_WIDTH, MAX_TOKENS, TEXT_WIDTH, load_tiny_ip_adapter
from tests.blocks.conftest import layers, write_delta
from tests.blocks.test_features_lora import write_lora
from tests.checkpoints import checkpoint_components, save_checkpoint, save_ip_adapter
from tests.conftest import make_pipeline

DOCUMENT = Path(__file__).parent.parent / "docs" / "from-classic.md"
HERE = {"h94/IP-Adapter": "adapter", '"cuda"': '"cpu"', "cpu_offload()": 'cpu_offload(device="cpu")'}
"""What a row says, and what stands for it in a test."""


def rows() -> dict[str, list[str]]:
    """By habit, the lines of code in the last column."""
    cells = [re.split(r" \| ", line.strip("| ")) for line in DOCUMENT.read_text().splitlines() if line[:2] == "| "]
    return {
        row[0]: [code for code in re.findall(r"`(.+?)`", row[-1]) if "(" in code] for row in cells if row[0] != "habit"
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the rows name."""
    folder = tmp_path_factory.mktemp("classic")
    classic = StableDiffusionXLPipeline(**checkpoint_components(), add_watermarker=False)
    for variant in (None, "fp16"):
        classic.save_pretrained(folder / "repository", variant=variant)
    save_checkpoint(folder / "model.safetensors", checkpoint_components())
    write_lora(folder, seed=1).joinpath("pytorch_lora_weights.safetensors").rename(folder / "style.safetensors")
    write_delta(folder / "perflow_delta.safetensors")
    save_ip_adapter(folder / "adapter")
    make_pipeline().save_pretrained(str(folder / "folder"))
    return folder


@pytest.fixture
def names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the rows' names stand for."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    pipe = make_pipeline()
    size = {"image_size": 224, "patch_size": 56, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.CLIPVisionConfig(**size, intermediate_size=32, projection_dim=IMAGE_WIDTH)
    public = {name: getattr(perflow_blocks, name) for name in perflow_blocks.__all__}
    return {
        **vars(diffusers.guiders),
        **public,
        "MultiControlNetModel": diffusers.MultiControlNetModel,
        "CLIPImageProcessor": transformers.CLIPImageProcessor,
        "torch": torch,
        "pipe": pipe,
        "classic": StableDiffusionXLPipeline(**tiny_sdxl_components(), add_watermarker=False),
        "repository": "repository",
        "prompt": "a red star",
        "image": tiny_image(1),
        "edges": tiny_image(2),
        "mask": tiny_mask(),
        "layers": layers(skip_attention=False, skip_ff=False, skip_attention_scores=True),
        "controlnet": tiny_controlnet(),
        "one": tiny_controlnet(1),
        "other": tiny_controlnet(2),
        "encoder": transformers.CLIPVisionModelWithProjection(encoder).eval(),
        "embeds": torch.ones(1, 1, IMAGE_WIDTH),
        "zeros": torch.zeros(1, 1, IMAGE_WIDTH),
        "vectors": torch.ones(1, TEXT_WIDTH),
        "vae": tiny_vae(3),
        "prompt_embeds": torch.ones(1, MAX_TOKENS, 2 * TEXT_WIDTH),
        "pooled": torch.ones(1, TEXT_WIDTH),
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What is uploaded without a network: the repository, and whether the folder holds an index."""
    uploads: list[tuple[str, bool]] = []
    module, card = "diffusers.modular_pipelines.modular_pipeline", SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(f"{module}.create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(f"{module}.load_or_create_model_card", lambda *_, **__: card)
    monkeypatch.setattr(f"{module}.populate_model_card", lambda card, **_: card)
    upload = lambda _, folder, name, **__: uploads.append((name, (Path(folder) / INDEX).is_file()))  # noqa: E731
    monkeypatch.setattr(diffusers.ModularPipeline, "_upload_folder", upload)
    return uploads


@pytest.mark.parametrize("habit", rows())
def test_each_row_runs(habit: str, names: dict[str, Any], hub: list[tuple[str, bool]]) -> None:
    code = rows()[habit]
    assert code
    if habit.startswith("LoRA "):
        names["pipe"].load_lora_weights("style.safetensors")
    if habit == "IP-Adapter embeddings":
        load_tiny_ip_adapter(names["pipe"])
        code = [*code, "pipe.unload_ip_adapter()"]
    for line in code:
        for there, here in HERE.items():
            line = line.replace(there, here)
        with torch.compiler.set_stance("force_eager"):
            exec(compile(line, f"{DOCUMENT.name}: {habit}", "exec"), names)
    pipe = names["pipe"]
    assert hub == ([("me/fast", True)] if habit == "publish" else [])
    assert not {"unet", "vae", "text_encoder", "text_encoder_2", "scheduler"} & set(pipe.null_component_names)
    if pipe.unet.dtype == torch.float32:
        pipe.set_progress_bar_config(disable=True)
        assert pipe(names["prompt"], num_inference_steps=1).images[0].size == (32, 32)
