"""Sources of workflows: trees that come back, files that stand alone, and what cannot be written down."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks

from perflow_blocks import (
    PeRFlowSDXLAutoBlocks,
    PeRFlowTiledLoopDenoiser,
    PreviewStep,
    PromptCacheStep,
    WindowLogStep,
    insert_loop_block,
)
from perflow_blocks.blocks.denoise import PeRFlowDenoiseStep
from perflow_blocks.hub.sources import Mode, workflow_sources
from perflow_blocks.hub.sources.tree import describe_tree, differences
from tests.hub.conftest import block_tree, import_from, load_as_package
from tests.hub.sources_blocks import ByMask, ByPicture, Counting, Demanding, Settled, many_settings

numbers = itertools.count()


def with_loop_block(block: Any) -> Any:
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "inserted", block, before="solver")
    return blocks


def with_parts(**parts: Any) -> Any:
    blocks = PeRFlowSDXLAutoBlocks()
    for name, part in parts.items():
        blocks.sub_blocks[name] = part
    return blocks


def tiled() -> Any:
    blocks = PeRFlowSDXLAutoBlocks().get_workflow("image2image")
    blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = PeRFlowTiledLoopDenoiser()
    return blocks


def without_mask() -> Any:
    blocks = ByMask()
    blocks.sub_blocks.pop("count")
    return blocks


def reordered() -> Any:
    blocks = ByPicture()
    blocks.block_trigger_inputs = ["image", "strength"]
    blocks.default_block_name = "log"
    return blocks


def loop_of(**blocks: Any) -> Any:
    loop = PeRFlowDenoiseStep()
    return PeRFlowDenoiseStep.from_blocks_dict({**loop.sub_blocks, **blocks})


TREES: dict[str, Callable[[], Any]] = {
    "preset": PeRFlowSDXLAutoBlocks,
    **{
        f"workflow {name}": partial(PeRFlowSDXLAutoBlocks().get_workflow, name)
        for name in PeRFlowSDXLAutoBlocks().available_workflows
    },
    "class inserted": lambda: with_loop_block(PreviewStep),
    "arguments inserted": lambda: with_loop_block(WindowLogStep(level=10)),
    "prompt cache": lambda: with_parts(text_encoder=PromptCacheStep(4)),
    "tiled": tiled,
    "part": lambda: PeRFlowSDXLAutoBlocks().sub_blocks["denoise"],
    "leaf with arguments": lambda: WindowLogStep(level=10),
    "loop": lambda: loop_of(log=WindowLogStep(level=10)),
    "sequence": lambda: SequentialPipelineBlocks.from_blocks_dict({"a": Settled(1.5), "b.c": Counting()}),
    "conditional": ByPicture,
    "conditional changed": reordered,
    "arguments of many kinds": many_settings,
}


SELF_CONTAINED = [name for name in TREES if not name.startswith("workflow ")] + ["workflow inpainting"]


def written_and_loaded(blocks: Any, mode: Mode, directory: Path) -> Any:
    sources = workflow_sources(blocks, "MyWorkflow", mode)
    return load_as_package(sources, directory / f"generated_{next(numbers)}", "MyWorkflow")


def generated_classes(block: Any) -> frozenset[type]:
    inside = (generated_classes(inner) for inner in block.sub_blocks.values())
    own = {type(block)} if type(block).__module__.startswith("generated_") else set()
    return frozenset(own).union(*inside)


@pytest.fixture(autouse=True)
def import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_in_thin_form(name: str, tmp_path: Path) -> None:
    blocks = TREES[name]()
    loaded = written_and_loaded(blocks, "thin", tmp_path)
    assert type(loaded).__name__ == "MyWorkflow"
    if any("user" in type(block).__module__ for block in loaded.sub_blocks.values()):
        assert block_tree(loaded) == block_tree(blocks)
    else:  # the classes are this package's own, so settings can be compared, too
        assert not list(differences(describe_tree(blocks), describe_tree(loaded, generated_classes(loaded))))


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_a_tree_comes_back_in_self_contained_form(name: str, tmp_path: Path) -> None:
    blocks = TREES[name]()
    loaded = written_and_loaded(blocks, "self-contained", tmp_path)
    assert block_tree(loaded)[1:] == block_tree(blocks)[1:]
    own = type(loaded).__module__.split(".")[0]
    assert {type(block).__module__.split(".")[0] for block in walk(loaded)} <= {"diffusers", own}


def walk(block: Any) -> Iterator[Any]:
    yield block
    for inner in block.sub_blocks.values():
        yield from walk(inner)


def test_a_class_of_the_wanted_name_is_handed_on_as_it_is() -> None:
    sources = workflow_sources(PeRFlowSDXLAutoBlocks(), "PeRFlowSDXLAutoBlocks", "thin")
    assert sources.files.keys() == {"block.py"}
    assert "class " not in sources.files["block.py"]
    assert sources.requirements == {"perflow-blocks": ">=0.1"}


def test_a_changed_class_may_keep_its_name(tmp_path: Path) -> None:
    sources = workflow_sources(with_loop_block(PreviewStep), "PeRFlowSDXLAutoBlocks", "thin")
    loaded = load_as_package(sources, tmp_path / f"generated_{next(numbers)}", "PeRFlowSDXLAutoBlocks")
    assert isinstance(loaded, PeRFlowSDXLAutoBlocks) and type(loaded) is not PeRFlowSDXLAutoBlocks
    assert block_tree(loaded) == block_tree(with_loop_block(PreviewStep))


def test_a_block_that_was_taken_out_of_an_automatic_one_takes_its_trigger_along(tmp_path: Path) -> None:
    loaded = written_and_loaded(without_mask(), "thin", tmp_path)
    assert (loaded.block_names, loaded.block_trigger_inputs, loaded.default_block_name) == (["log"], [None], "log")


@pytest.mark.parametrize("blocks", [PeRFlowSDXLAutoBlocks, tiled, lambda: WindowLogStep(level=10)])
def test_a_description_is_what_the_blocks_say_of_themselves(blocks: Callable[[], Any], tmp_path: Path) -> None:
    text = 'Draws "stars".\nIn four steps.'
    sources = workflow_sources(blocks(), "WindowLogStep", "thin", description=text)
    loaded = load_as_package(sources, tmp_path / f"generated_{next(numbers)}", "WindowLogStep")
    assert loaded.description == text
    assert block_tree(loaded)[1:] == block_tree(blocks())[1:]


def test_settings_are_what_they_were(tmp_path: Path) -> None:
    loaded = written_and_loaded(TREES["arguments of many kinds"](), "self-contained", tmp_path)
    a, b, c = loaded.sub_blocks.values()
    assert (a.number, a._name, a.options) == (
        float("inf"),
        'it\'s "quoted"\n',
        {"options_of": {"k": (1, [None, {"b", "a", "c"}], b"x")}},
    )
    assert (b.number, b.options["dtype"], b.options["device"]) == (2, torch.float16, torch.device("cpu"))
    assert b.options["colour"].name == "RED"
    windows = c.options["windows"]
    assert (type(windows).__name__, windows.boundaries) == ("TimeWindows", (1.0, 0.5, 0.0))
    assert c.options["kind"].__module__ == type(a).__module__ != Settled.__module__


def test_blocks_that_were_loaded_from_an_export_are_exported_again(tmp_path: Path) -> None:
    loaded = written_and_loaded(with_loop_block(WindowLogStep(level=10)), "self-contained", tmp_path)
    for mode in get_args(Mode):
        again = written_and_loaded(loaded, mode, tmp_path)
        assert block_tree(again) == block_tree(loaded)


def test_a_workflow_may_have_the_name_of_a_block_inside(tmp_path: Path) -> None:
    blocks = SequentialPipelineBlocks.from_blocks_dict({"count": Counting(), "log": WindowLogStep(level=10)})
    sources = workflow_sources(blocks, "Counting", "thin")
    loaded = load_as_package(sources, tmp_path / f"generated_{next(numbers)}", "Counting")
    assert block_tree(loaded) == block_tree(blocks)


def test_what_blocks_declare_is_required() -> None:
    blocks = SequentialPipelineBlocks.from_blocks_dict({"a": Counting(), "b": Demanding()})
    assert workflow_sources(blocks, "Flow").requirements == {"diffusers": ">=0.42", "kornia": ">=0.7"}


def recipe(pattern: str) -> Any:
    (path,) = (Path(__file__).parent.parent.parent / "workflows").glob(f"{pattern}/recipe.py")
    return import_from(path, f"recipe_{path.parent.name.replace('-', '_')}")


def test_what_the_recipes_assemble_comes_back(tmp_path: Path) -> None:
    upscaler, split = recipe("*tile*upscaler"), recipe("split_stages")
    assembled = [
        recipe("custom_block").mirrored_blocks(),
        upscaler.assemble(with_controlnet=True),
        *(pipe.blocks for pipe in split.take_apart()),
    ]
    for blocks in assembled:
        assert block_tree(written_and_loaded(blocks, "thin", tmp_path))[1:] == block_tree(blocks)[1:]
