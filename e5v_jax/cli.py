"""What all commands share: typed flags and the file of a configuration."""

import io
import logging
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Generic, NoReturn, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from e5v_jax.exits import UsageError
from e5v_jax.storage import as_path, check_reachable

Args = TypeVar("Args")
# transformers warns of what it would do with a model; what concerns a user of ours is an error
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


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
    SystemExit: after the work, and by a wrong command line; what ``main`` raises is for
    :func:`e5v_jax.exits.guarded`, which stands around a command and its imports.
    """
    command: _Command[Args] = tyro.cli(
        _Command[args_type],  # type: ignore[valid-type]  # a type known only at run time
        prog=program(),
        description=args_type.__doc__,
        default=tyro.MISSING_NONPROP if default is None else _Command(default),
        args=argv,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8, after the work
        sys.stdout.reconfigure(errors="backslashreplace")
    refuse_remote_paths(command.args)
    if not command.traceback:
        _quiet_libraries()
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

    Raises UsageError: the file cannot be used.
    """
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--config":
            file, end = (value, i + 1) if equals else (" ".join(argv[i + 1 : i + 2]), i + 2)
            if not file:
                raise UsageError("--config: expected a file")
            return read_config(Path(file), config_type), [*argv[:i], *argv[end:]]
    return None, argv


def show_log() -> None:
    """Print what the package logs, from INFO on, to stderr."""
    logging.basicConfig(format="%(message)s", force=True)  # a library may have had its way before
    logging.getLogger("e5v_jax").setLevel(logging.INFO)


def _quiet_libraries() -> None:
    """Keep what Orbax and asyncio log of errors in their threads, which the main thread hears of.

    Of a full disk, that is a thousand lines before the one that says so.
    """
    from absl import logging as absl_logging  # Orbax's; here, for its import takes a while

    absl_logging.set_verbosity(absl_logging.FATAL)
    # a full disk again: the run goes on without what JAX could not keep
    warnings.filterwarnings("ignore", message="Error writing persistent compilation cache entry")
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def refuse_remote_paths(args: object) -> None:
    """Refuse what is no path of this machine and cannot be used, at any depth of a dataclass.

    Raises UsageError: a URL (``gs://``) where a path is meant; OSError: a bucket that cannot be
    reached.
    """
    if isinstance(args, os.PathLike):
        check_reachable(os.fspath(args))
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
