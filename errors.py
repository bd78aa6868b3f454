"""Errors and warnings: one line each, that names what the user gave."""
import sys
from contextlib import contextmanager


def printable(text: str) -> str:
    """Escapes line breaks, terminal codes and bytes that are no UTF-8: file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


class InputError(Exception):
    """What the user gave cannot be used: one line that names it and says what to do."""
    def __str__(self):
        return printable(super().__str__())


def warn(lines):
    for line in lines:
        print(f"warning: {printable(line)}", file=sys.stderr)


@contextmanager
def readable():
    """A folder or file that cannot be read is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check name and "
                         "permissions") from None
