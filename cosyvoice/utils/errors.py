"""The one exception that means: the user can mend this."""


class InputError(Exception):
    """Something the user gave is wrong; the message says what, and what to do, in one line.

    Scripts print it on stderr without a traceback and exit with code 2.
    """
