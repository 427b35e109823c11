"""Disks that are full."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphq.errors import UsageError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NUMPY = re.compile(r"\d+ requested and \d+ written")
"""What numpy says, without a number, when a file takes less of an array than there is."""


@contextmanager
def room(folder: Path, needed: int) -> Iterator[None]:
    """Say so if there is no space left in `folder`, where the block writes files that are gone if it raises.

    Args:
        needed: Bytes that the block writes there, at most.

    Raises:
        UsageError: the disk was full.
    """
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not Path(error.filename).resolve().is_relative_to(folder.resolve())
        if elsewhere or not (error.errno in _FULL or (error.errno is None and _NUMPY.search(str(error)))):
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise UsageError("There is no space left for the result.", where=f"{folder}: {free:,.1f} MB free",
                         expected=f"up to {needed / 1e6:,.1f} MB", hint="make room there, or choose another --out") from error  # fmt: skip
