"""NLI corpora turned into training triplets, from tensorflow-datasets' prepared files."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from e5v_jax.data.pairs import TrainingPairs, make_pairs

NLI_LABELS = ("entailment", "neutral", "contradiction")
UNLABELLED = "-"  # SNLI's and MultiNLI's mark for a pair whose annotators did not agree


def triplets_from_nli(rows: Iterable[tuple[str, str, str]], source: str) -> TrainingPairs:
    """Turn (premise, hypothesis, label) rows into triplets, one per premise, after SimCSE.

    For each premise that has both, sent1 is its first entailment and hard_neg its first
    contradiction; rows of one premise need not be neighbours. SimCSE does not publish the script:
    one triplet per premise is our reading of its 275,601 rows for the 314 k entailments of SNLI
    and MultiNLI. Blank sentences and rows labelled ``-`` are left out.

    ``source`` stands before the row number (from 1, that of the entailment) in ``row_ids``.

    Raises ValueError: a label that is neither in ``NLI_LABELS`` nor ``-``, or no premise has both.
    """
    entailments: dict[str, tuple[int, str]] = {}
    contradictions: dict[str, str] = {}
    known = (*NLI_LABELS, UNLABELLED)
    for number, (premise, hypothesis, label) in enumerate(rows, start=1):
        if label not in known:
            raise ValueError(f"{source}:{number}: label {label!r}, expected one of {known}")
        if premise.strip() and hypothesis.strip():
            if label == "entailment":
                entailments.setdefault(premise, (number, hypothesis))
            elif label == "contradiction":
                contradictions.setdefault(premise, hypothesis)
    premises = [premise for premise in entailments if premise in contradictions]
    if not premises:
        raise ValueError(f"{source}: no premise has both an entailment and a contradiction")
    columns = {
        "sent0": premises,
        "sent1": [entailments[p][1] for p in premises],
        "hard_neg": [contradictions[p] for p in premises],
    }
    return make_pairs(columns, [f"{source}:{entailments[p][0]}" for p in premises])


def load_tfds(
    name: Literal["snli", "multi_nli"], split: str = "train", data_dir: Path | None = None
) -> TrainingPairs:
    """Read triplets of the newest prepared version of a tfds corpus, without TensorFlow.

    ``split`` is as in tfds, say ``train`` or ``validation[:10%]``; multi_nli has validation_matched
    and validation_mismatched. ``data_dir`` is where the corpus was prepared; None is the
    environment variable ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``, as in tfds.

    Raises:
        FileNotFoundError: it is not prepared there; the message has the command that does it.
        ValueError: it is prepared in a format that only TensorFlow reads; an unknown split.
    """
    root = (data_dir or Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))).expanduser()
    # here and not above: the import takes a second and only this source needs it
    import tensorflow_datasets as tfds

    versions = tfds.core.utils.version.list_all_versions(root / name)
    if not versions:
        raise FileNotFoundError(f"{root / name}: not prepared; {_how_to_prepare(name, root)}")
    folder = root / name / str(versions[-1])
    builder = tfds.builder_from_directory(folder)  # unlike tfds.builder, works from files alone
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(
            f"{folder}: prepared in a format that only TensorFlow reads; delete it or choose "
            f"another data_dir, then {_how_to_prepare(name, root)}"
        ) from None
    except ValueError:
        splits = ", ".join(sorted(builder.info.splits))
        raise ValueError(f"{folder}: no split {split!r}; found {splits}") from None
    labels = builder.info.features["label"].names
    rows = (
        (
            record["premise"].decode(),
            record["hypothesis"].decode(),
            UNLABELLED if record["label"] < 0 else labels[record["label"]],
        )
        for start in range(0, len(records), 4096)  # one at a time takes 2.5 times as long
        for record in records.__getitems__(list(range(len(records))[start : start + 4096]))
    )
    return triplets_from_nli(rows, source=f"{name}/{folder.name}/{split}")


def _how_to_prepare(name: str, root: Path) -> str:
    # tfds 4.9.10 prepares with importlib_resources but does not install it; the code that prepares
    # multi_nli reads its files with TensorFlow.
    needs = "tensorflow importlib_resources" if name == "multi_nli" else "importlib_resources"
    return (
        "run once, in any environment with tensorflow-datasets and a network: "
        f'pip install {needs} && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{root}', file_format='array_record')"
        '.download_and_prepare()"'
    )
