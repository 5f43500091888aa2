"""The exception for mistakes that the user can correct, and the system errors that count as such."""

import errno
import re

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
NO_PERMISSION = (errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR)  # a file or folder that existed when the work began
# Messages by which torch, its libraries and onnxruntime report that memory is full.
_MEMORY_TROUBLE = re.compile(
    "out of memory|can't allocate memory|ALLOC_FAILED|CUFFT_INTERNAL_ERROR|Failed to allocate memory|CUDA failure 2"
)


class InputError(ValueError):
    """A mistake in what the user gave. Its message is one line that says what is wrong and what to do.

    It is also a ValueError, which existing programs catch. Scripts print it on stderr without a traceback and exit with
    code 2.
    """


def is_memory_trouble(error: Exception) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or _MEMORY_TROUBLE.search(str(error)) is not None
