"""README and docs: every block of Python runs, with the embedded model in place of the Hub's, and every link works."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

import perflow_blocks
from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.attention import strategies
from perflow_blocks.blocks.loop_block import LOOP_PROVIDES
from perflow_blocks.blocks.recombine import find_loops
from perflow_blocks.delta.extract import extract_delta, save_delta
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline, weights_directory
from perflow_blocks.hub.push import push_workflow
from perflow_blocks.testing import check_block, tiny_image, tiny_unconditional_unet
from perflow_blocks.testing.contract import BlockContractError
from perflow_blocks.testing.tiny import tiny_sd_components, tiny_sd_unet
from tests.checkpoints import checkpoint_components, save_checkpoint, save_ip_adapter
from tests.conftest import run, save_repository
from tests.hub.loopback import LoopbackHub

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (README, *sorted((ROOT / "docs").rglob("*.md")))}
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
IN_FILE = re.compile(r"^(?:.* )?`(\w+\.py)`.*:\n\n\Z", flags=re.MULTILINE)
"""Before a block: the file that it is written into."""
ON_THIS_MACHINE = {
    '"cuda"': '"cpu"',
    "torch.float16": "torch.float32",
    "enable_model_cpu_offload()": 'enable_model_cpu_offload(device="cpu")',
    "your-name/": "someone/",
}
IN_PLACE_OF = {
    'config="stabilityai/stable-diffusion-xl-base-1.0"': "config",
    '"dreamshaperXL.safetensors"': "checkpoint.safetensors",
    'with_delta("perflow_delta.safetensors"': "delta.safetensors",
    '"stabilityai/stable-diffusion-xl-base-1.0"': "base",
    '"hansyan/perflow-sdxl-dreamshaper"': "few-step",
    '"diffusers/controlnet-canny-sdxl-1.0"': "controlnet",
    '"runs/task-models/controlnet"': "controlnet",
    '"xinsir/controlnet-union-sdxl-1.0"': "union",
    '"h94/IP-Adapter"': "adapter",
    '"runs/task-models/ip-adapter"': "small-adapter",
    '"anton-l/ddpm-ema-flowers-64"': "unconditional",
    '"runs/flowers/delta.safetensors"': "unconditional.safetensors",
    '"stable-diffusion-v1-5/stable-diffusion-v1-5"': "sd",
    '"hansyan/perflow-sd15-delta-weights"': "sd-delta",
}
"""What `hub` holds under which name; only the string in quotation marks is replaced."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages load from elsewhere, made for the embedded model and named as in `IN_PLACE_OF`.

    diffusers tells the text encoders in a single file apart by their widths, which are equal in the embedded model.
    So the single file and its delta are of the tiny components.
    """
    folder, classic, tiny = tmp_path_factory.mktemp("hub"), teacher_pipeline(), checkpoint_components()
    classic.save_pretrained(folder / "base")
    classic.save_pretrained(folder / "base", variant="fp16")
    classic.save_pretrained(folder / "few-step", variant="v0-fix")
    channels = (16, 32, 32)  # two levels, as the embedded VAE has
    controlnet = ControlNetModel.from_unet(classic.unet, conditioning_embedding_out_channels=channels)
    controlnet.save_pretrained(folder / "controlnet")
    widths = {"num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 32}
    ControlNetUnionModel.from_config({**controlnet.config, **widths}).save_pretrained(folder / "union")
    save_ip_adapter(folder / "adapter", classic.unet)
    small = shutil.copytree(folder / "adapter" / "sdxl_models", folder / "small-adapter")
    (small / "ip-adapter_sdxl.safetensors").rename(small / "ip-adapter.safetensors")
    CLIPImageProcessor().save_pretrained(small / "feature_extractor")
    save_repository(folder / "config", **tiny)
    save_checkpoint(folder / "checkpoint.safetensors", tiny)
    difference = {name: torch.zeros_like(weight) for name, weight in tiny["unet"].named_parameters()}
    save_delta(difference, folder / "delta.safetensors")
    unet = tiny_unconditional_unet()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "unconditional")
    save_delta(extract_delta(unet, unet), folder / "unconditional.safetensors")
    StableDiffusionPipeline(**tiny_sd_components()).save_pretrained(folder / "sd")
    sd_delta = tiny_sd_unet()
    sd_delta.load_state_dict(extract_delta(tiny_sd_unet(1), tiny_sd_unet(0)))
    sd_delta.save_pretrained(folder / "sd-delta", variant="v0-1")
    return folder


@pytest.fixture
def folder(loopback_hub: LoopbackHub, own_modules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the files that the pages read; what they push is laid out in it to be loaded."""

    def push(directory: str, repo_id: str, dry_run: bool = False) -> Any:
        where: Any = {"endpoint": loopback_hub.endpoint, "token": loopback_hub.token}
        report = push_workflow(directory, repo_id, **where, dry_run=dry_run)
        for path, content in () if dry_run else loopback_hub.files(repo_id).items():
            (tmp_path / repo_id / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / repo_id / path).write_bytes(content)
        return report

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(perflow_blocks, "push_workflow", push)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda place: place)
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))
    for name in ("photo", "edges", "depth", "mask"):
        tiny_image(len(name), 64).save(f"{name}.png")
    shutil.copy(weights_directory() / "perflow_delta.safetensors", tmp_path)
    layer = "unet.mid_block.attentions.0.proj_in.lora_{}.weight"  # of 128 channels
    lora = {layer.format("A"): torch.full((4, 128), 0.01), layer.format("B"): torch.full((128, 4), 0.01)}
    save_file(lora, "style.safetensors")
    return tmp_path


def after_blocks(defined: dict[str, Any], folder: Path) -> None:
    for name in ("test_damp_step", "test_pipeline"):
        getattr(import_module("test_damp"), name)()
    step = defined["DampStep"]
    undeclared = type("DampStep", (step,), {"inputs": step().inputs[:1]})
    with pytest.raises(BlockContractError) as raised:
        check_block(undeclared())
    assert f"\n{raised.value}\n" in PAGES["docs/blocks.md"]


def after_controlnet(defined: dict[str, Any], folder: Path) -> None:
    assert defined["image"].size == (64, 64) and defined["pipe"].controlnet.config.num_control_type


def after_ready_made_blocks(defined: dict[str, Any], folder: Path) -> None:
    assert (folder / "preview-2.png").is_file() and not (folder / "preview-3.png").is_file()
    assert (defined["hits"], defined["misses"]) == (3, 1)
    assert (folder / "star-3.png").is_file()


def after_upscaling(defined: dict[str, Any], folder: Path) -> None:
    assert defined["image"].size == (128, 128)


def after_share(defined: dict[str, Any], folder: Path) -> None:
    assert {"picture.png", "unet"} <= {path.name for path in (folder / "someone" / "my-workflow").iterdir()}
    torch.testing.assert_close(run(defined["pipe"]), run(perflow_pipeline()), atol=1e-4, rtol=1e-4)


AFTERWARDS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "docs/blocks.md": after_blocks,
    "docs/controlnet.md": after_controlnet,
    "docs/ready-made-blocks.md": after_ready_made_blocks,
    "docs/share.md": after_share,
    "docs/upscaling.md": after_upscaling,
}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if BLOCK.search(text)])
def test_the_python_of_a_page_runs(page: str, hub: Path, folder: Path) -> None:
    text, defined = PAGES[page], dict[str, Any]()
    here = {name: re.sub('".*"', repr(str(hub / place)), name) for name, place in IN_PLACE_OF.items()}
    for found in BLOCK.finditer(text):
        code = found[1]
        for name, replacement in {**here, **ON_THIS_MACHINE}.items():
            code = code.replace(name, replacement)
        if file := IN_FILE.search(text, 0, found.start()):
            (folder / file[1]).write_text(code)
            continue
        lines_above = "\n" * text.count("\n", 0, found.start(1))  # tracebacks name the page's line
        with torch.compiler.set_stance("force_eager"):  # compiling for a CPU takes minutes
            exec(compile(lines_above + code, ROOT / page, "exec"), defined)
    if page in AFTERWARDS:
        AFTERWARDS[page](defined, folder)


def test_the_table_of_the_loop_s_state_names_all_that_the_loops_hold() -> None:
    table = PAGES["docs/blocks.md"].partition("| name |")[2]
    cells = re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    loops = find_loops(PeRFlowSDXLAutoBlocks())
    assert named == {entry.name for loop in loops for entry in loop.inputs} | LOOP_PROVIDES


def links(page: str) -> list[tuple[Path, str]]:
    """Target and anchor of each link and image, those to other places left out."""
    found = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in link]
    return [((ROOT / page).parent / path if path else ROOT / page, anchor) for path, _, anchor in found]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_work(page: str) -> None:
    missing = [(target, anchor) for target, anchor in links(page) if not target.exists()]
    assert missing == []
    assert all(anchor in anchors(target.read_text()) for target, anchor in links(page) if anchor)


def test_a_link_leads_to_every_page() -> None:
    linked = {target.resolve() for page in PAGES for target, _ in links(page)}
    assert [page for page in PAGES if page != "README.md" and (ROOT / page).resolve() not in linked] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
