"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends, or goes when it fails.

    Missing parent directories are made. The result gets the permissions of an ordinary new file.

    Raises:
        ValueError: `path` is a directory, or its directory cannot be made or written to.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a directory; name a file in it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}; choose a writable path.") from error
    # Some writers replace the file by one that only its owner may read: remember what is usual here.
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable_directory(path: str | os.PathLike[str]) -> None:
    """Tries whether files can be put into a directory, or where it is missing into the nearest one above it.

    Nothing is made that others could see, so that several processes can try the same directory at once.

    Raises:
        ValueError: `path` is a file or lies below one, or nothing can be written there.
    """
    target = Path(path)
    nearest = next(part for part in (target, *target.absolute().parents) if os.path.lexists(part))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {target}: {error.strerror}; choose a writable directory.") from error


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside `path` to fill; it takes `path`'s place when the block ends, or goes when it fails.

    Missing parent directories are made. A directory that is there already is replaced as a whole, at the end; whoever
    calls has made sure that this is meant.

    Raises:
        ValueError: `path` is a file, or its parent directory cannot be made or written to.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot write {path}: it is a file; name a directory.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose a writable path.") from error
    old = temporary / "replaced"
    new = temporary / "new"
    try:
        new.mkdir()  # with the permissions of an ordinary directory, which mkdtemp does not give
        yield new
        if target.exists():
            target.replace(old)
        try:
            new.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
