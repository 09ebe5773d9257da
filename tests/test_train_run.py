"""Whole training runs: killed and resumed, what they write, what they read, and when they stop."""

import dataclasses
import json
import os
import runpy
import signal
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hf_models import RECIPES, Case, build_llava, build_text
from peft import PeftModel
from tensorboardX.proto.event_pb2 import Event, SessionLog
from training_runs import (
    BATCH,
    RECIPE,
    ROOT,
    ROWS,
    STEPS,
    assert_same_end,
    command,
    config,
    make_folder,
    read_metrics,
    read_state,
    words,
    write_csv,
)

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.adapters import read_run_info
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.train import optimizer
from e5v_jax.train.__main__ import main
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.identity import check_same_run, run_info, write_run_info
from e5v_jax.train.loop import train
from e5v_jax.train.metrics import MetricsLog

SENTENCES = ["A dog sits.", "the cat sleeps all day", "seven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(folder: Path, cache: Path) -> Path:
    """The folder of a run that was left alone."""
    done = command(words(folder, folder / "finished"), cache=cache)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == STEPS, done.stderr
    assert lines[-1].startswith(f"step {STEPS}/{STEPS}  loss ")
    assert "triplets/s" in lines[-1] and "tokens/s" in lines[-1] and "ETA" in lines[-1]
    return folder / "finished"


def test_killed_and_resumed_is_bit_equal(folder: Path, finished: Path, cache: Path) -> None:
    run = folder / "killed"
    argv = words(folder, run)
    checkpoints = run / "checkpoints"

    kills = [
        # (what is about to happen, then the checkpoints and the last step in metrics.jsonl)
        (("os.mkdir", "/3.orbax-checkpoint-tmp"), [], 3),  # before the first checkpoint
        (("os.mkdir", "/6.orbax-checkpoint-tmp"), [3], 6),  # between two
        (("os.rename", "/9.orbax-checkpoint-tmp"), [3, 6], 9),  # written, but not yet whole
    ]
    for i, (kill, saved, logged) in enumerate(kills):
        done = command([*argv, *(["--resume"] if i else [])], cache=cache, signal_at=kill)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
        assert found == saved
        assert read_metrics(run)[-1]["step"] >= logged
        assert not (run / "adapter").exists()
    assert (checkpoints / "9.orbax-checkpoint-tmp").is_dir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # as if the kill had cut a line off

    done = command([*argv, "--resume"], cache=cache)
    assert done.returncode == 0, done.stderr
    assert "from step 6\n" in done.stdout
    assert sorted(p.name for p in checkpoints.iterdir()) == ["10", "6", "9"]

    assert_same_end(run, finished, STEPS)
    lasting = ("step", "loss", "accuracy", "grad_norm")
    ours, theirs = (
        [[line[name] for name in lasting] for line in read_metrics(x)] for x in (run, finished)
    )
    assert ours == theirs
    assert [int(line[0]) for line in ours] == list(range(1, STEPS + 1))
    assert tensorboard(run) == tensorboard(finished)


def events(run: Path) -> Iterator[Event]:
    """TensorBoard's records, files in the order they were written."""
    for file in sorted((run / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)  # then 4 bytes of checksum, at both ends
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def tensorboard(run: Path) -> list[tuple[int, float]]:
    """(step, loss) as TensorBoard shows them: a restart hides what came at its step or later."""
    shown: list[tuple[int, float]] = []
    for event in events(run):
        if event.session_log.status == SessionLog.START:
            shown = [point for point in shown if point[0] < event.step]
        shown += [(event.step, v.simple_value) for v in event.summary.value if v.tag == "loss"]
    return shown


def test_metrics_and_tensorboard(finished: Path) -> None:
    metrics = read_metrics(finished)
    names = ["step", "loss", "accuracy", "grad_norm"]
    names += ["triplets_per_s", "tokens_per_s", "seconds_per_step"]
    assert all(list(line) == names for line in metrics)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        assert 0 < line["loss"] < 20 and 0 <= line["accuracy"] <= 1 and line["grad_norm"] > 0
        assert line["triplets_per_s"] * line["seconds_per_step"] == pytest.approx(BATCH)
        assert line["tokens_per_s"] > 3 * 40 * line["triplets_per_s"]  # 3 prompts of 50 letters
    tags = {value.tag for event in events(finished) for value in event.summary.value}
    assert tags == set(names) - {"step"}
    shown = tensorboard(finished)
    assert [step for step, _ in shown] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([x for _, x in shown], [x["loss"] for x in metrics], rtol=1e-6)


def test_flags_override_the_configuration_file(folder: Path, finished: Path) -> None:
    found = json.loads((finished / "run.json").read_text())
    demo = runpy.run_path(str(ROOT / "configs" / "demo.py"))["get_config"]()
    expected = json.loads(json.dumps(dataclasses.asdict(demo), default=str))
    expected |= {"model": str(folder / "base"), "output": str(finished), "batch_size": BATCH}
    expected |= {"remat": "none", "checkpoint_every": 3}
    expected["data"] |= {"path": [str(folder / "data.csv")], "length_groups": 1}
    expected["optimizer"] |= {"learning_rate": 3e-3, "warmup_steps": 2}
    expected["lora"] = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
    assert found["config"] == expected
    assert found["base_hash"] == ConvertedFolder(folder / "base").info.content_hash


# --- what a finished run is good for ---


def peft_embed(case: Case, adapter: Path, texts: list[str]) -> np.ndarray:
    """Embeddings by transformers + peft."""
    model = PeftModel.from_pretrained(case.torch_model, adapter)
    return Case(case.folder, case.template, model.eval()).torch_embed(texts)


def test_adapter_of_a_run_in_every_form(folder: Path, finished: Path, tmp_path: Path) -> None:
    def embed(adapter: Path | None) -> np.ndarray:
        model = E5V.from_pretrained(folder / "base", dtype="float32", adapter=adapter)
        return model.encode(SENTENCES)

    base, whole = embed(None), embed(finished)
    assert np.abs(whole - base).max() > 0.01
    assert np.array_equal(whole, embed(finished / "checkpoints" / str(STEPS)))
    assert np.array_equal(whole, embed(finished / "adapter"))
    earlier = embed(finished / "checkpoints" / "6")
    assert np.abs(earlier - base).max() > 1e-3 < np.abs(earlier - whole).max()
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; found steps \[6, 9, 10\]"):
        embed_missing = finished / "checkpoints" / "3"
        embed(embed_missing)

    case = build_text(RECIPE, tmp_path / "hf")
    theirs = peft_embed(case, finished / "adapter", SENTENCES)
    assert np.abs(theirs - whole).max() <= 1e-5


def test_encoding_imports_nothing_of_training() -> None:
    program = "import sys, e5v_jax.encode.e5v; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "e5v_jax.checkpoints.adapters" in done.stdout.split()
    assert not [name for name in done.stdout.split() if name.startswith("e5v_jax.train")]


def test_vision_is_neither_read_nor_placed(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = build_llava(RECIPES["narrow-heads"], tmp_path / "hf")
    from_hf.convert(from_hf.Args(str(case.folder), tmp_path / "base"))
    write_csv(tmp_path / "data.csv")
    read: set[str] = set()
    real_read = ConvertedFolder.read

    def read_text_only(self: ConvertedFolder, names: Sequence[str]) -> Iterator[np.ndarray]:
        read.update(names)
        if any(not name.startswith("language_model.") for name in names):
            raise OSError(f"{names}: unreadable")
        return real_read(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(ConvertedFolder, "read", read_text_only)
        train(config(tmp_path, tmp_path / "run", max_steps=2))
    shapes = ConvertedFolder(tmp_path / "base").shapes()
    text = {name for name in shapes if name.startswith("language_model.")}
    assert read == text < set(shapes)
    placed = sum(int(np.prod(shapes[name])) for name in text)
    lora = sum(
        x.size
        for x in read_state(tmp_path / "run", 2)
        if x.ndim == 3  # stacked factors, and twice more in the optimizer
    )
    assert f"of {(placed + lora / 3) / 1e6:.1f} M parameters" in capsys.readouterr().out

    model = E5V.from_pretrained(tmp_path / "base", dtype="float32", adapter=tmp_path / "run")
    ours = model.encode(SENTENCES)
    assert np.abs(ours - case.torch_embed(SENTENCES)).max() > 1e-3
    theirs = peft_embed(case, tmp_path / "run" / "adapter", SENTENCES)
    assert np.abs(ours - theirs).max() <= 1e-5


def test_full_fine_tuning_leaves_a_model(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, tmp_path / "run", lora=None, max_steps=3)
    train(cfg)
    model = E5V.from_pretrained(tmp_path / "run" / "model", dtype="float32", verify=True)
    trained = model.encode(SENTENCES)
    base = E5V.from_pretrained(folder / "base", dtype="float32").encode(SENTENCES)
    assert np.abs(trained - base).max() > 1e-3
    with pytest.raises(ValueError, match="trained all weights"):
        E5V.from_pretrained(folder / "base", adapter=tmp_path / "run")


# --- going on, and refusing to ---


def test_resuming_a_finished_run_changes_nothing(finished: Path, folder: Path) -> None:
    kept = ("metrics.jsonl", "adapter/adapter_model.safetensors")
    before = [(finished / name).read_bytes() for name in kept]
    with pytest.raises(SystemExit) as exit_:
        main([*words(folder, finished), "--resume"])
    assert exit_.value.code == 0
    assert [(finished / name).read_bytes() for name in kept] == before
    assert len(tensorboard(finished)) == STEPS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "7"], "batch_size was 8 and is now 7"),
        (["--dtype", "bfloat16"], "dtype was float32 and is now bfloat16"),
        (["--seed", "1"], "seed was 42 and is now 1"),
        (["--max-steps", "4"], "max_steps was None and is now 4"),
        (["--loss.temperature", "0.1"], "loss.temperature was 0.05 and is now 0.1"),
        (["--lora.rank", "3"], "lora was {'rank': 2"),
        (["--data.max-tokens", "5"], "data.max_tokens was 32 and is now 5"),
        (["--data.path", "other.csv"], "data_fingerprint was"),
        (["--model", "other"], "base_hash was"),
    ],
)
def test_resume_refuses_another_run(
    finished: Path,
    folder: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not (folder / "other").exists():
        write_csv(folder / "other.csv", rows=ROWS + 1)
        build_text(dataclasses.replace(RECIPE, seed=13), folder / "hf2")
        from_hf.convert(from_hf.Args(str(folder / "hf2"), folder / "other"))
        capsys.readouterr()
    monkeypatch.chdir(folder)
    before = snapshot(finished)
    with pytest.raises(SystemExit) as exit_:
        main([*words(folder, finished), *flags, "--resume"])
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert error.startswith(f"error: {finished}: cannot resume: {message}")
    assert error.count("\n") == 1
    assert snapshot(finished) == before


def test_a_change_can_be_allowed(finished: Path, folder: Path) -> None:
    info = read_run_info(finished)
    info["config"]["optimizer"]["learning_rate"] = 1e-4
    with pytest.raises(
        ValueError, match=r"accept it with --allow-change optimizer\.learning_rate$"
    ):
        check_same_run(finished, info)
    check_same_run(finished, info, allowed=("optimizer.learning_rate",))
    with pytest.raises(ValueError, match=r"^--allow-change colour: expected one of base_hash, "):
        check_same_run(finished, info, allowed=("colour",))
    info["config"]["lora"]["rank"] = 3
    with pytest.raises(ValueError, match=r"^--allow-change lora: expected one of "):
        check_same_run(finished, info, allowed=("lora",))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time."""
    return {
        str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("resume", [False, True])
def test_output_that_exists_is_refused(
    folder: Path,
    finished: Path,
    tmp_path: Path,
    resume: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = finished
    if resume:  # a folder that is no run
        output = tmp_path / "notes"
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    before = snapshot(output)
    with pytest.raises(SystemExit) as exit_:
        main([*words(folder, output), *(["--resume"] if resume else [])])
    assert exit_.value.code == 1
    expected = (
        "cannot resume, there is no run.json in it"
        if resume
        else "already exists; pass --resume to continue it, or choose another"
    )
    assert capsys.readouterr().err == f"error: {output}: {expected}\n"
    assert snapshot(output) == before


def explode_at(monkeypatch: pytest.MonkeyPatch, update: int, rate: float) -> None:
    """Make the rate of one update, from 0, what no configuration may say."""
    real = optimizer.make_schedule

    def schedule(*args: Any) -> optax.Schedule:
        usual = real(*args)
        return lambda count: jnp.where(count == update, rate, usual(count))

    monkeypatch.setattr(optimizer, "make_schedule", schedule)


def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters that are finite and far too large: the loss of the next step tells."""
    run, cfg = tmp_path / "run", config(folder, tmp_path / "run", checkpoint_every=1)
    with monkeypatch.context() as patched:
        explode_at(patched, 2, 1e30)
        with pytest.raises(ValueError, match=r"^step 4: the loss is nan") as info:
            train(cfg)
    message = str(info.value)
    assert "--resume from step 2, the last good checkpoint, with a lower learning rate" in message
    assert message.count(f"{folder / 'data.csv'}:") == BATCH
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]
    # that of step 3 would lead here again, whatever the learning rate
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2"]
    assert (run / "not-finite-3").is_dir() and not (run / "adapter").exists()
    train(dataclasses.replace(cfg, resume=True))  # the advice helps
    assert (run / "adapter" / "adapter_config.json").is_file()


def test_parameters_that_are_not_finite_are_not_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    explode_at(monkeypatch, 1, np.inf)
    cfg = config(folder, run, checkpoint_every=1, max_steps=2)
    with pytest.raises(ValueError, match=r"^step 2: .* parameters after it are not finite: "):
        train(cfg)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["1"]
    assert not (run / "adapter").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is still a number; the parameters would not be."""
    real_read = ConvertedFolder.read

    def read_tiny(self: ConvertedFolder, names: Sequence[str]) -> Iterator[np.ndarray]:
        for name, array in zip(names, real_read(self, names), strict=True):
            yield array * 1e-25 if name == "language_model.norm.scale" else array

    monkeypatch.setattr(ConvertedFolder, "read", read_tiny)
    with pytest.raises(ValueError, match=r"^step 1: the loss is \d.*, the gradient norm (nan|inf)"):
        train(config(folder, tmp_path / "run", checkpoint_every=1))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_help_documents_every_field() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "e5v_jax.train", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--config FILE" in done.stdout

    def flags(cls: type, prefix: str = "") -> Iterator[str]:
        for field in dataclasses.fields(cls):
            name = f"{prefix}{field.name.replace('_', '-')}"
            made = field.default_factory
            nested = None if made is dataclasses.MISSING else made()
            if dataclasses.is_dataclass(nested):
                yield from flags(type(nested), f"{name}.")
            else:
                yield name

    for name in flags(TrainConfig):
        assert f"--{name}" in done.stdout, name
    assert "Triplets per optimizer step, over all devices" in done.stdout


def test_an_adapter_says_what_it_was_trained_with(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And is used with it, from its own folder and from the run; what is given goes before."""
    data = config(folder, tmp_path).data
    data = dataclasses.replace(data, prompt="<sent>\nTopic: ", preset="unime-llava-1.6")
    run, base = tmp_path / "run", folder / "base"
    train(config(folder, run, data=data, max_steps=1))
    said = json.loads((run / "adapter" / "trained_with.json").read_text())
    own = {"prompt": data.prompt, "preset": "unime-llava-1.6", "template": said["template"]}
    assert said == {**own, "min_pixels": None, "max_pixels": None}
    E5V.load_processor(base, adapter=run, preset="e5-v")
    for name, was, now in (("prompt", own["prompt"], "text"), ("preset", own["preset"], "e5-v")):
        assert f"{run} was trained with data.{name} {was!r}, here it is {now!r}" in caplog.text
    given = E5V.load_processor(base, adapter=run, preset=own["preset"])
    (expected,) = given.measure(["a dog"], given.preset.choose(prompt=data.prompt))
    assert given.measure(["a dog"], given.preset.choose()) != [expected]
    caplog.clear()
    for name, options in (("with", {}), ("merged", {"merge": True})):
        args = from_hf.Args(str(folder / "hf"), tmp_path / name, adapter=run / "adapter", **options)
        from_hf.convert(args)
    to_hf.convert(to_hf.Args(tmp_path / "with", tmp_path / "peft", peft=True))
    note = f"texts were trained with another prompt: encode them with --prompt {data.prompt!r}"
    assert f"{tmp_path / 'merged'}: {note}\n" in capsys.readouterr().out
    for path, adapter in (
        (base, run),
        (base, run / "adapter"),
        (base, run / "checkpoints" / "1"),
        (base, tmp_path / "peft"),
        (tmp_path / "with", None),
    ):
        processor = E5V.load_processor(path, adapter=adapter)
        for role in ("query", "document"):
            assert processor.measure(["a dog"], processor.preset.choose(role)) == [expected]
    model = E5V.from_pretrained(base, dtype="float32", adapter=run / "adapter")
    assert (model.preset, model.template) == (processor.preset, processor.template)
    assert not caplog.text
    for change, message in (
        ({"prompt": "no slot"}, "'no slot' is no prompt for texts; expected text, plain"),
        ({"preset": "other"}, "unknown preset 'other'"),
        ({"template": 1}, "template is 1, expected str or null; restore it from a copy"),
        ({"later": 1}, "unknown field 'later': update e5v-jax to load it"),
    ):
        (run / "adapter" / "trained_with.json").write_text(json.dumps({**said, **change}))
        with pytest.raises(ValueError, match=f"trained_with.json: {message}"):
            E5V.load_processor(base, adapter=run)


# --- run.json of other versions, and what wandb knows a run by ---


def edit_run_info(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    info = json.loads((run / "run.json").read_text())
    change(info)
    (run / "run.json").write_text(json.dumps(info))


def begin(output: Path, **changes: Any) -> dict[str, Any]:
    """Write the run.json of a run, and return what another start would compare with it."""
    info = run_info(TrainConfig(model=Path("base"), output=output, **changes), "hash", "data")
    write_run_info(output, info)
    return info


def test_a_field_that_came_later_had_its_default(tmp_path: Path) -> None:
    run = tmp_path / "run"
    info = begin(run, lora=LoRAConfig(rank=4, alpha=8.0))

    def forget(old: dict[str, Any]) -> None:
        del old["config"]["quantize"], old["config"]["optimizer"]["accumulate_steps"]
        del old["config"]["data"]["prompt"], old["config"]["loss"], old["config"]["lora"]["dropout"]

    edit_run_info(run, forget)
    check_same_run(run, info)
    for group, name, value in (("loss", "temperature", 0.1), ("data", "prompt", "released")):
        other = json.loads(json.dumps(info))
        other["config"][group][name] = value
        with pytest.raises(ValueError, match=rf"{group}\.{name} was .* and is now {value}"):
            check_same_run(run, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"config": {', "not JSON"),
        ("[]", "expected an object with a run's"),
        ('{"config": []}', "expected an object with a run's"),
        ('{"config": {"data": {}}, "base_hash": "hash"}', "expected base_hash, data_fingerprint"),
        (
            '{"config": {"data": {}, "loss": 1}, "base_hash": "h", "data_fingerprint": "d"}',
            "expected base_hash, data_fingerprint",
        ),
        ('{"config": {"data": {}, "lora": {"size": 1}}}', "config.lora cannot be read"),
    ],
)
def test_a_malformed_run_info_is_named(tmp_path: Path, text: str, message: str) -> None:
    run = tmp_path / "run"
    info = begin(run)
    (run / "run.json").write_text(text)
    with pytest.raises(ValueError) as error:
        check_same_run(run, info)
    assert str(error.value).startswith(f"{run / 'run.json'}: {message}")
    assert "\n" not in str(error.value)


def test_wandb_knows_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an id that stays over resumes and moves; runs from before there were ids keep theirs."""
    ids: list[str] = []
    wandb = types.SimpleNamespace(
        init=lambda **options: ids.append(options["id"]) or types.SimpleNamespace(finish=int)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def start(run: Path) -> None:
        begin(run)
        with MetricsLog(run, 0, 1, wandb_project="project"):
            pass

    for name in ("a", "b", "a"):
        start(tmp_path / name / "run")
    (tmp_path / "a").rename(tmp_path / "c")
    start(tmp_path / "c" / "run")
    edit_run_info(tmp_path / "b" / "run", lambda info: info.pop("id"))
    start(tmp_path / "b" / "run")
    first, other, resumed, moved, old = ids
    assert first == resumed == moved != other
    assert old == "run"
