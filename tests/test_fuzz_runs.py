"""Generated damage to a run's folder: a resume stops in one line, or goes on from what is whole.

The seeds are fixed; -s prints how many cases came out how.
"""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_restore import Run, flip

from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.identity import check_same_run, run_info, write_run_info

# fields of run.json that may differ: where the run is, what it logs, how it is cut up
FREE = [
    "id",
    "model",
    "output",
    "resume",
    "verify",
    "allow_change",
    "distributed",
    "wandb_project",
    "remat",
    "chunk_size",
    "texts_per_row",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "mesh",
    "evaluation",
    "path",
    "tfds",
    "tfds_dir",
    "length_groups",
]
DEEP: Any = []
for _ in range(50):
    DEEP = [DEEP]
VALUES: list[Any] = [None, 0, -1, 7, 1e30, True, "", "text", "\ud800", [], [1], {}, {"a": 1}, DEEP]


def places(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value of an object, itself included."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from places(value, (*path, key))


def changed(info: dict[str, Any], path: tuple[str, ...], value: object) -> Any:
    """A copy in which one value is another, or is missing if that is ``missing``."""
    if not path:
        return value
    copied = copy.deepcopy(info)
    node = copied
    for key in path[:-1]:
        node = node[key]
    if value is MISSING:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return copied


MISSING = object()


def run_info_cases(info: dict[str, Any], count: int) -> Iterator[tuple[tuple[str, ...], object]]:
    rng, every = np.random.default_rng(1), list(places(info))
    for _ in range(count):
        path = every[rng.integers(len(every))]
        options = VALUES if not path else [*VALUES, MISSING]
        yield path, options[rng.integers(len(options))]


def fuzz_run_info(folder: Path, count: int) -> Counter[str]:
    run, outcomes = folder / "run", Counter[str]()
    cfg = TrainConfig(
        model=Path("base"), output=run, batch_size=9, lora=LoRAConfig(4, 8.0, dropout=0.1)
    )
    info = run_info(cfg, "hash", "data")
    write_run_info(run, info)
    for path, value in run_info_cases(info, count):
        found = changed(info, path, value)
        (run / "run.json").write_text(json.dumps(found))
        case = f"{path} = {value!r}"
        try:
            check_same_run(run, info)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and message.startswith(str(run)), case
            outcomes["refused"] += 1
            continue
        # a field that is missing had its default, and one that is free may differ
        default = run_info(TrainConfig(model=Path(), output=Path()), "", "")["config"]
        free = bool(set(path) & set(FREE)) or found == info
        if (value is MISSING or isinstance(value, dict)) and not free:  # of a dict, all is missing
            there = default
            for key in path[1:]:
                there = there[key]
            now = info
            for key in path:
                now = now[key]
            free = there == now
        assert free, f"{case}: passed over"
        outcomes["as before"] += 1
    return outcomes


def damage(file: Path, kind: str, seed: int) -> None:
    content = file.read_bytes()
    rng = np.random.default_rng(seed)
    if kind == "flip":
        flip(file, seed)
    elif kind == "cut":
        file.write_bytes(content[: rng.integers(len(content))])
    elif kind == "longer":
        file.write_bytes(content + rng.bytes(8))
    elif kind == "zeros":
        file.write_bytes(bytes(len(content)))
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()


KINDS = ("flip", "flip", "cut", "longer", "zeros", "missing", "folder")


def fuzz_checkpoints(folder: Path, count: int) -> Counter[str]:
    """Damage one to three files of the newest checkpoint; that before it must come, to the bit."""
    run, outcomes, rng = Run(folder, width=64), Counter[str](), np.random.default_rng(2)
    run.train(3).save(3)
    wanted = jax.tree.map(np.asarray, (run.trainable, run.opt_state))
    newest = run.train(3).save(6)
    kept = shutil.copytree(newest, folder / "kept")
    names = [p.relative_to(kept) for p in sorted(kept.rglob("*")) if p.is_file()]
    names = [name for name in names if (kept / name).stat().st_size]
    for case in range(count):
        kinds = []
        for number in rng.choice(len(names), rng.integers(1, 4), replace=False):
            kinds.append(KINDS[rng.integers(len(KINDS))])
            if names[number].name == "checksums.json" and kinds[-1] == "missing":
                kinds[-1] = "cut"  # without sums it is one of an earlier version
            damage(newest / names[number], kinds[-1], case)
        found = run.restore()
        assert found is not None and found.step == 3, (case, kinds)
        got = jax.tree.map(np.asarray, (found.trainable, found.opt_state))
        for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert mine.tobytes() == other.tobytes()
        outcomes.update(f"{kind}: the one before" for kind in kinds)
        shutil.rmtree(run.cfg.output / "damaged-6")
        shutil.copytree(kept, newest)
    return outcomes


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_run_info(tmp_path: Path, count: int) -> None:
    print(dict(fuzz_run_info(tmp_path, count)))


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_checkpoints(tmp_path: Path, count: int) -> None:
    print(dict(fuzz_checkpoints(tmp_path, count)))
