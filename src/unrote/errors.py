"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Unusable input: names the file, key or flag at fault and the way out.

    The command line prints the message without a traceback and exits with code 2.
    """
