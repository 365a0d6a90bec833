"""Every message that `docs/troubleshooting.md` quotes is provoked, and must be what the page says."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, ModularPipeline
from PIL import Image

from perflow_blocks import (
    AttentionConfig,
    PeRFlowModularPipeline,
    PeRFlowScheduler,
    PeRFlowSDXLAutoBlocks,
    StepCallbackStep,
    export_workflow,
    insert_loop_block,
    merge_delta,
    push_workflow,
    rescale_delta,
)
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing import tiny_image, tiny_sdxl_components
from perflow_blocks.testing.tiny import tiny_sd_unet, tiny_sdxl_unet
from perflow_blocks.training.data import open_rows
from perflow_blocks.training.loop import train
from tests.blocks.conftest import make_float16_overflow, write_delta
from tests.blocks.test_features_lora import write_lora
from tests.blocks.test_vae import LATENTS, decoded, overflowing
from tests.conftest import make_pipeline
from tests.training.conftest import small, tiny_config, write_config

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"^```text\n(.+)\n```$", PAGE.read_text(), flags=re.MULTILINE)
OF_OTHERS = {"requires a different Python", "requires torchvision", "CUDA out of memory", "on the same device"}
"""Parts of quotes that pip, transformers and torch write, on other machines than this."""


class Here(NamedTuple):
    """What a provocation may use."""

    folder: Path
    patch: pytest.MonkeyPatch
    perflow: Callable[..., tuple[int, str, str]]  # runs the command
    teachers: dict[str, Path]

    def delta(self, recipe: DeltaRecipe | None = None) -> Path:
        return write_delta(self.folder / "delta.safetensors", recipe)

    def call(self, pipe: Any = None, **inputs: Any) -> None:
        (pipe or make_pipeline())(**{"prompt": "a star", "num_inference_steps": 4, "output_type": "latent", **inputs})


PROVOKED: dict[str, Callable[[Here], object]] = {}
"""How a user comes to a message, by a part of it."""


def provokes(part: str) -> Callable[[Callable[[Here], object]], None]:
    def keep(how: Callable[[Here], object]) -> None:
        PROVOKED[part] = how

    return keep


@provokes("distill needs")
def _(here: Here) -> None:
    here.patch.setattr(import_module("perflow_blocks.cli.distill"), "find_spec", lambda name: None)
    here.perflow("distill", "--config", write_config(here.folder, "demo"))


@provokes("PEFT backend")
def _(here: Here) -> None:
    here.patch.setattr("diffusers.loaders.lora_base.USE_PEFT_BACKEND", False)
    make_pipeline().load_lora_weights(write_lora(here.folder, seed=1))


PROVOKED |= {
    "option of from_pretrained": lambda here: PeRFlowModularPipeline.from_pretrained("owner/name", variant="fp16"),
    "call pipe.load_components()": lambda here: make_pipeline(unet=None)("a star"),
    "holds a model's whole weights": lambda here: merge_delta(tiny_sdxl_unet(), tiny_sdxl_unet().state_dict()),
    "prediction_type='epsilon'": lambda here: PeRFlowScheduler.from_config(
        EulerDiscreteScheduler(prediction_type="epsilon").config
    ),
    "is not an input": lambda here: here.call(num_inference_step=4),
    "below num_time_windows": lambda here: here.call(num_inference_steps=3),
    "values from 0 to 255": lambda here: here.call(image=np.asarray(tiny_image()).astype("float32")),
    "was set, is replaced": lambda here: here.call(make_pipeline(scheduler=EulerDiscreteScheduler())),
    "paints nothing": lambda here: here.call(image=tiny_image(), mask_image=Image.new("L", tiny_image().size)),
    "decoded images are not finite": lambda here: decoded(overflowing("decoder"), LATENTS[:1].half()),
    "attention strategy": lambda here: here.call(make_pipeline(attention=AttentionConfig("sage"))),
    "data.path": lambda here: open_rows(small("folder", here.folder / "no")),
    "the training diverged": lambda here: train(
        tiny_config(here.folder, here.teachers["sd"], optimizer__learning_rate=1e18, optimizer__max_grad_norm=1e9)
    ),
    "unknown; did you mean": lambda here: tiny_config(here.folder, "demo", optimizer__learning_rat=1.0),
    "--device cuda": lambda here: here.perflow("generate", "a star", "--device", "cuda:63"),
}


@provokes("does not fit this")
def _(here: Here) -> None:
    merge_delta(tiny_sd_unet(), here.delta())


@provokes("is a LoRA and not a delta")
def _(here: Here) -> None:
    merge_delta(tiny_sdxl_unet(), write_lora(here.folder, seed=1) / "pytorch_lora_weights.safetensors")


@provokes("holds the variants")
def _(here: Here) -> None:
    for variant in ("fp16", "v0-1"):
        tiny_sdxl_unet().save_pretrained(here.folder / "delta", variant=variant)
    here.call(delta=here.folder / "delta")


@provokes("has blocks of its own")
def _(here: Here) -> None:
    config = {"auto_map": {"ModularPipelineBlocks": "block.SavedBlocks"}}
    (here.folder / "modular_config.json").write_text(json.dumps(config))
    PeRFlowModularPipeline.from_pretrained(here.folder)


@provokes("not a complete safetensors file")
def _(here: Here) -> None:
    delta = here.delta()
    delta.write_bytes(delta.read_bytes()[:-9])
    here.call(delta=delta)


@provokes("another thread changed the deltas")
def _(here: Here) -> None:
    pipe = make_pipeline()
    merge_delta(pipe.unet, here.delta())
    other = threading.Thread(target=rescale_delta, args=(pipe.unet, 0.5))

    def change(*_: Any) -> None:
        other.start()
        other.join()

    pipe.text_encoder_2.register_forward_pre_hook(change)
    here.call(pipe)


@provokes("the merged delta was distilled with")
def _(here: Here) -> None:
    pipe = make_pipeline()
    pipe.update_components(prediction_type="velocity")
    here.call(pipe, delta=here.delta(DeltaRecipe(prediction_type="ddim_eps")))


@provokes("latents are not finite")
def _(here: Here) -> None:
    pipe = make_pipeline().to(torch.float16)
    make_float16_overflow(pipe.unet)
    here.call(pipe)


@provokes("has the LoRA")
def _(here: Here) -> None:
    pipe = make_pipeline()
    pipe.load_lora_weights(write_lora(here.folder, seed=1))
    pipe.save_pretrained(here.folder / "saved")


@provokes("no other process can import")
def _(here: Here) -> None:
    class InAFunction(StepCallbackStep):
        pass

    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "mine", InAFunction, after="solver")
    make_pipeline(blocks).save_pretrained(here.folder / "saved")


@provokes("No pipeline blocks")
def _(here: Here) -> None:
    make_pipeline().save_pretrained(here.folder / "saved")
    made = ModularPipeline.from_pretrained(str(here.folder / "saved"), trust_remote_code=True)
    made.update_components(**tiny_sdxl_components())
    here.call(made)
    made.save_pretrained(str(here.folder / "again"), overwrite_modular_index=True)
    ModularPipeline.from_pretrained(str(here.folder / "again"))


@provokes("no token for the Hub")
def _(here: Here) -> None:
    here.patch.setattr("perflow_blocks.hub.push.get_token", lambda: None)
    export_workflow(make_pipeline(), here.folder / "workflow", weights="include")
    push_workflow(here.folder / "workflow", "owner/name")


@provokes("holds checkpoints up to")
def _(here: Here) -> None:
    (here.folder / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    train(tiny_config(here.folder, here.teachers["sd"]))


@pytest.mark.parametrize("part", PROVOKED)
def test_a_message_is_what_the_page_quotes(
    part: str,
    run: Callable[..., tuple[int, str, str]],
    teachers: dict[str, Path],
    fresh_accelerate: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (quote,) = (quote for quote in QUOTES if part in quote)
    printed: list[str] = []

    def perflow(*arguments: object) -> tuple[int, str, str]:
        printed.append((done := run(*arguments))[2])
        return done

    root = logging.getLogger("perflow_blocks")
    root.addHandler(caplog.handler)
    try:
        PROVOKED[part](Here(tmp_path, monkeypatch, perflow, teachers))
    except (ValueError, ImportError) as error:
        printed.append(str(error))
    finally:
        root.removeHandler(caplog.handler)
    pattern = ".+?".join(map(re.escape, quote.split("…")))
    assert re.search(pattern, " ".join([*printed, caplog.text]), flags=re.DOTALL)


def test_every_quote_is_provoked() -> None:
    known = (*PROVOKED, *OF_OTHERS)
    assert [quote for quote in QUOTES if sum(part in quote for part in known) != 1] == []
    assert len(QUOTES) == len(known)
