"""What ``python -m e5v_jax.search`` does: index, query, serve.

The functions import what they need: --help waits for neither JAX nor transformers.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import numpy as np
from PIL import Image

from e5v_jax import cli
from e5v_jax.data.inputs import Input, InputError
from e5v_jax.search.index import OnError, Report, forget, update
from e5v_jax.search.options import IndexArgs, QueryArgs, ServeArgs, changes
from e5v_jax.search.query import Embed, Hit, QueryError, combine, embed_terms, find, parse_terms
from e5v_jax.search.store import DATABASE, IndexFolderError, Store
from e5v_jax.search.writer import Writer

if TYPE_CHECKING:
    from e5v_jax import E5V

Searching = TypeVar("Searching", QueryArgs, ServeArgs)
_COMMANDS = ("index", "query", "serve")
_SHOWN = 5  # files that are told by name
_CACHE_SIZE = 1024  # vectors of queries: the same again, with other terms or another page
_WIDTH = 72  # most characters of a text in a result


def index(args: IndexArgs) -> None:
    """Bring an index up to date and say what was done.

    Raises cli.UsageError: a flag's value; ValueError, OSError: one line naming file or folder.
    """
    args.check()
    from e5v_jax.encode.command import decoding_pool
    from e5v_jax.lock import hold
    from e5v_jax.search.progress import UpdateProgress

    start = time.monotonic()
    with hold(args.index):
        args = args.with_model_of(_read_meta(args.index))
        identity = args.identify(args.load_processor())
        with closing(Writer(args.index, args.store)) as writer:
            sources = _prepare(writer, args, identity)
            with decoding_pool(args.num_workers) as pool, UpdateProgress() as progress:
                embed = _Embedding(args, pool)
                report = update(writer, sources, embed, progress)
            _tell(args.index, report, writer.count(), embed.cut, time.monotonic() - start)


def _read_meta(folder: Path) -> dict[str, object]:
    if not (folder / DATABASE).exists():
        return {}
    with closing(Store(folder)) as store:
        return store.read_meta()


def _prepare(writer: Writer, args: IndexArgs, identity: dict[str, object]) -> Sequence[Path]:
    """Drop what is not wanted or of another model; the folders and files to index."""
    if args.forget:
        dropped = forget(writer, args.forget)
        print(f"{args.index}: {dropped} file{'s' * (dropped != 1)} dropped")
    meta, sources = writer.read_meta(), list(args.sources)
    if not (sources or meta["roots"] or args.forget):
        raise cli.UsageError("give folders or files to index")
    if "identity" not in meta:
        with writer.commit():
            writer.set_meta(identity=identity, model=args.model_args())
    elif changed := changes(meta["identity"], identity):
        print(f"{args.index}: embeds all again: made with another {changed}", flush=True)
        with writer.commit():
            writer.begin_anew(identity=identity, model=args.model_args())
        sources = [*map(Path, meta["roots"]), *sources]
    return sources


class _Embedding:
    """What embeds files, by a model that is loaded when the first is to be embedded."""

    def __init__(self, args: IndexArgs, pool: Executor | None) -> None:
        self._load, self._pool = cache(lambda: _load(args)), pool
        self._tokens = args.max_num_batched_tokens
        self.cut = 0  # texts that were too long

    def __call__(self, inputs: Sequence[Input], on_error: OnError) -> np.ndarray:
        cut: list[int] = []
        vectors = self._load().encode_document(
            list(inputs),
            on_error=on_error,
            on_truncate=cut.append,
            truncate="end",
            show_progress_bar=False,
            max_num_batched_tokens=self._tokens,
            pool=self._pool,
        )
        self.cut += len(cut)
        return vectors


def _load(args: IndexArgs | QueryArgs | ServeArgs) -> "E5V":
    import jax

    return args.load(jax.local_devices())


def _tell(folder: Path, report: Report, counts: dict[str, int], cut: int, seconds: float) -> None:
    names = ("new", "edited", "renamed", "deleted", "unchanged")
    told = [f"{count} {name}" for name in names if (count := getattr(report, name))]
    print(
        f"{folder}: {counts['images']} photographs and {counts['texts']} texts of "
        f"{counts['files']} files ({', '.join(told) or 'no file'}); {report.embedded} embedded, "
        f"{seconds:.1f} s"
    )
    if cut:
        print(f"{cut} text{'s' * (cut > 1)} cut to fit the model")
    for path in list(report.failed)[:_SHOWN]:
        print(f"not indexed: {path}: {report.failed[path]}", file=sys.stderr)
    if (more := len(report.failed) - _SHOWN) > 0:
        print(f"not indexed: {more} more file{'s' * (more > 1)}", file=sys.stderr)


def _open(args: Searching) -> tuple[Store, Searching]:
    """The index of a command that searches, and the flags with the model that made it.

    Raises IndexFolderError: it is not there, not begun, or made with another model.
    """
    store = Store(args.index)
    meta = store.read_meta()
    if "identity" not in meta:
        raise IndexFolderError(f"{args.index}: nothing is indexed yet")
    args = args.with_model_of(meta)
    processor = args.load_processor()
    args.check_identity(meta, processor)
    if args.instruction is not None:
        processor.preset.choose("query", instruction=args.instruction)
    return store, args


def open_embed(model: "E5V", instruction: str | None) -> Embed:
    """What embeds the terms of one query."""

    def embed(item: Input) -> np.ndarray:
        try:
            return model.encode_query(item, truncate="end", instruction=instruction)
        except InputError as error:
            raise QueryError(error.reason) from error

    return embed


def query(args: QueryArgs) -> None:
    """Search and print. Raises cli.UsageError, ValueError, OSError: one line."""
    args.check()
    try:
        terms = parse_terms(args.terms)
    except QueryError as error:
        raise cli.UsageError(str(error)) from error
    store, args = _open(args)
    with closing(store):
        identity = store.read_meta()["identity"]
        terms = embed_terms(terms, open_embed(_load(args), args.instruction))
        with store.reading() as now:
            now.check_identity(identity)
            vector = combine(terms, now)
            hits = find(now, vector, args.top, threshold=args.threshold, duplicates=args.duplicates)
    print_hits(hits, as_json=args.json)


def print_hits(hits: Sequence[Hit], *, as_json: bool) -> None:
    """Print results: a JSON list, or lines of score, path and text."""
    if as_json:
        rows = [
            {
                "score": round(hit.score, 6),
                "kind": hit.row.kind,
                "path": hit.row.path,
                "line": hit.row.line,
                "text": hit.row.text,
            }
            for hit in hits
        ]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for hit in hits:
        path = Path(hit.row.path)
        near = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        where = near if hit.row.line is None else f"{near}:{hit.row.line}"
        text = " ".join((hit.row.text or "").split())
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        text = text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
        print(f"{hit.score:.3f}  {where}  {text}".rstrip())
    if not hits:
        print("nothing found", file=sys.stderr)


def serve(args: ServeArgs) -> None:
    """Serve the page until it is ended. Raises cli.UsageError, ValueError, OSError: one line."""
    args.check()
    try:
        from e5v_jax.search.queries import engine_embed
        from e5v_jax.search.server import listen, run_server
        from e5v_jax.serve.engine import Engine
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing: pip install -e '.[search]'") from error

    taken = listen(args.host, args.port)  # before the model, which may take minutes to load
    store, args = _open(args)
    with closing(store), closing(taken):
        counts = store.count()
        engine = Engine(_load(args), cache_size=_CACHE_SIZE)
        embed = engine_embed(engine, args.instruction)
        embed("warm")  # compiles, so that the first search does not wait for it

        def ready(url: str) -> None:
            told = f"{counts['images']} photographs and {counts['texts']} texts"
            print(f"{url}  {told} of {args.index}; Ctrl-C ends it", flush=True)

        try:
            run_server(taken, store, embed, args.allow_host, ready)
        finally:
            engine.close()


def _quietly(command: Callable[..., None]) -> Callable[..., None]:
    """Without Pillow's two lines about an image that is then refused in one."""

    def run(args: object) -> None:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            command(args)

    return run


def run(words: Sequence[str]) -> NoReturn:
    """Do what the first word says, index, query or serve. It exits."""
    if words[:1] == ["index"]:
        cli.run(_quietly(index), IndexArgs, argv=words[1:])
    if words[:1] == ["query"]:
        cli.run(_quietly(query), QueryArgs, argv=words[1:])
    if words[:1] == ["serve"]:
        cli.run(_quietly(serve), ServeArgs, argv=words[1:])
    told = f"usage: {cli.program()} {{{'|'.join(_COMMANDS)}}} --help"
    if words[:1] in (["--help"], ["-h"]):
        print(f"{told}\n\nindex files; query an index; serve a search page of it")
        sys.exit(0)
    print(told, file=sys.stderr)
    sys.exit(2)
