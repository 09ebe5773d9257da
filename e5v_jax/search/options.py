"""The flags of ``python -m e5v_jax.search``, and the model that an index was made with."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro

from e5v_jax.cli import UsageError
from e5v_jax.encode.model_args import ModelArgs
from e5v_jax.search.query import DUPLICATE
from e5v_jax.search.store import IndexFolderError
from e5v_jax.search.vectors import FILES, LANCEDB
from e5v_jax.storage import as_path, in_bucket

if TYPE_CHECKING:
    from e5v_jax.families.base import Processor

_NOT_OF_THE_PROMPT = ("checkpoints", "about", "query", "instructed_query", "instructed_document")


@dataclass(frozen=True, kw_only=True)
class SearchArgs(ModelArgs):
    """This says which index, and which model it is searched with."""

    model: str = ""
    """Converted folder, Hugging Face folder or GGUF file, or a hub id. By default the index's; the
    other flags of the model are then the index's too."""
    index: Path  # The folder of the index.

    def with_model_of(self, meta: dict[str, Any]) -> Self:
        """The same, with the model that an index names where none is given.

        Raises UsageError: there is none, or a flag of a model is given without one.
        """
        if self.model:
            return self
        names = [field.name for field in fields(ModelArgs) if field.name != "model"]
        defaults = ModelArgs(model="")
        for name in names:
            if getattr(self, name) != getattr(defaults, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --model")
        if "model" not in meta:
            raise UsageError("--model: needed for a new index")
        told = {name: meta["model"][name] for name in ("model", *names) if name in meta["model"]}
        told["adapter"] = None if told["adapter"] is None else as_path(told["adapter"])
        shared = [field.name for field in fields(self) if field.name not in (*names, "model")]
        return type(self)(**{name: getattr(self, name) for name in shared}, **told)

    def model_args(self) -> dict[str, Any]:
        """What :meth:`with_model_of` reads: paths are absolute, so that any folder will do."""
        told = {field.name: getattr(self, field.name) for field in fields(ModelArgs)}
        if Path(self.model).exists():
            told["model"] = os.path.abspath(self.model)
        if self.adapter is not None:
            path = str(self.adapter)
            told["adapter"] = path if in_bucket(path) else os.path.abspath(path)
        return {**told, "verify": False}

    def identify(self, processor: "Processor") -> dict[str, Any]:
        """All that the vectors of an index depend on."""
        preset = asdict(processor.preset)
        return {
            "model": self.content_hash(),
            **{name: getattr(self, name) for name in ("dtype", "quantize", "attn_implementation")},
            "template": processor.template,
            "prompt": {k: v for k, v in preset.items() if k not in _NOT_OF_THE_PROMPT},
        }

    def check_identity(self, meta: dict[str, Any], processor: "Processor") -> None:
        """Refuse a model that is not the index's. Raises IndexFolderError: says what differs."""
        if changed := changes(meta["identity"], self.identify(processor)):
            raise IndexFolderError(
                f"{self.index}: made with another {changed}; bring it up to date with "
                f"python -m e5v_jax.search index --index {self.index}, or give its --model"
            )


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name what differs, for people; nothing if nothing does."""
    # as JSON has them: a tuple is a list there
    before, now = (json.loads(json.dumps(x)) for x in (before, now))
    names = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    return ", ".join(names)


@dataclass(frozen=True, kw_only=True)
class IndexArgs(SearchArgs):
    """Index photographs and text files, or bring an index up to date with them.

    Only what is new or edited is embedded; files are told apart by path, size, time and content, so
    that a renamed or copied one costs nothing. All is embedded again if the model, its adapter or
    the prompt is another than before. Safe against kills: start it again and it goes on.
    """

    sources: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders, searched deep, and files: photographs, and texts: each non-empty line of .txt, each
    paragraph of .md (between empty lines, with headings above it), the key "text" of each row of
    .jsonl. Hidden ones are left out. By default what the index was made of; what is not given stays
    as it is."""
    store: str | None = None
    """Where a new index keeps its vectors: files (the default: every vector is compared), lancedb
    (a table in its folder, searched approximately from 200,000 vectors on), or an address that
    LanceDB knows, as s3://bucket/folder. What else there is stays in the folder."""
    forget: tuple[Path, ...] = ()
    """Folders and files to drop from the index, which may be gone."""
    max_num_batched_tokens: int | None = None
    """Most tokens per device batch, padding included; by default 1024 on a CPU, else 16384."""
    num_workers: int = 0  # Processes that decode images, ahead of the device; 0 is a few threads.

    def check(self) -> None:
        """Refuse bad values. Raises UsageError: names the flag."""
        super().check()
        self.require_positive("max_num_batched_tokens")
        if self.store not in (None, FILES, LANCEDB) and "://" not in (self.store or ""):
            raise UsageError(f"--store: {self.store!r}, expected files, lancedb or an address")
        if self.num_workers < 0:
            raise UsageError(f"--num-workers: {self.num_workers}, expected at least 0")


@dataclass(frozen=True, kw_only=True)
class QueryArgs(SearchArgs):
    """Search an index by words, by a photograph, or by both.

    query "a dog in snow" | dog.jpg | dog.jpg "but at night", and then any of + "more of this" or
    - "less of this", each with a weight if it is not 0.5: -0.3 "people".
    """

    terms: tyro.conf.Positional[tuple[str, ...]] = ()
    """Words, a photograph, or a photograph and words; then + or - and the same again."""
    top: Annotated[int, tyro.conf.arg(aliases=["-t"])] = 10  # Most results.
    threshold: float = -1.0  # Least cosine of a result.
    hide_duplicates: bool = False
    """Leave out what looks like a better result (a cosine of 0.97)."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False  # Print a JSON list.
    instruction: str | None = None
    """What to look for, in words that the preset's authors use, where it takes an instruction."""

    @property
    def duplicates(self) -> float | None:
        """What :func:`e5v_jax.search.query.find` takes."""
        return DUPLICATE if self.hide_duplicates else None

    def check(self) -> None:
        """Refuse bad values. Raises UsageError: names the flag."""
        super().check()
        self.require_positive("top")


@dataclass(frozen=True, kw_only=True)
class ServeArgs(SearchArgs):
    """Serve the search page of an index, on this machine."""

    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it sees all that is indexed: there is no password."""
    port: int = 8080  # Port to listen on; 0 takes a free one.
    allow_host: tuple[str, ...] = ()
    """More names that this machine is called by in a browser; requests to others are refused."""
    instruction: str | None = None
    """What to look for, in words that the preset's authors use, where it takes an instruction."""

    def check(self) -> None:
        """Refuse bad values. Raises UsageError: names the flag."""
        super().check()
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port: {self.port}, expected 0 to 65535")
