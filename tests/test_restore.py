"""Which checkpoint a run goes on from: what is damaged, what is out of reach, what is converted."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.errors import JaxRuntimeError
from orbax.checkpoint import v1 as ocp
from training_runs import config, make_folder, read_metrics

from e5v_jax.checksums import write_checksums
from e5v_jax.nn.layers import LoRAParam
from e5v_jax.sharding import make_mesh
from e5v_jax.train.checkpoint import open_checkpoints
from e5v_jax.train.config import OptimizerConfig, TrainConfig
from e5v_jax.train.loop import train
from e5v_jax.train.optimizer import init_optimizer, make_optimizer, make_schedule
from e5v_jax.train.restore import Restored, restore

STEPS, SEEN = 20, {"next_index": 1}


def optimizer_config(accumulate_steps: int) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=0.1, warmup_steps=0, accumulate_steps=accumulate_steps)


class Run:
    """Parameters that are trained by made-up gradients, and checkpoints of them."""

    def __init__(self, folder: Path, accumulate_steps: int = 1, *, width: int = 256) -> None:
        self.k, self.mesh, self.step = accumulate_steps, make_mesh(1, 1, 1), 0
        self.cfg = TrainConfig(model=folder, output=folder / "run", checkpoint_every=1)
        # random and large enough that TensorStore keeps the arrays in files of their own
        values = jax.random.normal(jax.random.key(0), (width, 256))
        placed = jax.device_put(values, jax.NamedSharding(self.mesh, jax.P()))
        self.trainable = nnx.State({"layer": {"lora_a": LoRAParam(placed)}})
        self.optimizer = make_optimizer(optimizer_config(accumulate_steps), STEPS)
        self.opt_state = init_optimizer(self.optimizer, self.trainable, self.mesh)

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            self.step += 1
            gradients = jax.tree.map(lambda x: jnp.full_like(x, self.step), self.trainable)
            updates, self.opt_state = self.optimizer.update(
                gradients, self.opt_state, self.trainable
            )
            self.trainable = optax.apply_updates(self.trainable, updates)
        return self

    def save(self, *steps: int, score: float | None = None) -> Path:
        """Checkpoints of what there is now; returns the newest."""
        with open_checkpoints(self.cfg) as checkpoints:
            for step in steps or (self.step,):
                checkpoints.save(
                    step,
                    self.trainable,
                    self.opt_state,
                    SEEN,
                    accumulate_steps=self.k,
                    last=True,
                    score=score,
                )
                checkpoints.wait()
        return self.cfg.output / "checkpoints" / str(step)

    def restore(self) -> Restored | None:
        with open_checkpoints(self.cfg) as checkpoints:
            return restore(
                checkpoints,
                self.trainable,
                self.opt_state,
                self.mesh,
                accumulate_steps=self.k,
            )


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def fill_with_garbage(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, fill_with_garbage, Path.unlink])
@pytest.mark.parametrize(
    "files",
    [
        "state/ocdbt.process_0/d/*",
        "state/d/*",
        "state/manifest.ocdbt",
        "state/_METADATA",
        "_CHECKPOINT_METADATA",
    ],
)
def test_damage_is_set_aside(tmp_path: Path, files: str, damage: Callable[[Path], None]) -> None:
    run = Run(tmp_path)
    newest = run.save(3, 6)
    damaged = list(newest.glob(files))
    assert damaged
    for file in damaged:
        damage(file)
    found = run.restore()
    assert found is not None and found.step == 3 and found.iterator_state == SEEN
    assert (run.cfg.output / "damaged-6").is_dir() and not newest.exists()


def flip(file: Path, seed: int) -> None:
    """Flip one bit."""
    content, random = bytearray(file.read_bytes()), np.random.default_rng(seed)
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    file.write_bytes(content)


def test_a_flipped_bit_is_noticed_in_every_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorStore itself restores most flips in arrays as if nothing was wrong."""
    run = Run(tmp_path)
    newest, seed = run.save(3, 6), 0
    files = [file for file in sorted(newest.rglob("*")) if file.is_file() and file.stat().st_size]
    assert {"checksums.json", "_CHECKPOINT_METADATA", "_METADATA"} <= {file.name for file in files}
    for file in files:
        for _ in range(3):
            seed += 1
            whole = file.read_bytes()
            flip(file, seed)
            caplog.clear()
            found = run.restore()
            assert found is not None and found.step == 3, file
            if file.name != "checksums.json":  # then it is its key or sum that does not fit
                assert f"{file}: differs from what was written" in caplog.text
            (run.cfg.output / "damaged-6").rename(newest)
            file.write_bytes(whole)
    found = run.restore()
    assert found is not None and found.step == 6


def test_a_flipped_bit_of_the_best_or_of_an_adapter(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(3, 6)
    run.save(9, score=50.0)
    newest = run.save(12, score=60.0)
    flip(next((newest / "state" / "d").iterdir()), 0)
    with open_checkpoints(run.cfg) as checkpoints:
        best = checkpoints.load_best(run.trainable)
    assert best is not None and best[:2] == (9, 50.0)


def test_checkpoints_of_earlier_versions_have_no_sums(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    (run.save(3) / "checksums.json").unlink()
    found = run.restore()
    assert found is not None and found.step == 3
    assert "no checksums.json, so a flipped byte would not be noticed" in caplog.text


def test_parameters_that_are_not_finite_are_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an earlier version may have saved them."""
    run = Run(tmp_path)
    run.save(3)
    good = run.trainable
    run.trainable = jax.tree.map(lambda x: x.at[3, 5].set(jnp.nan), good)
    run.save(6)
    found = run.restore()
    assert found is not None and found.step == 3
    assert "its parameters are not finite" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        PermissionError(13, "Permission denied", "/run"),
        ConnectionError("Cannot connect to host storage.googleapis.com:443"),
        OSError(5, "Input/output error", "/run"),
        ValueError('UNAVAILABLE: Error opening "zarr3" driver: CURL error'),
        ValueError('PERMISSION_DENIED: Error opening "zarr3" driver'),
    ],
    ids=lambda error: str(error).split(":")[0],
)
def test_out_of_reach_is_no_damage(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    newest = run.save(3, 6)

    def fail(*_: object) -> None:
        raise KeyError("Failed to load checkpointable: state") from error  # as Orbax does

    monkeypatch.setattr(ocp.training.Checkpointer, "load", fail)
    with pytest.raises(ValueError) as info:
        run.restore()
    assert str(info.value).startswith(f"{newest}: {str(error)[:20]}")
    assert "\n" not in str(info.value)
    assert newest.is_dir() and not list(run.cfg.output.glob("damaged-*"))


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_file_that_cannot_be_opened_is_no_damage(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path)
    newest = run.save(3, 6)
    (newest / name).unlink()
    os.symlink("itself", newest / "itself")
    os.symlink(newest / "itself", newest / name)
    with pytest.raises(ValueError, match=r"Too many levels of symbolic links|Symlink loop"):
        run.restore()
    assert newest.is_dir()


def test_other_shapes_are_no_damage(tmp_path: Path) -> None:
    newest = Run(tmp_path).save(3, 6)
    with pytest.raises(ValueError) as info:
        Run(tmp_path, width=255).restore()
    assert str(info.value).startswith(
        f"{newest}: opt_state.1.0.mu.layer.lora_a.value has shape (256, 256) in it and (255, 256) "
    )
    assert newest.is_dir()


# --- another number of steps per update ---


def part(state: optax.OptState, kind: type[Any]) -> Any:
    """The one state of this type in the whole."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    (found,) = (x for x in nodes if isinstance(x, kind))
    return found


def values(tree: object) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("before", "steps", "now", "dropped"),
    [(1, 6, 2, 0), (1, 7, 2, 0), (2, 7, 1, 1), (2, 7, 4, 1), (4, 7, 2, 3), (4, 8, 2, 0)],
)
def test_another_accumulation_is_converted(
    tmp_path: Path,
    before: int,
    steps: int,
    now: int,
    dropped: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = Run(tmp_path, before).train(steps)
    newest = saved.save()
    run = Run(tmp_path, now)
    shardings = jax.tree.map(lambda x: x.sharding, run.opt_state)
    found = run.restore()
    assert found is not None and found.step == steps and newest.is_dir()
    assert jax.tree.map(lambda x: x.sharding, found.opt_state) == shardings
    assert f"was {before} and is now {now}: the schedule goes on from update" in caplog.text
    assert f"of {dropped} steps that made no update yet are dropped" in caplog.text

    # moments and the count that corrects them go on
    adam, adam_before = (part(x.opt_state, optax.ScaleByAdamState) for x in (found, saved))
    for mine, other in zip(values(adam), values(adam_before), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert adam.count == steps // before
    # the schedule stands at the same share of the run
    assert part(found.opt_state, optax.ScaleByScheduleState).count == steps // now

    # and the next update comes after `now` steps, by the mean of their gradients
    run.trainable, run.opt_state, run.step = found.trainable, found.opt_state, steps
    for _ in range(now):
        np.testing.assert_array_equal(values(run.trainable)[0], values(saved.trainable)[0])
        run.train(1)
    assert not np.array_equal(values(run.trainable)[0], values(saved.trainable)[0])
    mu = part(run.opt_state, optax.ScaleByAdamState).mu
    expected = 0.9 * values(adam_before.mu)[0] + 0.1 / 256  # of all 256 x 256 the same, norm 1
    np.testing.assert_allclose(values(mu)[0], expected, rtol=1e-4)
    # the rate ends at 0 with the run, if steps before the first update do not delay the last
    run.train(STEPS - run.step)
    done = part(run.opt_state, optax.ScaleByScheduleState).count
    assert done == steps // now + (STEPS - steps) // now <= STEPS // now
    if (STEPS - steps) % now == 0 == steps % now:
        assert make_schedule(optimizer_config(now), STEPS // now)(done) == 0


@pytest.mark.parametrize("recorded", [True, False])
def test_the_same_accumulation_goes_on_to_the_bit(
    tmp_path: Path, recorded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in checkpoints from before accumulate_steps was written into them."""
    run = Run(tmp_path, 3).train(5)
    newest = run.save()
    if not recorded:
        file = newest / "_CHECKPOINT_METADATA"
        text = file.read_text()
        assert ', "accumulate_steps": 3' in text
        file.write_text(text.replace(', "accumulate_steps": 3', ""))
        write_checksums(newest)
    found = run.restore()
    assert found is not None and not caplog.records
    for mine, other in zip(
        jax.tree.leaves(found.opt_state), jax.tree.leaves(run.opt_state), strict=True
    ):
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()
    other_run = Run(tmp_path, 2)
    assert other_run.restore() is not None
    assert "was 3 and is now 2" in caplog.text and "of 2 steps" in caplog.text


@pytest.mark.slow
def test_a_run_goes_on_with_another_accumulation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    cfg = config(make_folder(tmp_path), run)
    train(cfg)
    for step in ("9", "10"):  # as if it had been killed after step 6
        shutil.rmtree(run / "checkpoints" / step)
    optimizer = replace(cfg.optimizer, accumulate_steps=2)
    resumed = replace(cfg, optimizer=optimizer, resume=True)
    with pytest.raises(ValueError, match=r"optimizer\.accumulate_steps was 1 and is now 2"):
        train(resumed)
    capsys.readouterr()
    train(replace(resumed, allow_change=("optimizer.accumulate_steps",)))
    assert "from step 6\n" in capsys.readouterr().out
    assert "damaged" not in caplog.text and not list(run.glob("damaged-*"))
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 11))
    with ocp.training.Checkpointer(run / "checkpoints") as checkpointer:
        state = checkpointer.load(10)["opt_state"]
    assert (state["mini_step"], state["gradient_step"]) == (0, 2)
    assert state["inner_opt_state"][1][0]["count"] == 8  # updates of Adam: 6 and 2
    assert state["inner_opt_state"][1][2]["count"] == 5  # of the schedule: all that 10 steps make
