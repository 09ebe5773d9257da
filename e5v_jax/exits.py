"""How a command ends: 0, or one line on stderr and 1, 2 (usage) or 130 (Ctrl-C).

It imports the standard library only, so that a command can guard its slow imports with it.
"""

import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GRACE = 10.0  # seconds that tidying up may take after Ctrl-C
END = b"\0"  # what the watcher of signals reads at the end of a block


class UsageError(ValueError):
    """The command line itself is wrong, in a way that only the command can tell: exit code 2."""


def full_disk(error: Exception) -> int | None:
    """The one of ``FULL`` that an error speaks of, whatever its class; None of any other."""
    return next((number for number in FULL if os.strerror(number) in str(error)), None)


@contextmanager
def exit_on_error(*, show_traceback: bool) -> Iterator[None]:
    """Turn an error into a line on stderr and SystemExit: 1, 2 (UsageError), 130 (Ctrl-C)."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # who read the output has gone, as `| head` does, and knows enough
        sys.exit(1)
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        else:
            print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


@contextmanager
def guarded(argv: Sequence[str] | None) -> Iterator[Sequence[str]]:
    """Guard a whole command, its imports included; it gives the words of the command line.

    These are ``argv``, or with None those of this process, which is then the command's own: errors
    of other threads are not printed, as the main thread hears of them; Ctrl-C is obeyed wherever it
    comes; and after an error the process ends at once. The interpreter's own end would let threads
    of JAX and Orbax print pages about what was told in one line, wait for what never comes, or
    crash. All that is ours is closed by then or safe against a kill.
    """
    words = sys.argv[1:] if argv is None else argv
    show_traceback = "--traceback" in words
    if argv is not None:
        with exit_on_error(show_traceback=show_traceback):
            yield words
        return
    if not show_traceback:
        threading.excepthook = lambda _: None
        sys.unraisablehook = lambda _: None
    try:
        with exit_on_error(show_traceback=show_traceback), _obeying_interrupts():
            yield words
    except SystemExit as end:
        if end.code:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            _leave(end.code if isinstance(end.code, int) else 1)
        raise


@contextmanager
def _obeying_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, and end the process if that does not.

    A callback into Python may swallow it, and while XLA compiles there is no Python to interrupt.
    So a thread, which the signal wakes at once, ends the process after ``GRACE`` seconds, or at a
    second Ctrl-C. Whatever is being written then is safe against it, as against a kill.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set a handler
        yield
        return
    noted = threading.Event()
    last_word = threading.Lock()  # never given back: whoever has it speaks and ends the process

    def end_now() -> NoReturn:
        last_word.acquire()
        print("interrupted", file=sys.stderr)
        _leave(INTERRUPTED)

    def handle(number: int, frame: FrameType | None) -> None:
        if noted.is_set():
            return  # the second one is for the thread below
        noted.set()
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                end_now()  # C code that is being imported may print pages, or crash
            frame = frame.f_back
        raise KeyboardInterrupt

    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        # any signal writes its number, and the end of the block writes END, which no signal has
        while (number := os.read(reading, 1)) not in (END, bytes([signal.SIGINT])):
            pass
        if number != END:
            ready, _, _ = select.select([reading], [], [], GRACE)
            if not ready or os.read(reading, 1) != END:
                end_now()

    before = signal.signal(signal.SIGINT, handle)
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        # what is left of an interrupted process is one line
        signal.signal(signal.SIGINT, signal.SIG_IGN if noted.is_set() else before)
        os.write(writing, END)
        watcher.join()  # if it has run out of patience just now, it speaks and ends the process
        os.close(reading)
        os.close(writing)
        if noted.is_set():  # even where it was swallowed, or another error came of it
            raise KeyboardInterrupt


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def one_line(error: Exception) -> str:
    """Say what an error says to the user in one line."""
    if isinstance(error, OSError) and error.strerror:
        todo = ": free some space there, then start it again" if error.errno in FULL else ""
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}{todo}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # errors whose message is written for the user; any other class is named in front of its message
    if isinstance(error, ValueError | OSError | ImportError) and lines:
        return " ".join(lines)
    # Only the first line: an error of XLA may go on for pages.
    return ": ".join([type(error).__name__, *lines[:1]]) + " (--traceback shows where)"
