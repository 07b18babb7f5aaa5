"""The error for what the person at the command line can put right."""


class UserError(Exception):
    """Told as one line, `gpt-ext: error: ...`, with exit code 2."""
