"""What all commands share: typed flags, one line per error, exit codes."""

import logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Generic, NoReturn, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from e5v_jax.storage import as_path

Args = TypeVar("Args")
# transformers warns of what it would do with a model; what concerns a user of ours is an error
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


class UsageError(ValueError):
    """The command line itself is wrong, in a way that only the command can tell: exit code 2."""


@dataclass(frozen=True)
class _Command(Generic[Args]):
    args: Annotated[Args, tyro.conf.arg(name="")]
    traceback: tyro.conf.FlagCreatePairsOff[bool] = False
    """On an error, show where in the code it came from."""


def program() -> str:
    """What the user called, for usage lines: ``python -m e5v_jax.train`` or ``e5v-train``."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def run(
    main: Callable[[Args], None],
    args_type: type[Args],
    *,
    default: Args | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line into ``args_type``, call ``main`` with it and exit.

    ``args_type`` is a dataclass: its docstring is the help text, the docstring of each field the
    help of its flag. ``--traceback`` is added. ``default`` has the values of the flags that are not
    given; ``argv``, the words of the command line, are by default those of this process. Raises
    SystemExit: always; see :func:`exit_on_error` for the codes.
    """
    command: _Command[Args] = tyro.cli(
        _Command[args_type],  # type: ignore[valid-type]  # a type known only at run time
        prog=program(),
        description=args_type.__doc__,
        default=tyro.MISSING_NONPROP if default is None else _Command(default),
        args=argv,
    )
    with exit_on_error(show_traceback=command.traceback):
        refuse_remote_paths(command.args)
        main(command.args)
    sys.exit(0)


def read_config(file: Path, config_type: type[Args]) -> Args:
    """What a file's ``get_config()`` returns. Raises UsageError: no file, or no ``config_type``."""
    if not file.is_file():
        raise UsageError(f"--config {file}: no such file")
    get_config = runpy.run_path(str(file)).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, config_type):
        raise UsageError(
            f"--config {file}: expected a get_config() that returns {config_type.__name__}(...)"
        )
    return config


def split_config(argv: Sequence[str], config_type: type[Args]) -> tuple[Args | None, Sequence[str]]:
    """(what the file after --config gives, the other words); None without that flag.

    Raises SystemExit: the file cannot be used (:func:`exit_on_error`).
    """
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--config":
            file, end = (value, i + 1) if equals else (" ".join(argv[i + 1 : i + 2]), i + 2)
            with exit_on_error(show_traceback="--traceback" in argv):
                if not file:
                    raise UsageError("--config: expected a file")
                return read_config(Path(file), config_type), [*argv[:i], *argv[end:]]
    return None, argv


def show_log() -> None:
    """Print what the package logs, from INFO on, to stderr."""
    logging.basicConfig(format="%(message)s", force=True)  # a library may have had its way before
    logging.getLogger("e5v_jax").setLevel(logging.INFO)


def refuse_remote_paths(args: object) -> None:
    """Raise UsageError on a URL (``gs://``) where a path is meant, at any depth of a dataclass."""
    # as a Path it would be a relative one, and be written here
    if isinstance(args, Path) and args.parts and re.fullmatch(r"[a-z][a-z0-9]+:", args.parts[0]):
        url = str(args).replace(":/", "://", 1)
        raise UsageError(
            f"{url}: not a path on this machine; mount the bucket and give its path there, or in "
            "a configuration file write e5v_jax.storage.as_path(...) (tpu/README.md, Cloud Storage)"
        )
    if is_dataclass(args) and not isinstance(args, type):
        args = tuple(getattr(args, field.name) for field in fields(args))
    for value in args if isinstance(args, tuple) else ():
        refuse_remote_paths(value)


@contextmanager
def exit_on_error(*, show_traceback: bool) -> Iterator[None]:
    """Turn an error into a line on stderr and SystemExit: 1, 2 (UsageError), 130 (interrupt)."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        else:
            print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # errors whose message is written for the user; any other class is named in front of its message
    if isinstance(error, ValueError | OSError | ImportError) and lines:
        return " ".join(lines)
    # Only the first line: an error of XLA may go on for pages.
    return ": ".join([type(error).__name__, *lines[:1]]) + " (--traceback shows where)"


def _from_words(words: list[str]) -> Path:
    try:
        return as_path(words[0])
    except ImportError as error:  # of a flag, tyro shows ValueErrors
        raise ValueError(str(error)) from None


_SPEC: PrimitiveConstructorSpec[Path] = PrimitiveConstructorSpec(
    1, "PATH", _from_words, lambda x: isinstance(x, os.PathLike), lambda path: [str(path)]
)
BucketPath = Annotated[Path, _SPEC]
"""The type of a flag that takes a path in a bucket too."""
