"""Renaming that swaps two names at once, where the system can."""

from __future__ import annotations

import ctypes
import errno
import os

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Errors of a kernel or file system that can't swap names; EINVAL is that of NFS and of some FUSE file systems.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def exchange(one: str, other: str) -> bool:
    """Swap the files, folders or links that two paths name, atomically. Both lie on one file system.

    Returns:
        True after the swap; False, with nothing changed, where the system can't swap names.

    Raises:
        OSError: the swap failed for another reason.
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
