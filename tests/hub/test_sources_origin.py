"""Whose modules are: those of installed packages, wherever these lie, and the user's own."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from perflow_blocks.hub.sources.modules import origin
from tests.conftest import python

ROOT = Path(__file__).parent.parent.parent


def make_package(directory: Path, name: str) -> str:
    (directory / name).mkdir(parents=True)
    (directory / name / "__init__.py").write_text("")
    (directory / name / "inner.py").write_text("")
    return name


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("lib/python3/site-packages", "installed"),
        ("usr/lib/python3/dist-packages", "installed"),
        ("project", "user"),
        ("site-packages-of-mine", "user"),
    ],
)
def test_packages_by_their_place(place: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make_package(tmp_path / place, f"placed_{abs(hash(place))}")
    monkeypatch.syspath_prepend(str(tmp_path / place))
    assert (origin(name), origin(f"{name}.inner")) == (expected, expected)


def test_a_link_from_an_installed_place_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As editable installs are made."""
    site = tmp_path / "site-packages"
    site.mkdir()
    make_package(tmp_path / "source", "linked_editable")
    (site / "linked_editable").symlink_to(tmp_path / "source" / "linked_editable")
    monkeypatch.syspath_prepend(str(site))
    assert origin("linked_editable") == "user"


SCRIPT = """
import json, sys
from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.hub.sources import workflow_sources
from perflow_blocks.hub.sources.modules import origin
sources = workflow_sources(PeRFlowSDXLAutoBlocks(), "Preset")
names = ("torch", "numpy.linalg", "json", "my_own", "perflow_blocks.core")
print("REPORT" + json.dumps([[origin(name) for name in names], list(sources.files), dict(sources.requirements)]))
"""


def test_a_preset_is_exported_where_packages_were_installed_by_their_user(tmp_path: Path) -> None:
    """As `pip install --user` does, with links in place of the many files."""
    packages = Path(sysconfig.get_paths()["purelib"])
    place = tmp_path / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    place.mkdir(parents=True)
    for entry in packages.iterdir():
        if not entry.name.startswith("__editable__") and entry.suffix != ".pth":
            (place / entry.name).symlink_to(entry)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_own.py").write_text("")
    paths = os.pathsep.join([str(ROOT), str(tmp_path / "mine")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUSERBASE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    executable = getattr(sys, "_base_executable", sys.executable)
    printed = python("-c", SCRIPT, environment=environment, cwd=tmp_path, executable=executable)
    origins, files, requirements = json.loads(printed.split("REPORT")[1])
    assert origins == ["installed", "installed", "installed", "user", "package"]
    assert len(files) > 20 and not [name for name in files if "_user_" in name]
    assert requirements.keys() == {"diffusers"}
