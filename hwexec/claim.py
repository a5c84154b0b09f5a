"""A folder that one command at a time goes on writing into. Two would each put back what they had read, less the other's points."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sim.errors import InputError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Held by this process alone until the end. InputError where another holds it.

    The folder itself is locked, so that nothing is left in it; a process that dies lets go. File systems without such locks
    give none, and then nobody is kept out.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # whoever reads or writes there says what is wrong with it
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another hwexec sweep is writing there; wait for its end, or name another folder"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
