"""What more than one test file uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perflow_blocks.cli import main

from .builder_support import LOADABLE, save_repository


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
