"""The files of an export: what diffusers reads in them, what they import, and what stays as it was."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers.utils import dynamic_modules_utils
from diffusers.utils.dynamic_modules_utils import (
    check_imports,
    get_class_from_dynamic_module,
    get_relative_imports,
)

import perflow_blocks
from perflow_blocks import PeRFlowSDXLAutoBlocks, WindowLogStep
from perflow_blocks.hub.sources import WorkflowSources, workflow_sources
from tests.conftest import python
from tests.hub.conftest import block_tree, write_repository
from tests.hub.sources_blocks import Counting, many_settings

PACKAGE = Path(perflow_blocks.__file__).parent
ROOT = PACKAGE.parent


@pytest.fixture(scope="module")
def preset() -> WorkflowSources:
    return workflow_sources(PeRFlowSDXLAutoBlocks(), "Preset")


@pytest.fixture(scope="module")
def repository(preset: WorkflowSources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(preset, tmp_path_factory.mktemp("preset"), "Preset")


def imports(text: str) -> set[str]:
    """The top-level packages of all absolute imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_nothing_imports_this_package(preset: WorkflowSources) -> None:
    third_party = {name for text in preset.files.values() for name in imports(text)} - set(sys.stdlib_module_names)
    assert third_party <= {"torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL"}
    assert set(preset.requirements) == {"diffusers"}


def test_diffusers_finds_every_file_in_block_py(
    repository: Path, preset: WorkflowSources, caplog: pytest.LogCaptureFixture
) -> None:
    assert sorted(check_imports(repository / "block.py")) == sorted(
        name.removesuffix(".py") for name in preset.files if name != "block.py"
    )
    for name in preset.files.keys() - {"block.py"}:
        assert get_relative_imports(repository / name) == []
        check_imports(repository / name)
    assert "not found in your environment" not in caplog.text


@pytest.fixture
def fetched(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often diffusers fetched each file of a repository on the Hub, for which the directory stands in."""
    counts: Counter[str] = Counter()

    def download(repository_id: str, filename: str, **_: Any) -> str:
        counts[filename] += 1
        return str(repository / filename)

    monkeypatch.setattr(dynamic_modules_utils, "hf_hub_download", download)
    monkeypatch.setattr(dynamic_modules_utils, "model_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {name: module for name, module in sys.modules.items() if name.startswith("diffusers_modules")}
    for name in before:
        del sys.modules[name]
    yield counts
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("name", ["someone/preset", "someone/preset-1.0"])
def test_from_a_hub_each_file_is_fetched_once(name: str, fetched: Counter[str], preset: WorkflowSources) -> None:
    loaded = get_class_from_dynamic_module(name, "block.py", class_name="Preset", trust_remote_code=True)()
    assert fetched == dict.fromkeys(preset.files, 1)
    assert block_tree(loaded) == block_tree(PeRFlowSDXLAutoBlocks())
    assert type(loaded).__module__.startswith("diffusers_modules.local.someone--preset")


def test_all_but_the_imports_is_as_it_was(preset: WorkflowSources) -> None:
    """Comments, docstrings and code stay, so that who reads an export reads this package."""
    checked = 0
    for name, text in preset.files.items():
        if name == "block.py":
            continue
        header, _, rest = text.partition("\n")
        found = re.match(r"# (perflow_blocks\.\S+) of perflow_blocks 0\.\d", header)
        assert found and "Apache-2.0" in header
        source = (PACKAGE.parent / (found[1].replace(".", "/") + ".py")).read_text()
        assert without_relative_imports(rest) == without_relative_imports(source)
        checked += 1
    assert checked == len(preset.files) - 1 > 20


def without_relative_imports(text: str) -> str:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line)


def test_only_what_is_needed_is_carried(preset: WorkflowSources) -> None:
    names = {name.split("_", 2)[2] for name in preset.files if name != "block.py"}
    assert {"blocks_auto_blocks.py", "core_windows.py", "attention_strategies.py"} <= names
    assert not {name for name in names if "__init__" in name or name.startswith(("builder", "hub", "testing", "demo"))}
    assert not names & {"core_distillation.py", "delta_lora.py", "schedulers_pfode_solver.py"}
    one = workflow_sources(WindowLogStep(), "One")
    assert len(one.files) <= 12


def test_names_say_what_is_inside(monkeypatch: pytest.MonkeyPatch, preset: WorkflowSources) -> None:
    tags = {name.split("_")[1] for name in preset.files if name != "block.py"}
    assert len(tags) == 1 and re.fullmatch("[0-9a-f]{8}", tags.pop())
    monkeypatch.setattr("perflow_blocks.hub.sources.siblings.__version__", "0.2.0")
    later = workflow_sources(PeRFlowSDXLAutoBlocks(), "Preset")
    assert not (later.files.keys() & preset.files.keys()) - {"block.py"}


def user_package(directory: Path, files: dict[str, str]) -> Callable[[str], Any]:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return lambda name: __import__(name, fromlist=["_"])


BLOCK = """from __future__ import annotations

from diffusers.modular_pipelines import ModularPipelineBlocks

{imports}


class Mine(ModularPipelineBlocks):
    \"\"\"Größe: {{}}.\"\"\"

    @property
    def description(self) -> str:
        {inside}
        return "Mine."
"""


def test_every_form_of_import_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    statements = """\
from perflow_blocks import PreviewStep as Shown, extract_delta  # two modules
from perflow_blocks.blocks import (
    WindowLogStep,  # one
)
from perflow_blocks.core import windows, step_plan as planned
import perflow_blocks.core.tiles as tiles
import my_alone
import my_alone as alone_again
from . import helpers
from .helpers import helped as aided; from .sub import deep
from .sub.inner import *
if True: from .sub import renamed, deep as deeper
try:
    import not_there_at_all
except ImportError:
    not_there_at_all = None
"""
    inside = "from .helpers import helped; return f'ö {helped()}'"
    load = user_package(
        tmp_path,
        {
            "my_alone.py": "VALUE = 5\n",
            "my_forms/__init__.py": "",
            "my_forms/helpers.py": "def helped():\n    return 'helped'\n",
            "my_forms/sub/__init__.py": "from .inner import deep, original as renamed\n",
            "my_forms/sub/inner.py": "def deep():\n    return 'deep'\n\n\ndef original():\n    return 'original'\n",
            "my_forms/block.py": BLOCK.format(imports=statements, inside=inside),
        },
    )
    module = load("my_forms.block")
    sources = workflow_sources(module.Mine(), "Flow")
    assert sources.requirements.keys() == {"diffusers"}
    assert not {name for text in sources.files.values() for name in imports(text)} & {"perflow_blocks", "my_alone"}
    directory = write_repository(sources, tmp_path / "my_exported_forms", "Flow")
    (directory / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load("my_exported_forms.block")
    assert loaded.Flow().description == "ö helped"
    (name,) = (name for name in sources.files if name.endswith("_user_my_forms_block.py"))
    inner = load(f"my_exported_forms.{name.removesuffix('.py')}")
    assert (inner.my_alone.VALUE, inner.alone_again.VALUE, inner.not_there_at_all) == (5, 5, None)
    assert (inner.aided(), inner.deep(), inner.deeper(), inner.renamed()) == ("helped", "deep", "deep", "original")
    assert inner.original() == "original" and inner.helpers.helped() == "helped"
    assert (inner.Shown.__name__, inner.WindowLogStep.__name__) == ("PreviewStep", "WindowLogStep")
    assert inner.windows.TimeWindows and inner.planned.StepPlan and inner.tiles and inner.extract_delta
    assert "# one" in sources.files[name] and "Größe: {}." in sources.files[name]


def test_what_a_users_module_needs_is_a_requirement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    statements = (
        "import pytest\nimport numpy\nimport torch\ntry:\n    import hypothesis\nexcept ImportError:\n    pass\n"
    )
    load = user_package(tmp_path, {"my_needs.py": BLOCK.format(imports=statements, inside="pass")})
    for mode, needs in {"thin": "perflow-blocks", "self-contained": "diffusers"}.items():
        sources = workflow_sources(load("my_needs").Mine(), "Flow", mode)  # type: ignore[arg-type]
        assert sources.requirements.keys() == {"pytest", needs}
        assert re.fullmatch(r">=\d+\.\d+", sources.requirements["pytest"])


SCRIPT = """
import json
from perflow_blocks.hub.sources import workflow_sources
from tests.hub.sources_blocks import many_settings

print(json.dumps(list(workflow_sources(many_settings(), "Flow").files.items())))
"""


def test_the_same_blocks_give_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "HOME": str(tmp_path), "PATH": ""}
    there = json.loads(python("-c", SCRIPT, environment=environment, cwd=tmp_path))
    here = workflow_sources(many_settings(), "Flow")
    assert [tuple(entry) for entry in there] == list(here.files.items())


def test_blocks_of_a_module_that_lies_in_no_package_are_carried() -> None:
    sources = workflow_sources(Counting(), "Flow", "thin")
    assert [name for name in sources.files if name.endswith("_user_tests_hub_sources_blocks.py")]
