"""Ctrl-C while a script still imports. Importing this module takes no time and changes nothing."""

import signal


def stop_silently() -> None:
    """Let Ctrl-C end the process at once, without a traceback, until `command.run` takes over.

    Nothing is lost, because nothing is done yet. A script that was started with Ctrl-C ignored keeps ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
