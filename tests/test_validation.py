"""STS-B dev inside a run: the score is that of the finished model, and the best one is left."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_runs import STEPS, config, make_folder, read_metrics

from e5v_jax import E5V
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.encode.encoder import Encoder
from e5v_jax.evaluate.sts import load_task, score_tasks
from e5v_jax.train.config import EvaluationConfig, OptimizerConfig
from e5v_jax.train.feed import load_data
from e5v_jax.train.loop import train
from e5v_jax.train.setup import Training, set_up
from e5v_jax.train.validation import Validation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, training data, and 70 scored pairs of the same kind."""
    folder = make_folder(tmp_path_factory.mktemp("run"))
    file = folder / "sts" / "STS" / "STSBenchmark" / "sts-dev.csv"
    file.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(70):
        kept = int(rng.integers(0, 6))
        first = rng.choice(["dog", "cat", "cow", "hen", "fox"], 5)
        second = np.where(np.arange(5) < kept, first, "owl")
        score = f"{np.clip(kept + rng.uniform(-0.4, 0.4), 0, 5):.2f}"
        lines.append(f"made\tup\t2026\t{i}\t{score}\t{' '.join(first)}\t{' '.join(second)}")
    file.write_text("\n".join(lines) + "\n")
    return folder


def test_the_best_checkpoint_is_what_the_run_leaves(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(
        config(
            folder,
            run,
            evaluation=EvaluationConfig(data=folder / "sts"),
            # too fast: the score goes up and down, and the best is not the last
            optimizer=OptimizerConfig(learning_rate=0.05, warmup_steps=0),
            checkpoint_every=2,
            keep_checkpoints=1,
        )
    )
    scores = {int(x["step"]): x["stsb_dev"] for x in read_metrics(run) if "stsb_dev" in x}
    assert list(scores) == [2, 4, 6, 8, STEPS]
    best = max(scores, key=lambda step: (scores[step], step))
    assert best != STEPS, scores
    assert f"best checkpoint: step {best}, STS-B dev {scores[best]:.2f}" in capsys.readouterr().out
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert kept == {str(best), str(STEPS)}

    def embed(adapter: Path) -> E5V:
        return E5V.from_pretrained(folder / "base", dtype="float32", adapter=adapter)

    pairs = {"stsb-dev": load_task(folder / "sts", "stsb-dev", stride=1)}
    last = run / "checkpoints" / str(STEPS)
    for adapter, step in ((run, best), (run / "adapter", best), (last, STEPS)):
        model = embed(adapter)
        found = score_tasks(lambda texts, m=model: m.encode(texts, prompt_name="sts"), pairs)
        assert found["stsb-dev"].items.value() == pytest.approx(scores[step], abs=0.05)


def test_missing_pairs_stop_the_run_before_it_begins(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sts-dev\.csv"):
        train(config(folder, tmp_path / "run", evaluation=EvaluationConfig(data=tmp_path)))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def validation(folder: Path, tmp_path: Path) -> Callable[[str], tuple[Training, Validation]]:
    """A run's training and validation, with one pair more that has the given sentence."""

    def make(sentence: str) -> tuple[Training, Validation]:
        pairs = (folder / "sts/STS/STSBenchmark/sts-dev.csv").read_text()
        file = tmp_path / "STS" / "STSBenchmark" / "sts-dev.csv"
        file.parent.mkdir(parents=True)
        file.write_text(f"{pairs}made\tup\t2026\t99\t3\t{sentence}\tdog\n")
        cfg = config(folder, tmp_path / "run")
        training = set_up(cfg, ConvertedFolder(cfg.model), load_data(cfg.data))
        encoder = Encoder(training.graphdef, training.processor, training.runtime)
        return training, Validation(tmp_path, encoder, stride=1)

    return make


def test_a_text_of_300_tokens_is_embedded(
    validation: Callable[[str], tuple[Training, Validation]],
) -> None:
    """Once the buckets ended at 256, and the run stopped at its first checkpoint."""
    training, scored = validation("dog " * 75)
    assert np.isfinite(list(scored.score(training.trainable, training.frozen).values())).all()


def test_a_text_that_is_too_long_stops_the_run_before_it_begins(
    validation: Callable[[str], tuple[Training, Validation]],
) -> None:
    with pytest.raises(ValueError, match="tokens, the model takes at most"):
        validation("dog " * 3000)
