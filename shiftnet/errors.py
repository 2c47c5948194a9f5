"""Errors that people read: a sentence, an exit code, no traceback."""

import difflib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(ValueError):
    """Bad input. The message is one sentence: what was found, where, and what was expected.

    The commands print it and exit with code 2; as a library, it is an ordinary `ValueError`.
    """


def unknown(kind: str, found: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    Args:
      kind: what the name stands for, for example `"architecture"`.
      found: what the user wrote.
      known: every name there is.
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}."
    return UserError(f"unknown {kind} {found!r}; {hint}")


class RunFailed(RuntimeError):
    """A run that could not go on though its input was good; a sentence, shown without traceback.

    The commands exit with code 1.
    """


def reported(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a command's `main`: errors meant for people become a sentence and an exit code.

    2 for `UserError` and for a path that the system refuses, 1 for `RunFailed`, 130 for Ctrl-C, 141
    where nobody reads what is printed.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name from the command line may hold what the terminal's encoding does not.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = main(*args, **kwargs)
            sys.stdout.flush()
            return code
        except UserError as error:
            return say(str(error), 2)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            if error.filename is None:
                raise
            return say(f"{error.filename}: {error.strerror}", 2)
        except RunFailed as error:
            return say(str(error), 1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapper


def say(sentence: str, code: int) -> int:
    """Prints an error in one line, and returns `code`.

    A name in it may hold line ends, or a terminal's commands.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
    print(f"error: {''.join(shown)}", file=sys.stderr)
    return code
