"""The example files for the trainer: accelerate reads its own, `load_config` ours, and the page names all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel

from perflow_blocks.training.config import load_config

DOCS = Path(__file__).parent.parent.parent / "docs"
LAUNCHES = sorted((DOCS / "training").glob("*.yaml"))
SETTINGS = sorted((DOCS / "training").glob("*.toml"))


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_takes_every_launch_file(path: Path) -> None:
    kinds = {
        "multi_gpu": DistributedType.MULTI_GPU,
        "fsdp": DistributedType.FSDP,
        "deepspeed_zero2": DistributedType.DEEPSPEED,
    }
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == kinds[path.stem] and config.mixed_precision == "bf16"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "x.py"])
    read, _, _ = _validate_launch_command(arguments)
    assert read.num_processes == 8
    for section in ("fsdp_config", "deepspeed_config"):
        for name, value in (yaml.safe_load(path.read_text()).get(section) or {}).items():
            assert hasattr(read, name), f"accelerate launch has no option {name}"
            assert str(getattr(read, name)).lower() == str(value).lower()


def test_the_layers_that_fsdp_wraps_are_the_unet_s() -> None:
    names = load_config_from_file(str(DOCS / "training" / "fsdp.yaml")).fsdp_config[
        "fsdp_transformer_layer_cls_to_wrap"
    ]
    assert set(names.split(",")) <= set(UNet2DConditionModel._no_split_modules)


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_every_example_is_a_configuration(path: Path) -> None:
    assert load_config(path).model.teacher.count("/") == 1


def test_the_page_names_every_file() -> None:
    page = (DOCS / "training.md").read_text()
    assert all(path.name in page for path in LAUNCHES)
    assert len(LAUNCHES) == 3 and len(SETTINGS) == 3
