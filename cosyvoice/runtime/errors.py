"""The one exception that means: the user can mend this; and the errors of files that mean it, too."""

import errno
import re

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
NO_PERMISSION = (errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR)  # a file or folder that was there when the work began
# How torch, the libraries that it calls, and onnxruntime say that memory is full.
_MEMORY_TROUBLE = re.compile(
    "out of memory|can't allocate memory|ALLOC_FAILED|CUFFT_INTERNAL_ERROR|Failed to allocate memory|CUDA failure 2"
)


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, and what to do, in one line.

    It is a ValueError, too, which existing programs catch. Scripts print it on stderr without a
    traceback and exit with code 2.
    """


def is_memory_trouble(error: Exception) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or _MEMORY_TROUBLE.search(str(error)) is not None
