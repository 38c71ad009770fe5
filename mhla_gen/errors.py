"""What users are told."""


class UserError(ValueError):
    """Something that the user can mend: one sentence, with what to do.

    The command line prints these as one line; every other exception keeps its traceback.
    """


class MissingError(UserError, FileNotFoundError):
    """A file or a folder that is not there."""
