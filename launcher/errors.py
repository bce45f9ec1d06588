"""What the command line shows without a traceback."""


class InputError(Exception):
    """The input is wrong: one line for each mistake, with file, key and the right form. Exit code 2."""


class UnclearSubmissionError(Exception):
    """A job may or may not be queued; the run's folder is kept. Exit code 1."""
