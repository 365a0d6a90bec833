"""What more than one test file uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import close_session

from perflow_blocks.cli import main

from .builder_support import LOADABLE, save_repository
from .hub_server import LoopbackHub


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `perflow` in this process: exit status, stdout, stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run_command


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_repository(tmp_path_factory.mktemp("repository") / "tiny")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny teacher of each family, to be left as it is."""
    from .training_support import save_teacher  # with all that a training needs

    folder = tmp_path_factory.mktemp("teachers")
    return {family: save_teacher(folder / family, family) for family in ("sdxl", "sd")}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the classes whose `from_pretrained` is called, appended to as they are."""
    called: list[str] = []
    for kind in LOADABLE:

        def counted(cls: Any, *args: Any, original: Any = kind.from_pretrained, **kwargs: Any) -> Any:
            called.append(cls.__name__)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(counted))
    return called


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the process; a test with this has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def loopback_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that tests ask by `endpoint=`; huggingface_hub uses plain LFS, waits for no retry and finds no token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # one that was opened before may go through a proxy
    with LoopbackHub() as hub:
        yield hub
    close_session()
