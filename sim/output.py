"""Files appear whole or not at all, and never over another without --force."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from sim.errors import InputError, require


def write_file(path: str | Path, data: bytes, *, force: bool = False) -> None:
    """Raises InputError where `path` exists (unless `force`) or cannot be written; then nothing is left behind."""
    path = Path(path)
    check_output(path, force=force)
    try:
        target = path.resolve() if force else path
        temporary = target.parent / f".deepplan-{secrets.token_hex(8)}.tmp"
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            _place(temporary, target, force)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def check_output(path: str | Path, *, force: bool = False) -> None:
    """What `write_file` would refuse, told before the long work starts. Tries a file in the folder, and removes it."""
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a directory; name a file in it")
        if os.path.lexists(path):
            if not force:
                raise _exists(path)
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: is not a regular file; choose another path")
        folder = (path.resolve() if force else path).parent
        if not folder.is_dir():
            raise InputError(f"{path}: there is no folder {folder}; make it first")
        probe = folder / f".deepplan-{secrets.token_hex(8)}.tmp"
        try:
            open(probe, "xb").close()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None


def check_outputs(
    outputs: Iterable[str | Path | None], inputs: Iterable[str | Path | None] = (), *, force: bool = False
) -> None:
    """As `check_output`, of all that are named: no two may be one file, and none a file that the command reads."""
    given = [Path(path) for path in outputs if path is not None]
    read = [Path(path) for path in inputs if path is not None]
    for at, path in enumerate(given):
        own = any(_same(path, other) for other in read)
        require(not own, f"{path}: is read by this command and would be lost; choose another path")
        check_output(path, force=force)
        twice = any(_same(path, other) for other in given[:at])
        require(not twice, f"{path}: named for two outputs; give each its own path")


def _same(path: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return path.samefile(other)  # under two names as well
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return path.resolve() == other.resolve()
    return False


def check_file_name(name: str, what: str) -> None:
    """A name that files and folders are called by. Raises InputError for one that would lie elsewhere, or hidden."""
    plain = bool(name) and name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")
    require(plain, f"{what} {name!r}: it becomes a file's name; use letters, digits and dashes")


def make_folder(folder: str | Path) -> None:
    """With all above it, where it is not there yet. InputError where that cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{folder}: cannot be made ({reason}); choose another --out") from None


def _place(temporary: Path, target: Path, force: bool) -> None:
    if force:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise _exists(target) from None
    except OSError:  # a file system without hard links: the check and the move are then two steps
        if os.path.lexists(target):
            raise _exists(target) from None
        os.replace(temporary, target)


def _exists(path: Path) -> InputError:
    return InputError(f"{path}: exists; choose another path or pass --force")


def _unwritable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{path}: cannot be written ({reason}); choose another path")
