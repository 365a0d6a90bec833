"""What cannot be exported, and what is said of it: block, reason, remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks

from perflow_blocks import PeRFlowSDXLAutoBlocks, insert_loop_block
from perflow_blocks.hub.sources import workflow_sources
from tests.hub.sources_blocks import ByMask, Counting, Forgetful, Inherits, MakesItsBlocks, Settled


def preset_with(block: Any) -> Any:
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "mine", block, after="solver")
    return blocks


def local_class() -> Any:
    class Local(ModularPipelineBlocks):
        pass

    return Local()


def redefined() -> Any:
    return type("Counting", (ModularPipelineBlocks,), {"__module__": Counting.__module__})()


def counted() -> Any:
    block = Counting()
    block.calls = 3
    return block


def given_an_attribute() -> Any:
    block = Settled(1)
    block.threshold = 0.5
    return block


def automatic_with_another() -> Any:
    blocks = ByMask()
    blocks.sub_blocks["extra"] = Counting()
    return blocks


def changed_inside() -> Any:
    blocks = MakesItsBlocks()
    blocks.sub_blocks["first"] = Settled(1)
    return blocks


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (lambda: preset_with(Settled(1, name=lambda: 2)), r"mine' \(Settled\).* a lambda has no name .*write a func"),  # type: ignore[arg-type]
        (lambda: preset_with(Inherits(2, data=torch.zeros(2))), r"mine' \(Inherits\).*a torch.Tensor is no value"),
        (lambda: preset_with(Settled(1, x=[object()])), r"block 'denoise.*mine'.*object is no value that can be"),
        (
            lambda: preset_with(Forgetful(4)),
            r"mine' \(Forgetful\).*'size' is not kept.*self.size in __init__",
        ),
        (lambda: preset_with(local_class()), r"mine' \(Local\).*inside a function; define it at the top of a module"),
        (lambda: preset_with(redefined()), r"mine' \(Counting\).*is not what the module .* make the blocks anew"),
        (lambda: preset_with(counted()), r"mine' \(Counting\).*its calls does not come out of its constructor"),
        (given_an_attribute, r"Settled cannot be exported: its threshold does not come out .*make it an argument"),
        (automatic_with_another, r"ByMask cannot be exported: nothing triggers its block 'extra'.*write a class"),
        (
            changed_inside,
            r"block 'first' \(Settled\) cannot be exported: its class Settled comes out as Counting",
        ),
        (PeRFlowSDXLAutoBlocks, None),
    ],
)
@pytest.mark.parametrize("mode", ["self-contained", "thin"])
def test_a_block_that_cannot_be_made_again(blocks: Callable[[], Any], message: str | None, mode: Any) -> None:
    if message is None:
        workflow_sources(blocks(), "Flow", mode)
        return
    with pytest.raises(ValueError, match=message):
        workflow_sources(blocks(), "Flow", mode)


@pytest.mark.parametrize("name", ["", "class", "My Flow", "1st", "Größe", "a.B"])
def test_a_name_that_no_class_has(name: str) -> None:
    with pytest.raises(ValueError, match=r"class_name=.* is no name of a class; pass one such as 'MyWorkflow'"):
        workflow_sources(Counting(), name)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="mode='fat' is unknown; pass one of 'self-contained', 'thin'"):
        workflow_sources(Counting(), "Flow", "fat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Counting is no block that was made; pass blocks such as"):
        workflow_sources(Counting, "Flow")


MODULE = """{imports}
from diffusers.modular_pipelines import ModularPipelineBlocks


class Mine(ModularPipelineBlocks):
    '''A block.
    {docstring}
    '''

    @property
    def description(self):
        {inside}
        return "Mine."
"""


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"imports": "import perflow_blocks", "inside": "perflow_blocks"},
            r"line 1 of my_mistake.*write `from perf",
        ),
        (
            {"inside": "import perflow_blocks.core.windows"},
            r"line 12 of .*write `from perflow_blocks.core",
        ),
        (
            {"inside": "from perflow_blocks.testing import tiny_vae"},
            r"testing.* is not part of self-contained",
        ),
        ({"inside": "from perflow_blocks import PeRFlowPipelineBuilder"}, r'builder.* move what .*mode="thin"'),
        ({"inside": "from perflow_blocks import __version__"}, r"perflow_blocks is not part of self-contained"),
        ({"inside": "__import__('perflow_blocks.core.windows')"}, r"line 12 .*by its name as a text.*write an import"),
        (
            {"imports": "HERE = __file__", "inside": "HERE"},
            r"line 1 .* uses __file__.*not carried; fetch",
        ),
        ({"docstring": "from .elsewhere import this"}, r"holds the line 'from .elsewhere import'.*another form"),
        (
            {"imports": "from perflow_blocks.blocks import *", "inside": "PreviewStep"},
            "; name what is needed",
        ),
    ],
)
def test_a_module_that_cannot_be_carried(
    parts: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MODULE.format(**{"imports": "", "docstring": "", "inside": "pass", **parts})
    (tmp_path / "my_mistake.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_mistake", raising=False)
    module = __import__("my_mistake")
    with pytest.raises(ValueError, match=message):
        workflow_sources(module.Mine(), "Flow")


@pytest.mark.parametrize("file", [None, __file__])
def test_a_block_of_a_notebook_or_script(file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = ModuleType("__main__")
    notebook.__file__ = file
    mine = type("Mine", (ModularPipelineBlocks,), {"__module__": "__main__"})
    vars(notebook)["Mine"] = mine
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    with pytest.raises(ValueError, match=r"is the script or notebook that runs; write your blocks into a .py file"):
        workflow_sources(mine(), "Flow", "thin")
