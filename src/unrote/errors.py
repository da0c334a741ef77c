"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Unusable input: names the file, key or flag at fault and the way out.

    The command line prints the message without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What ``error`` says, in one line; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
