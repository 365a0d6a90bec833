"""Python in a process of its own, where what is imported and set here does not count."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def python(
    *arguments: object, environment: Mapping[str, str], cwd: Path | None = None, executable: str = sys.executable
) -> str:
    """What Python prints with these arguments; an error there fails the test with the end of its traceback."""
    done = subprocess.run(
        [executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
