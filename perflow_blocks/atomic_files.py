"""Writing files and directories so that under their names the old or the new one is always there, whole.

What is written lies first in a temporary directory beside its target, with a lock that ends with its process: so the
next writer of the same target knows what killed ones left, and removes it. (Windows has no such locks; litter stays.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write a file to; the file takes the place of `path` when the block ends without an error.

    Missing parent directories are made. The result gets the permissions of an ordinary new file.

    Raises:
        ValueError: `path` is a directory, its directory cannot be made or written to, or the disk is full.
    """
    target = Path(os.path.abspath(path))
    if target.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory; name a file in it.")
    with _temporary_directory(target, target.parent) as (folder, mode):
        new = folder / target.name
        yield new
        new.chmod(mode)  # safetensors makes files that only their owner may read
        new.replace(target)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory to fill; it takes the place of `path` when the block ends without an error.

    Missing parent directories are made. A directory that is there already is replaced as a whole: in one step on Linux
    and macOS, and in two, between which it is missing, where the system cannot exchange directories. The entries of a
    mount point, of the working directory and of a directory beside which nothing can be written are replaced one by
    one. New files get the permissions of ordinary ones; hard links keep theirs.

    Raises:
        ValueError: `path` is a file, its parent directory cannot be made or written to, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot write {path}: it is a file; name a directory.")
    stays = target.is_dir() and (
        os.path.ismount(target) or target == Path.cwd() or not os.access(target.parent, os.W_OK)
    )
    with _temporary_directory(target, target if stays else target.parent) as (folder, mode):
        new = folder / "new"
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                file.chmod(mode)
        if not stays:
            _put(new, target)
            return
        names = set(os.listdir(new))
        for name in names:
            _put(new / name, target / name)
        for name in set(os.listdir(target)) - names - {folder.name}:
            (target / name).rename(folder / name)


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
def _temporary_directory(target: Path, place: Path) -> Iterator[tuple[Path, int]]:
    """A directory in `place` of this writer alone, and the permissions of an ordinary new file."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        _remove_litter(target.name, place)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=place))
            with suppress(BlockingIOError, FileNotFoundError):  # taken for litter before it was locked
                lock, _ = _lock(folder)
                break
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}; choose a writable path.") from error
    try:
        yield folder, os.fstat(lock).st_mode & 0o777
    except Exception as error:
        # safetensors quotes the system's error in one of its own.
        code = next((code for code in NO_SPACE if f"(os error {code})" in str(error)), getattr(error, "errno", None))
        if code not in NO_SPACE:
            raise
        raise ValueError(f"cannot write {target}: {os.strerror(code)}; choose a path with free space.") from error
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_litter(name: str, place: Path) -> None:
    """Removes the temporary directories of dead writers of this name."""
    for entry in os.scandir(place):
        if re.fullmatch(rf"\.{re.escape(name)}\.\w{{8}}\.tmp", entry.name) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):
                descriptor, locked = _lock(Path(entry.path))
                if locked:
                    shutil.rmtree(entry.path, ignore_errors=True)
                os.close(descriptor)


def _lock(folder: Path) -> tuple[int, bool]:
    """The descriptor of a directory's lock, and whether this system has such locks.

    Raises:
        OSError: a writer that lives holds it, or the directory is being removed.
    """
    file = folder / "lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.stat()
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except (ImportError, OSError):  # Windows, and some network file systems
        return descriptor, False
    return descriptor, True


def _put(new: Path, target: Path) -> None:
    """Replaces a file or directory; the old one is then under a temporary name or gone."""
    first, second = os.fsencode(new), os.fsencode(target)
    with suppress(AttributeError):  # an old C library
        if sys.platform == "linux" and ctypes.CDLL(None).renameat2(-100, first, -100, second, 2) == 0:
            return  # in one step; -100 is AT_FDCWD, 2 RENAME_EXCHANGE
        if sys.platform == "darwin" and ctypes.CDLL(None).renamex_np(first, second, 2) == 0:
            return  # 2 is RENAME_SWAP
    if not target.is_dir():
        new.replace(target)
        return
    old = new.with_name(f"{new.name}.old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
