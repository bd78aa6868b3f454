"""What every command does alike: its options, its errors in one line, its exit code, its output."""
import argparse
import io
import os
import re
import sys
import warnings
from contextlib import contextmanager

unsaid = []                              # why `say` could not write


def printable(text: str) -> str:
    """Escapes line breaks, terminal codes and bytes that are no UTF-8: file names may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(Exception):
    """What the user gave cannot be used: one line that names it and says what to do."""
    def __str__(self):
        return printable(super().__str__())


@contextmanager
def readable(path="a file"):
    """A folder or file that cannot be read is an InputError. Not every error knows its path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror}); check name "
                         "and permissions") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def tell(text: str, end="\n"):
    """Prints for people, on standard error. Where that cannot be written, the work goes on."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def warn(lines):
    for line in lines:
        tell(f"warning: {printable(line)}")


def say(text: str):
    """Prints on standard output what long work says of itself. A full disk behind it does not stop
    the work: `run_command` names it at the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        unsaid.append(error)


def silence(stream):
    """What the stream still holds, and all that follows, leads nowhere: no complaint at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_streams():
    """Opens the standard streams that were closed, in their order: else the files that are opened
    next would take their places. A name that the terminal cannot show is printed with escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(command, stopped="stopped; the same command goes on with what was finished") -> int:
    """The exit code of command(): what it returns, 2 for what the user gave and cannot be used, 130
    for Ctrl-C, 141 where whoever read the output left, as in `... | head`."""
    open_streams()
    unsaid.clear()
    try:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"PIL\.")   # bad files are named instead
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")   # cache
                code = command()
        except SystemExit as stop:                   # of --help
            code = stop.code or 0
        except InputError as error:
            tell(f"error: {error}")
            code = 2
        except KeyboardInterrupt:
            tell(f"\n{stopped}")
            code = 130
        except (MemoryError, RuntimeError) as error:
            if not re.search("out of memory|(allocate|enough) memory|MemoryError", repr(error)):
                raise
            tell("error: out of memory; choose smaller batches, fewer masks or a smaller model")
            code = 2
        except OSError as error:
            if error.filename is None:               # standard output's
                raise
            tell(f"error: {printable(os.fsdecode(error.filename))}: cannot be used "
                 f"({error.strerror}); check name and permissions, or name another")
            code = 2
        sys.stdout.flush()
        if unsaid:
            raise unsaid[0]
        return code
    except OSError as error:
        silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return 141
        tell(f"error: standard output: cannot be written ({error.strerror}); free some space or "
             "send it elsewhere, and run the same command again")
        return 2
