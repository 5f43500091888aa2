"""The one exception that means: the user can mend this; and the errors of files that mean it, too."""

import errno

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
NO_PERMISSION = (errno.EACCES, errno.EPERM)


class InputError(Exception):
    """Something the user gave is wrong; the message says what, and what to do, in one line.

    Scripts print it on stderr without a traceback and exit with code 2.
    """
