"""How commands end: one line, the right code, and Ctrl-C obeyed wherever it comes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e5v_jax.exits import exit_on_error

ROOT = Path(__file__).parents[1]
START = "from e5v_jax import exits\nexits.GRACE = 0.3\nwith exits.guarded(None):\n    "
READY = "print('ready', flush=True)\n    "


def run(body: str, *signals: float) -> tuple[int, list[str], float]:
    """Run a guarded block; Ctrl-C comes so many seconds after it is ready, and after each other.

    Returns the exit code, the lines on stderr, and the seconds from the first Ctrl-C to the end.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", START + (body if "'ready'" in body else READY + body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    first = time.monotonic()
    for i, seconds in enumerate(signals):
        time.sleep(seconds)
        first = time.monotonic() if i == 0 else first
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err.splitlines(), time.monotonic() - first


SLEEP = "import time\n    "
SWALLOWED = SLEEP + "try: time.sleep(9)\n    except KeyboardInterrupt: pass\n    "
# no Python runs meanwhile, as while XLA compiles; for a minute if it is let
IN_C = "import hashlib\n    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**27)"
TIDYING = (
    SLEEP + "try: time.sleep(9)\n    finally:\n        time.sleep(0.1)\n        print('tidied')"
)
# tidying up ends just when the watching thread has run out of patience and is about to end it all
AT_ONCE = """import builtins, time
    def slowly(*words, **options):
        builtins.print(*words, **options)
        time.sleep(1)
    exits.print = slowly
    try: time.sleep(9)
    finally: time.sleep(0.6)"""
# a second Ctrl-C while the command tidies up or tells of the first
COMMAND = """import builtins, dataclasses, time
    from e5v_jax import cli
    def slowly(*words, **options):
        builtins.print(*words, **options, flush=True)
        time.sleep(0.5)
    exits.print = slowly
    @dataclasses.dataclass
    class Args:
        pass
    def main(args):
        builtins.print('ready', flush=True)
        try: time.sleep(9)
        finally: time.sleep(0.1)
    cli.run(main, Args, argv=[])"""


@pytest.mark.parametrize(
    ("body", "signals"),
    [
        (SLEEP + "time.sleep(9)", [0.1]),
        (SWALLOWED + "pass", [0.1]),
        (SWALLOWED + "import sys; sys.exit(0)", [0.1]),
        (SWALLOWED + "raise ValueError('what came of it')", [0.1]),
        (SWALLOWED + "time.sleep(60)", [0.1]),
        (IN_C, [0.1]),
        (IN_C, [0.1, 0.05]),
        (TIDYING, [0.1]),
        (AT_ONCE, [0.1]),
        (AT_ONCE, [0.1, 0.1]),  # the second is heard by both threads
        (COMMAND, [0.1, 0.05]),
        (COMMAND, [0.1, 0.3]),
        (COMMAND, [0.1, 0.3, 0.1]),
    ],
    ids=[
        "sleep",
        "swallowed",
        "exit",
        "error",
        "goes-on",
        "in-c",
        "twice",
        "tidying",
        "at-once",
        "both",
        "command-tidying",
        "command-telling",
        "command-thrice",
    ],
)
def test_an_interrupt_is_obeyed(body: str, signals: list[float]) -> None:
    code, lines, seconds = run(body, *signals)
    assert (code, lines) == (130, ["interrupted"])
    assert seconds < 5


def test_an_interrupted_import_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(9)\n")
    code, lines, _ = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import slow", 0.3)
    assert (code, lines) == (130, ["interrupted"])


def test_errors_of_threads_are_not_printed() -> None:
    body = """import threading
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise ValueError("a.csv:3: the one line")"""
    assert run(body)[:2] == (1, ["error: a.csv:3: the one line"])
    assert run("raise exits.UsageError('--x')")[:2] == (2, ["error: --x"])
    assert run("raise SystemExit('usage')")[:2] == (1, ["usage"])
    assert run("pass")[:2] == (0, [])


def test_a_reader_that_goes_is_no_error() -> None:
    body = READY + "while True: print('line')"
    process = subprocess.Popen(
        [sys.executable, "-c", START + body],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == b""
    assert process.wait() == 1


def test_a_full_disk_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(28, "No space left on device", "out/x.npy"), OSError(28, "No space")):
        with pytest.raises(SystemExit), exit_on_error(show_traceback=False):
            raise error
    assert capsys.readouterr().err.splitlines() == [
        "error: out/x.npy: No space left on device: free some space there, then start it again",
        "error: No space: free some space there, then start it again",
    ]
