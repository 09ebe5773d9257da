"""The flags of ``python -m e5v_jax.encode``, and which of them go together."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from e5v_jax import cli
from e5v_jax.cli import BucketPath
from e5v_jax.encode.model_args import ModelArgs
from e5v_jax.presets import find_preset
from e5v_jax.prompts import SpecialTokens, Truncate
from e5v_jax.storage import check_reachable, in_bucket


@dataclass(frozen=True, kw_only=True)
class Args(ModelArgs):
    """Embed texts and images: write the vectors, or show how similar they are."""

    text: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()  # Texts to embed.
    image: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Image files to embed, after the texts."""
    input: BucketPath | None = None
    """Instead of --text and --image: a folder of images, a file or a glob pattern: .txt (one text a
    line), .jsonl (keys text and/or image, and any id), .csv or .parquet (columns of the same names;
    in parquet, image may be bytes). Image paths are relative to the file's folder."""
    output: BucketPath | None = None
    """File to write, .npy (float32 [N, D]) or .parquet (id, embedding), which must not exist; or
    for many inputs a folder of shards, with which a killed run goes on. Without it, the cosine
    similarities of at most 20 inputs are shown."""
    prompt_name: str | None = None
    """Prompt by name: query or document for the preset's, chosen by what an input has; or text,
    image, sts, plain, text_image, cirr_gallery or cirr_query; by default document."""
    prompt: str | None = None
    """Prompt of your own, with <sent> where the text goes and <image> for the image."""
    instruction: str | None = None
    """What to look for, in words that the preset's authors use, where it takes an instruction."""
    batch_size: int | None = None  # Most inputs per device batch; by default only the tokens count.
    max_num_batched_tokens: int | None = None
    """Most tokens per device batch, padding included; by default 1024 on a CPU, else 16384."""
    max_length: int | None = None
    """Most tokens of an input, its prompt and image counted; by default what the model takes."""
    truncate: Truncate = "none"
    """What to cut off a text that is too long, never off its prompt; none: it is a bad row."""
    special_tokens: SpecialTokens = "text"
    """Read the name of a special token in a text as its characters, or refuse the row."""
    truncate_dim: int | None = None  # Keep only the first dimensions.
    normalize: bool = True  # Scale the vectors to length 1, after truncation.
    num_workers: int = 0  # Processes that decode images, ahead of the device; 0 is a few threads.
    format: Literal["parquet", "npy"] = "parquet"  # Of shards; npy has its ids in a .json beside.
    embedding_dtype: Literal["float32", "float16"] = "float32"  # Of the vectors in the shards.
    shard_size: int = 4096  # Input rows of a shard; a killed run loses at most this many.
    on_error: Literal["raise", "skip"] = "raise"
    """At a row that cannot be embedded: stop, or go on and list it in failed.jsonl."""
    distributed: bool = False  # Share work with processes that the environment does not announce.

    @property
    def is_bulk(self) -> bool:
        """Whether ``output`` is a folder of shards."""
        if self.output is None or not self.output.suffix:
            return self.output is not None
        return not in_bucket(self.output) and self.output.is_dir()  # a bucket has no folders

    def encode_options(self) -> dict[str, Any]:
        """Give the arguments of :meth:`e5v_jax.E5V.encode` that all inputs share."""
        return {
            "prompt_name": self.prompt_name,
            "prompt": self.prompt,
            "instruction": self.instruction,
            "batch_size": self.batch_size,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_length": self.max_length,
            "truncate": self.truncate,
            "special_tokens": self.special_tokens,
            "normalize_embeddings": self.normalize,
            "truncate_dim": self.truncate_dim,
        }

    def check(self) -> None:
        """Refuse bad values and combinations of flags.

        Raises cli.UsageError: names the flag; OSError: a bucket that cannot be reached.
        """
        super().check()
        counts = ("batch_size", "max_num_batched_tokens", "max_length", "truncate_dim")
        self.require_positive(*counts, "shard_size")
        if not self.model:
            raise cli.UsageError("--model: empty, expected a folder, a file or a hub id")
        if self.shard_size > sys.maxsize:
            raise cli.UsageError(f"--shard-size: {self.shard_size}, expected at most {sys.maxsize}")
        if self.num_workers < 0:
            raise cli.UsageError(f"--num-workers: {self.num_workers}, expected at least 0")
        if self.prompt_name is not None and self.prompt is not None:
            raise cli.UsageError("give --prompt-name or --prompt, not both")
        try:
            find_preset(None).choose(self.prompt_name, self.prompt)
        except ValueError as error:
            raise cli.UsageError(str(error)) from error
        if (self.input is None) == (not self.text and not self.image):
            raise cli.UsageError("give --input, or --text and --image: one of the two")
        if self.is_bulk and self.input is None:
            raise cli.UsageError(
                "an output folder needs --input; for --text and --image name a file"
            )
        defaults = Args(model="")
        for flag in ("format", "embedding_dtype", "shard_size", "on_error", "distributed"):
            if not self.is_bulk and getattr(self, flag) != getattr(defaults, flag):
                raise cli.UsageError(f"--{flag.replace('_', '-')} needs --output with a folder")
        check_reachable(self.model)  # no path to the command line, which asks for those of paths
