"""Errors for people to read: one sentence and an exit code, without a traceback."""

import contextlib
import difflib
import errno
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

AGAIN = 0.05  # seconds after which a Ctrl-C that a callback went over is raised again
GRACE = 5.0  # seconds from Ctrl-C on for closing files, in which nothing else should happen


class UserError(ValueError):
    """Bad input. The message is one sentence: where it is, what was expected, what was found.

    Commands print it and exit with code 2; in a library it is an ordinary `ValueError`.
    """


def unknown(kind: str, found: str, known: Iterable[str]) -> UserError:
    """Returns the error for an unknown name, which suggests the nearest known one.

    Args:
      kind: what the name stands for, for example `"architecture"`.
      found: the name that the user gave.
      known: all known names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}."
    return UserError(f"unknown {kind} {found!r}; {hint}")


class RunFailed(RuntimeError):
    """A run that failed although its input was good; shown as one sentence, without a traceback.

    Commands exit with code 1.
    """


class NotTrainable(RunFailed):
    """A run that its settings made fail: a loss that is no number, or too little device memory."""


def reported(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates a command's `main`: prints errors meant for people, and returns an exit code.

    The code is 2 for `UserError`, a path that the system refuses, a full disk and a platform that
    JAX does not find, 1 for `RunFailed`, 130 for Ctrl-C, and 141 if the reader of the output is
    gone.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name from the command line may have characters that the terminal cannot encode.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                code = main(*args, **kwargs)
            except Exception as error:
                if _interrupted:  # which a library took for an error of its own
                    raise KeyboardInterrupt from error
                raise
            sys.stdout.flush()
            return code
        except UserError as error:
            return say(str(error), 2)
        except BrokenPipeError:  # for example `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            if error.filename is not None:
                return say(f"{error.filename}: {error.strerror}", 2)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            # A full disk, perhaps behind the output: what is left of that would fail at exit again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return say(f"cannot write: {error.strerror}", 2)
        except RunFailed as error:
            return say(str(error), 1)
        except (RuntimeError, AssertionError):
            if sentence := _missing_platform():
                return say(sentence, 2)
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapper


@contextlib.contextmanager
def interrupts_end_at_once() -> Iterator[None]:
    """While entered, Ctrl-C ends the process with one line: where there is nothing to clean up.

    A `KeyboardInterrupt` in the middle of an import is a traceback at best; at worst the import
    goes over it, or raises an `ImportError` for it. Nothing changes outside the main thread.
    """
    with _interrupts(_end):
        yield


_interrupted = False  # whether Ctrl-C was pressed within `interrupts_end`, which is still entered


@contextlib.contextmanager
def interrupts_end() -> Iterator[None]:
    """While entered, Ctrl-C is a `KeyboardInterrupt`, and whatever comes of it an end of a line.

    Where a callback goes over it, it is raised again outside of the callback; where what is closed
    takes too long, the process ends all the same.

    Raises:
      KeyboardInterrupt: in place of any exception after Ctrl-C.
    """
    global _interrupted

    def interrupt(signum: int, frame: FrameType | None) -> None:
        global _interrupted
        if _interrupted:
            _end(signum, frame)
        _interrupted = True
        end = threading.Timer(GRACE, _end, (signum, frame))
        end.daemon = True
        end.start()
        raise KeyboardInterrupt

    def ignored(unraisable: Any) -> None:
        global _interrupted
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        _interrupted = False  # a callback went over it, such as JAX's at garbage collection
        again = threading.Timer(AGAIN, signal.pthread_kill, (main.ident, signal.SIGINT))
        again.daemon = True
        again.start()

    main, hook = threading.main_thread(), sys.unraisablehook
    with _interrupts(interrupt):
        sys.unraisablehook = ignored
        try:
            yield
        except Exception as error:
            if _interrupted:
                raise KeyboardInterrupt from error
            raise
        finally:
            sys.unraisablehook = hook
            _interrupted = False


@contextlib.contextmanager
def _interrupts(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _end(signum: int, frame: FrameType | None) -> None:
    end_at_once(signum)


def end_at_once(signum: int) -> NoReturn:
    """Ends this process and those that it started, without closing anything, as after Ctrl-C."""
    if multiprocessing := sys.modules.get("multiprocessing"):  # takes long to import
        for child in multiprocessing.active_children():
            child.terminate()
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def _missing_platform() -> str | None:
    """Says that JAX does not find the platform it is told to use, if that is so."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms or "jax" not in sys.modules:
        return None
    import jax  # which commands that compute have imported before

    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an assertion for cuda (0.11.2)
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return (
            f"JAX finds no device of JAX_PLATFORMS={platforms}{reason}: "
            "unset it to use those there are, or install JAX for that platform"
        )
    return None


def say(sentence: str, code: int) -> int:
    """Prints an error in one line, and returns `code`.

    Line breaks and terminal control characters in names are escaped.
    """
    print(f"error: {printable(sentence)}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """Escapes line breaks and terminal control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
