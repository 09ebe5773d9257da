"""Bring an index up to date with the files: scan, embed what is new, drop what is gone."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from e5v_jax.data.images import ImageError
from e5v_jax.data.inputs import Input, InputError
from e5v_jax.search import scan
from e5v_jax.search.photographs import Thumbnail, make_thumbnail, upright
from e5v_jax.search.scan import File, Part, is_unchanged
from e5v_jax.search.writer import Writer

OnError = Callable[[InputError], None]
EmbedAll = Callable[[Sequence[Input], OnError], np.ndarray]
"""Vectors [N, D] of unit length; of those that it tells to OnError, zero."""
_TEXTS = 512  # most parts that are embedded before they are written
_IMAGES = 64
_HELD = 2**28  # bytes of photographs that were turned and wait in memory


@dataclass
class Report:
    """What an update found and did."""

    new: int = 0
    edited: int = 0
    renamed: int = 0
    deleted: int = 0
    unchanged: int = 0
    embedded: int = 0  # contents; equal ones count once
    failed: dict[str, str] = field(default_factory=dict)  # by path, what is wrong


class Progress:
    """What hears how far an update is; by default nobody."""

    def scanning(self, files: int) -> None:
        """So many files are there."""

    def scanned(self) -> None:
        """One of them was compared."""

    def reading(self, files: int) -> None:
        """So many of them are new or edited."""

    def read(self, files: int) -> None:
        """So many more of these are in the index."""


def update(
    writer: Writer, roots: Sequence[Path], embed: EmbedAll, progress: Progress | None = None
) -> Report:
    """Make the index say what is in the files of ``roots``; where none is given, of those before.

    What is embedded is written block by block: after a kill, only the block at hand is done again.
    A file's rows change all at once. ``embed`` is not called where nothing is new.

    Raises OSError, ValueError: a root is not there, or the disk is full.
    """
    progress = progress or Progress()
    before = [Path(root) for root in writer.read_meta()["roots"]]
    given = [Path(os.path.abspath(root)) for root in roots]
    paths, failed = scan.find_files(given or before, writer.folder.absolute())
    progress.scanning(len(paths))
    plan = scan.plan(paths, failed, writer.known_files(), given or before, progress.scanned)
    with writer.commit():
        writer.set_meta(roots=[str(root) for root in join_roots([*before, *given])])
        writer.drop_files(plan.deleted)
        for id, file in (*plan.moved, *plan.touched):
            writer.move_file(id, file)
    report = Report(
        new=plan.new,
        edited=len(plan.changed) - plan.new,
        renamed=len(plan.moved),
        deleted=len(plan.deleted),
        unchanged=plan.unchanged + len(plan.touched),
    )
    progress.reading(len(plan.changed))
    blocks = _Blocks(writer, embed, progress)
    for file in plan.changed:
        try:
            parts, wrong = scan.read_parts(file)
        except (OSError, ValueError) as error:
            parts, wrong = [], _reason(error, file)
        blocks.add(file, parts, wrong)
    blocks.write()
    writer.tidy()
    report.embedded = blocks.embedded
    report.failed = {**writer.errors(), **plan.failed, **blocks.unsettled}
    return report


def join_roots(roots: Sequence[Path]) -> list[Path]:
    """The roots without those that lie in others, each once, in order."""
    each = list(dict.fromkeys(roots))
    return [x for x in each if not any(x != y and x.is_relative_to(y) for y in each)]


def forget(writer: Writer, roots: Sequence[Path]) -> int:
    """Drop all files of ``roots``, which may be gone; the number of them.

    Raises ValueError: nothing of one is in the index.
    """
    known, dropped = writer.known_files(), set[int]()
    for root in roots:
        ids = {id for path, (id, _) in known.items() if scan.is_under(path, [root])}
        if not ids and os.path.abspath(root) not in writer.read_meta()["roots"]:
            raise ValueError(f"--forget {root}: nothing of it is in {writer.folder}")
        dropped |= ids
    with writer.commit():
        writer.drop_files(dropped)
        left = [x for x in writer.read_meta()["roots"] if not scan.is_under(x, roots)]
        writer.set_meta(roots=left)
    writer.tidy()
    return len(dropped)


class _Blocks:
    """Files on their way into the index, and the contents that are to be embedded for them."""

    def __init__(self, writer: Writer, embed: EmbedAll, progress: Progress) -> None:
        self._writer, self._embed, self._progress = writer, embed, progress
        self._files: list[tuple[File, list[Part], str | None]] = []  # read to their end
        self._inputs: dict[str, tuple[File, Input]] = {}  # by content, of the first that has it
        self._thumbnails: dict[str, Thumbnail] = {}
        self._images = self._held = 0
        self._bad: dict[str, str] = {}  # contents that cannot be embedded, and why
        self.embedded = 0
        self.unsettled: dict[str, str] = {}  # files that changed while they were read

    def add(self, file: File, parts: list[Part], wrong: str | None) -> None:
        """Take a file, and write what has come together first if that is a block."""
        for part in parts:
            if self._is_full():
                self.write()
            known = part.content in self._inputs or part.content in self._bad
            if not known and not self._writer.slots_of([part.content]):
                self._take(file, part)
        self._files.append((file, parts, wrong))

    def _is_full(self) -> bool:
        return len(self._inputs) >= _TEXTS or self._images >= _IMAGES or self._held >= _HELD

    def _take(self, file: File, part: Part) -> None:
        if part.text is not None:
            self._inputs[part.content] = file, part.text
            return
        try:
            self._thumbnails[part.content] = make_thumbnail(Path(file.path))
            image = upright(Path(file.path))
        except ImageError as error:
            self._bad[part.content] = _reason(error, file)
            return
        if isinstance(image, Image.Image):
            self._held += image.width * image.height * len(image.getbands())
        self._inputs[part.content] = file, image
        self._images += 1

    def write(self) -> None:
        """Embed what waits for it, and commit that with the files that are whole then."""

        def note(error: InputError) -> None:
            content = contents[error.position]
            self._bad[content] = _reason(ValueError(error.reason), self._inputs[content][0])

        contents = list(self._inputs)
        inputs = [value for _, value in self._inputs.values()]
        vectors = self._embed(inputs, note) if inputs else np.zeros((0, 0), np.float32)
        # A text is its content; a photograph may be another by now than the one that was hashed.
        good = [
            position
            for position, (content, (file, value)) in enumerate(self._inputs.items())
            if content not in self._bad and (isinstance(value, str) or is_unchanged(file))
        ]
        with self._writer.commit():
            self._writer.add_vectors([contents[i] for i in good], vectors[good])
            kept = {contents[i] for i in good}
            self._writer.add_thumbnails({k: v for k, v in self._thumbnails.items() if k in kept})
            for file, parts, wrong in self._files:
                self._put(file, parts, wrong)
        self.embedded += len(good)
        self._progress.read(len(self._files))
        self._files, self._inputs, self._thumbnails = [], {}, {}
        self._images = self._held = 0

    def _put(self, file: File, parts: list[Part], wrong: str | None) -> None:
        """Give a file its rows, unless it has changed and the next update has to read it again."""
        slots = self._writer.slots_of(part.content for part in parts)
        bad = [part for part in parts if part.content in self._bad]
        if not is_unchanged(file) or len(slots.keys() | {part.content for part in bad}) < len(
            {part.content for part in parts}
        ):
            self.unsettled[file.path] = "it changed while it was read; index it again"
            return
        for part in bad[:1]:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            where = "" if part.line is None else f"line {part.line}: "
            wrong = wrong or f"{where}{self._bad[part.content]}{more}"
        self._writer.put_file(file, [part for part in parts if part.content in slots], wrong)


def _reason(error: Exception, file: File) -> str:
    """What an error says, without the name of the file, beside which it is shown."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix(f"{file.path}:").strip()
