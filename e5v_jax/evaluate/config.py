"""What an evaluation is: frozen dataclasses, filled by flags or by a file in ``configs/``."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from e5v_jax.cli import BucketPath, UsageError
from e5v_jax.encode.model_args import ModelArgs

if TYPE_CHECKING:
    from e5v_jax.evaluate.cached_encoder import CachedEncoder
    from e5v_jax.evaluate.files import CheckText

Protocol = Literal["paper", "plain"]


@dataclass(frozen=True, kw_only=True)
class ScoringArgs(ModelArgs):
    """These flags are common to scoring and analysing."""

    stride: int = 1
    """Take every n-th pair, image or query only: a quick look, not comparable with the paper."""
    cache: Path | None = None
    """Folder to keep embeddings in: what is there for this model is not embedded again."""
    batch_size: int = 32
    """Inputs per device batch."""

    def check(self) -> None:
        """Raise UsageError, which names the flag, on a value that cannot be."""
        super().check()
        self.require_positive("stride", "batch_size")

    def text_check(self) -> "CheckText":
        """Make the check of texts by the model's own processor, which is read for the first one.

        It raises TextError, and what :meth:`load` does.
        """
        processor = cache(self.load_processor)
        return lambda text: processor().check_text(text)

    def load_encoder(self) -> "CachedEncoder":
        """Load the model, its vectors kept in ``cache`` if given; raises what :meth:`load` does."""
        from e5v_jax.evaluate.cached_encoder import CachedEncoder

        about = {}
        if self.cache is not None:
            about = {**self.describe(), "model": self.content_hash()}
            del about["adapter"], about["revision"]  # they are in the hash, wherever the files lie
        return CachedEncoder(self.load(), batch_size=self.batch_size, cache=self.cache, about=about)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringArgs):
    """Score a model on the benchmarks of the paper and show the scores beside the paper's.

    --config FILE takes defaults from a Python file: what its get_config() returns.
    `python -m e5v_jax.evaluate analyse --help`: what the embedding space looks like; `golden
    --help`: the figures that a checkpoint's authors printed, seen again.
    """

    model: str = ""
    """Converted folder, Hugging Face folder or GGUF file, or a hub id; --compare needs none."""
    data: Path | None = None
    """Folder with the benchmarks, laid out as docs/evaluation.md says; for `retrieval` and
    `i2i-retrieval` the one that holds captions.jsonl; `hub` fetches the authors' data sets."""
    tasks: str = "sts"
    """Comma-separated: sts (the seven of the paper) or single ones (sts12 to sts16, stsb, sickr,
    stsb-dev), flickr30k, coco, i2i-flickr30k, i2i-coco, cirr (validation), cirr-test (writes the
    submission for CIRR's server), fashioniq (its three types) or fashioniq-dress and so on,
    retrieval and i2i-retrieval (your own captioned images)."""
    compare: tuple[Path, Path] | None = None
    """Instead of all else: the outputs of two runs, to compare them item by item."""
    protocol: Protocol = "paper"
    """How STS is scored. paper: prompt `sts`, sentences cleaned as the authors do. plain: the
    instruction without spaces around it, sentences as they stand in the files: not the paper's
    figure."""
    output: Path | None = None
    """Folder to write results.json, results.md and items.npz to; must be empty or not exist."""

    def check(self) -> None:
        """Raise UsageError on a value that cannot be, or where model or data are missing."""
        super().check()
        for name in ("model", "data"):
            if not getattr(self, name):
                raise UsageError(f"--{name}: needed to evaluate (--help says what it is)")


@dataclass(frozen=True, kw_only=True)
class AnalyseArgs(ScoringArgs):
    """Show the embedding space: the gap between texts and images, what the parts of the prompt and
    the image itself contribute, before and after training; tables and plots."""

    output: Path
    """Folder to write analysis.json, analysis.md and the plots to; must be empty or not exist."""
    data: Path | None = None
    """Folder with captions.jsonl and its images, for gap, plots and blanked images."""
    sts: Path | None = None
    """Folder with STS/ in SentEval's layout, for the prompt ablation on STS-B."""
    adapter: BucketPath | None = None
    """LoRA to compare with the bare model: a run folder of e5v_jax.train or a PEFT folder."""

    def check(self) -> None:
        """Raise UsageError on a value that cannot be, or where there is nothing to analyse."""
        if self.data is None and self.sts is None:
            raise UsageError("--data or --sts: give images with captions, SentEval's STS, or both")
        super().check()
