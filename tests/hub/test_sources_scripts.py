"""Blocks of a script: what the script does to them at its top is done in the export, too, or refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from perflow_blocks.hub.sources import workflow_sources

HEAD = """\
import random
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from perflow_blocks import PeRFlowSDXLAutoBlocks, insert_loop_block
from my_shared import LIMITS, SHARED, clip, first_of
from perflow_blocks.hub.sources import workflow_sources

SCALES = [1.0]
NUMBER = 3
TABLE = {}


class Base:
    parts = []

    def __init_subclass__(cls):
        Base.parts.append(cls.__name__)


class Damp(ModularPipelineBlocks):
    factor = 1.0

    @property
    def description(self):
        return repr((self.factor, SCALES, NUMBER, sorted(TABLE), Base.parts, SHARED, LIMITS, clip(2)))


class Tool:
    def __init__(self, given=None):
        self.given = given

    def use(self):
        SCALES.append(0.5)

    def look(self):
        return len(SCALES)


def fill():
    SCALES.append(0.5)


def outer():
    return fill()


def tune(kind):
    kind.factor = 0.25


def show(value):
    print("shown", value)


def register(kind):
    TABLE[kind.__name__] = kind
    return kind


def count():
    global NUMBER
    NUMBER = 4


def scales():
    return SCALES


"""
SHARED = "SHARED = [1]\nLIMITS = {}\n\n\ndef clip(x):\n    return x\n\n\ndef first_of(x):\n    return x[0]\n"


def run_script(name: str, text: str, monkeypatch: pytest.MonkeyPatch, directory: Path) -> ModuleType:
    """Runs a script as Python does, as `__main__`, but in this process."""
    path = directory / f"{name}.py"
    path.write_text(text)
    script = ModuleType("__main__")
    script.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(compile(text, str(path), "exec"), vars(script))
    return script


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_shared.py").write_text(SHARED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_shared", raising=False)


def exported(script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[str, Any]:
    """The text of the exported script, and the description of its block where nothing but the text ran."""
    files = workflow_sources(script.Damp(), "Flow", "thin").files
    (text,) = (text for file, text in files.items() if file.endswith(f"_user_{name}.py"))
    (helper,) = (text for file, text in files.items() if file.endswith("_user_my_shared.py"))
    fresh = ModuleType("fresh")
    exec(helper, vars(fresh))
    assert "from . perflow_" in text
    lines = [
        f"from fresh import {line.partition(' import ')[2]}" if line.startswith("from . perflow_") else line
        for line in text.splitlines()
    ]
    monkeypatch.setitem(sys.modules, "fresh", fresh)
    namespace: dict[str, Any] = {"__name__": "elsewhere"}
    exec("\n".join(lines), namespace)
    return text, namespace["Damp"]().description


CHANGES = {
    "call": "fill()",
    "call of a call": "outer()",
    "result kept": "nothing = outer()",
    "in a loop": "for _ in range(2):\n    fill()",
    "under a condition": "if NUMBER:\n    fill()",
    "handed on": "list(map(lambda f: f(), [fill]))",
    "in a class body": "class Other:\n    x = fill()",
    "lambda": "add = lambda: SCALES.append(2)\nadd()",
    "method": "Tool().use()",
    "method of an object": "tool = Tool()\ntool.use()",
    "setattr": "setattr(Damp, 'factor', 0.25)",
    "argument": "tune(Damp)",
    "argument in a loop": "for kind in (Damp,):\n    kind.factor = 0.5",
    "decorator": "@register\nclass Other:\n    pass",
    "decorator of a function": "@register\ndef other():\n    pass",
    "subclass": "class Other(Base):\n    pass",
    "global": "count()",
    "library": "import heapq\nheapq.heappush(SCALES, 0.0)",
    "method of a library": "random.Random(0).shuffle(TABLE.setdefault('x', [1, 2]))",
    "alias": "again = SCALES\nagain.append(2)",
    "alias added to": "again = SCALES\nagain += [2]",
    "alias in a list": "held = [SCALES]\nheld[0].append(2)",
    "alias in an object": "tool = Tool(SCALES)\ntool.given.append(2)",
    "alias in an attribute": "tool = Tool()\ntool.given = SCALES\ntool.given.append(2)",
    "given by a function": "scales().append(2)",
    "alias of a class": "Same = Damp\nSame.factor = 3",
    "through a comprehension": "_ = [part.append(3) for part in (SCALES,)]",
    "vars": "vars(Base)['parts'].append('x')",
    "of another module": "SHARED.append(3)\nLIMITS['x'] = 1",
    "attribute": "Damp.factor = 0.75",
    "entry": "TABLE['a'] = 1",
}


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_script_changes_is_changed_in_the_export(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_script("plain", HEAD, monkeypatch, tmp_path).Damp().description
    script = run_script("my_script", HEAD + CHANGES[name] + "\n", monkeypatch, tmp_path)
    expected = script.Damp().description
    text, description = exported(script, monkeypatch, "my_script")
    assert description == expected != before
    assert "insert_loop_block" not in text


NO_CHANGES = {
    "print": "print(Damp, SCALES, len(SCALES))",
    "function that shows": "show(SCALES)",
    "function of numbers": "random.seed(NUMBER)",
    "method that looks": "Tool().look()",
    "instance": "tool = Tool(Damp())",
    "instance of what is changed": "blocks = SequentialPipelineBlocks.from_blocks_dict({'a': Damp})\nTool(SCALES)",
    "class handed to diffusers": "SequentialPipelineBlocks.from_blocks_dict({'damp': Damp})",
    "tree": (
        "blocks = PeRFlowSDXLAutoBlocks()\ninsert_loop_block(blocks, 'damp', Damp(), after='solver')\n"
        "blocks.sub_blocks['again'] = Damp\nblocks.sub_blocks.insert('more', Damp, 0)"
    ),
    "function never called": "def never():\n    SCALES.append(9)",
    "method never called": "class Never:\n    def never_called(self):\n        SCALES.append(9)",
    "local name": "def local():\n    SCALES = []\n    SCALES.append(1)\nlocal()",
    "export": "sources = workflow_sources(Damp(), 'Flow', 'thin')\nprint(len(sources.files))",
    "export in a function": "def main():\n    workflow_sources(Damp(), 'Flow', 'thin')\nmain()",
    "main guard": "if __name__ == '__main__':\n    fill()",
}


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", NO_CHANGES)
def test_what_changes_nothing_is_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_script("plain", HEAD, monkeypatch, tmp_path)
    expected, _ = exported(plain, monkeypatch, "plain")
    script = run_script("my_script", HEAD + NO_CHANGES[name] + "\n", monkeypatch, tmp_path)
    text, _ = exported(script, monkeypatch, "my_script")
    assert text.partition("\n")[2] == expected.partition("\n")[2]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("exec('SCALES.append(1)')", r"uses exec\(\), which may change anything"),
        ("globals()['NUMBER'] = 2", r"uses globals\(\), which may change anything"),
        ("def hidden():\n    eval('fill()')\n\n\nhidden()", r"uses eval\(\), which may change anything"),
        ("import sys\nsys.modules[__name__].NUMBER = 2", r"uses sys.modules\[__name__\], which may change anything"),
        (
            "blocks = PeRFlowSDXLAutoBlocks()\ninsert_loop_block(blocks, 'x', Damp, after=SCALES and 'solver')\n"
            "workflow_sources(blocks, 'Flow', mode='thin', description=str(SCALES.append(blocks)))",
            r"may change what the block uses, and needs what no export carries",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["thin", "self-contained"])
def test_what_cannot_be_decided_is_refused(
    code: str, message: str, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_script.py").write_text(HEAD + code)
    script = run_script("plain", HEAD, monkeypatch, tmp_path)
    script.__file__ = str(tmp_path / "my_script.py")
    with pytest.raises(ValueError, match=rf"line \d+ of my_script.py {message}; put the block in a module of its own"):
        workflow_sources(script.Damp(), "Flow", mode)
