"""Renaming that swaps two names, or takes only a free one, at once where the system can."""

from __future__ import annotations

import ctypes
import errno
import os

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
# Errors of a kernel or file system that can't do it; EINVAL is that of NFS and of some FUSE file systems.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def exchange(one: str, other: str) -> bool:
    """Swap the files, folders or links that two paths name, atomically. Both lie on one file system.

    Returns:
        True after the swap; False, with nothing changed, where the system can't swap names.

    Raises:
        OSError: the swap failed for another reason.
    """
    return _rename(one, other, _RENAME_EXCHANGE)


def rename_to_free(one: str, other: str) -> None:
    """Rename a file or folder to a name that nothing has; looks first where the system can't do both at once.

    Raises:
        FileExistsError: something has the name, and nothing was changed.
        OSError: the renaming failed for another reason.
    """
    if not _rename(one, other, _RENAME_NOREPLACE):
        if os.path.lexists(other):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), one, None, other)
        os.rename(one, other)


def _rename(one: str, other: str, flags: int) -> bool:
    """Whether the system knows renameat2 with these flags; done if so."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another libc, or another system
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), one, None, other)
