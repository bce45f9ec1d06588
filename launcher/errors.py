"""What the command line shows without a traceback."""


class InputError(Exception):
    """The input is wrong: one line for each mistake, with file, key and the right form. Exit code 2."""
