"""Renaming that swaps two names at once, where the system can."""

from __future__ import annotations

import ctypes
import errno
import os

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What a kernel or file system says that can't do it: ENOSYS, EINVAL (NFS, some FUSE), ENOTSUP.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def exchange(one: str, other: str) -> bool:
    """Swap what two paths name, atomically. Files, folders and links alike, on one file system.

    Returns:
        False where the system can't, and nothing was changed.

    Raises:
        OSError: any other failure.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another libc, or another system
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), one, None, other)
