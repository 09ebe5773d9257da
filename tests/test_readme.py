"""Every command of the documentation runs, on tiny models, or is listed with the reason why not.

The folder that a command runs in has what the pages speak of, under the names they use.
"""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_gguf
from hf_models import RECIPES, TOWER_RECIPES, build_llava, picture
from test_retrieval import write_set
from training_runs import write_csv
from transformers import AutoModel

from e5v_jax.checkpoints import commands, from_hf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tpu/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONVERTERS = {
    "convert.from_hf": commands.convert,
    "convert.to_hf": commands.export,
    "convert.compose": commands.compose,
}
NAMES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMAND = re.compile(
    r"(?:python3?|make|pip|e5v-[a-z]+|sbatch|nohup|gcloud|curl|source|mkdir) |tpu/\S+\.sh"
)


@dataclass(frozen=True)
class Here:
    """How commands are run here: those that begin so."""

    begin: str
    more: str = ""
    """Words that make it short."""
    makes: str = ""
    """What it writes, where that is also a name that others read."""
    says: str = ""
    """A part of what it prints, or a file that it leaves."""
    quick: bool = False


SMALL = "--max-steps 2 --batch-size 4 --lora.rank 2 --dtype float32"
TINY = "--batch-size 6 --steps 1"
HERE = [
    Here("python -m convert.from_hf royokong/", makes="e5-v", says="e5-v: ", quick=True),
    Here("python -m convert.from_hf SmolLM2-135M", makes="BASE", says="BASE: ", quick=True),
    Here(
        "python -m convert.from_hf lmms-lab/llama3-llava-next-8b models/",
        makes="models/llava-next-llama3-8b",
        says="models/llava-next-llama3-8b: ",
    ),
    Here("python -m convert.compose SmolLM2.gguf", "--image-size 28", says="mine/config.json"),
    Here(
        "python -m convert.compose LLM TOWER DST",
        "--image-size 28",
        says="DST/config.json",
    ),
    Here("python -m convert.compose LLM TOWER base", "--image-size 28", says="base/config.json"),
    Here("python -m convert.to_hf", says="e5-v-hf/model.safetensors", quick=True),
    Here("python -m convert.to_hf models/", says="e5v-hf/model.safetensors"),
    Here(
        "python -m e5v_jax.encode --model MODEL --input texts", says="vectors/shard-00000.parquet"
    ),
    Here("python -m e5v_jax.encode --model MODEL --input 'photos", says="vectors/manifest.json"),
    Here("python -m e5v_jax.train --config configs/demo.py", SMALL, "RUN", says="adapter: written"),
    Here(
        "python -m e5v_jax.train --config configs/e5v_llama3_8b.py",
        SMALL,
        "runs/e5v-llama3-8b",
        says="adapter: written",
    ),
    Here("python -m e5v_jax.evaluate --model e5-v", "--stride 500", says="Flickr30K"),
    Here("python -m e5v_jax.evaluate --model MODEL", "--stride 200", says="OUT/results.json"),
    Here("python -m e5v_jax.evaluate --model BASE", "--stride 500", says="Spearman"),
    Here("python -m e5v_jax.evaluate --model RANDOM", says="drawn captions"),
    Here("python -m e5v_jax.evaluate --model models/", "--stride 500", says="COCO"),
    Here("python -m e5v_jax.evaluate --compare", says="B - A"),
    Here("python -m e5v_jax.evaluate analyse --model MODEL", "--stride 200", says="OUT/svd.png"),
    Here("python -m e5v_jax.evaluate analyse --model BASE", "--stride 200", says="OUT/analysis.md"),
    Here("python benchmarks/train_throughput.py", f"{TINY} --turns 1", says="e5v-jax"),
    Here("python benchmarks/chunk_memory.py", f"{TINY} --chunk-sizes None 6", says="None"),
    Here("python benchmarks/pair_cost.py --data", "--tiny --batch-size 2 --steps 1", says="FLOPs"),
    Here("python benchmarks/encode_gpu.py", "--tiny --text-batch 3 --image-batch 1", says="texts"),
    Here(
        "python benchmarks/search.py --rows",
        "--rows 2000 --dimensions 24 --repetitions 2",
        says="24 dimensions",
    ),
    Here("python benchmarks/matmul_peak.py", "--rows 8 --repetitions 1", says="XLA"),
]
NOT_HERE = {
    r"make (test|test-slow|docs)$": "they are these tests, and test_docs.py",
    r"make demo$": "it installs; test_the_demo runs what it calls",
    r"make demo-images": "what make photographs leaves",
    r"make test-gpu": "a GPU",
    r"pip install|source": "they change the environment; test_wheel.py installs",
    r"python -m e5v_jax.dryrun|.*--topology": "libtpu, and minutes: test_tpu_aot.py",
    r"python -m e5v_jax.evaluate golden": "2 B weights: test_golden.py",
    r"tpu/|nohup|sbatch|gcloud": "a cloud: test_launch.py plays one to every script of tpu/",
    r"python .* gs://": "a bucket: test_buckets.py has an emulator's",
    r"curl|mkdir": "the network, and a folder for what comes from it",
    r"python .* configs/e5v_llama3_8b_qlora.py": "8 B: test_dryrun.py reads it",
    r".*vit_s_focus.onnx": "the real files: test_compose.py",
    r"python -m e5v_jax.serve|e5v-serve": "it runs until a signal: test_serve_command.py",
    r"python -m e5v_jax.align": "test_align.py runs it",
    r"python -m e5v_jax.search": "test_search_query.py and test_search_api.py run it",
    r"python benchmarks/search.py --page": "a browser",
    r"python -m e5v_jax.train --config configs/nano_e5v.py": "test_align.py goes on with a model",
    r"python -m e5v_jax.evaluate (analyse )?--model aligned/": "photographs that do not ship",
    r"python benchmarks/(tower_layers|align_throughput).py": "photographs, and the real tower",
    r"make photographs": "hours, and photographs that are not shipped",
    r"python -m e5v_jax.encode --model runs/demo/base": "test_the_example_as_printed",
    r"e5v-convert --preset": "no command but a flag: test_presets.py",
    r"python benchmarks/(encode_text|encode_images|encode_bulk).py": "the real SmolLM2, minutes",
    r"python benchmarks/image_profile.py": "minutes: test_encode_benchmarks.py, at tiny size",
    r"python benchmarks/serve_wrk.py": "wrk, and the real SmolLM2: test_serve_benchmark.py",
    r"python benchmarks/serve.py": "so does this; test_serve_benchmark.py runs its checked part",
    r"python benchmarks/llama_cpp_server.py": "a package that is not this project's",
    r"python benchmarks/encode_gpu_qwen.py": "a GPU",
    r"python benchmarks/gpu_train.py": "a GPU; test_gpu_benchmark.py runs it at toy size",
    r"python benchmarks/(convert_memory|checksums).py": "16 and 2 GB; test_convert_memory.py",
    r"python benchmarks/pair_cost.py$": "named again, without its words",
}


def find_commands(page: Path) -> list[str]:
    """Of blocks of code and, with more than a name, of the text between them."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text())
    block = r"(?ms)^```\w*\n(.*?)^```$|^((?:    [^\n]*\n)+)"
    lines = [line for match in re.finditer(block, text) for line in match[0].splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(block, "", text))]
    found = []
    for line in lines:
        line = re.split(r"\s+# ", line.strip().removeprefix("$ "))[0].strip()
        line = re.sub(r"^[A-Z_]+=\S+ ", "", line)  # a setting of the machine's
        found += [part for part in re.split(r" && ", line) if COMMAND.match(part)]
    found += [span for span in spans if COMMAND.match(span)]
    return [command for command in found if command != "python -m"]


COMMANDS = sorted({command for page in PAGES for command in find_commands(page)})


def here(command: str) -> Here | None:
    """The longest beginning that fits."""
    fitting = [one for one in HERE if command.startswith(one.begin)]
    return max(fitting, key=lambda one: len(one.begin), default=None)


def why_not(command: str) -> list[str]:
    return [pattern for pattern in NOT_HERE if re.match(pattern, command)]


RUN = [(command, one) for command in COMMANDS if (one := here(command)) and not why_not(command)]


def test_every_command_is_run_or_listed() -> None:
    """And nothing is listed that no page has any more; a bare name is that of a command."""
    assert len(COMMANDS) > 80
    assert not [command for command in COMMANDS if not here(command) and not why_not(command)]
    used = {one.begin for _, one in RUN}
    used |= {pattern for command in COMMANDS for pattern in why_not(command)}
    assert not {*NOT_HERE, *(one.begin for one in HERE)} - used
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"`(e5v-[a-z]+)`", text)) <= {*NAMES, "e5v-jax"}
    for module in set(re.findall(r"python -m ((?:e5v_jax|convert)[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of, by the names they use: small files, and links to the models."""
    store, models = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("models")
    build_llava(RECIPES["llama-gqa"], models / "hf")
    from_hf.convert(from_hf.Args(str(models / "hf"), models / "converted"))
    test_gguf.write(models / "tiny.gguf")
    tower = TOWER_RECIPES["dinov2"].llava_config().vision_config
    AutoModel.from_config(tower).save_pretrained(models / "tower")
    converted = ("e5-v", "MODEL", "BASE", "RANDOM", "runs/demo/base", "FOLDER/converted")
    converted += ("models/llava-next-llama3-8b",)
    for name, target in {
        **dict.fromkeys(converted, models / "converted"),
        **dict.fromkeys(("royokong/e5-v", "lmms-lab/llama3-llava-next-8b"), models / "hf"),
        **dict.fromkeys(("SmolLM2.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"), models / "tiny.gguf"),
        **dict.fromkeys(("dinov2-small", "TOWER"), models / "tower"),
        "LLM.gguf": models / "tiny.gguf",
        "configs": ROOT / "configs",
        "benchmarks": ROOT / "benchmarks",
        "DATA": Path("data"),
        "IMAGES": Path("flickr8k"),
    }.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).symlink_to(target)
    for name in ("data/flickr30k", "data/coco", "flickr8k"):
        write_set(store / name)
    for name in ("my.csv", "triplets_snli.csv", "triplets.csv", "data/nli_for_simcse.csv"):
        write_csv(store / name, rows=48)
    texts = [f'{{"id": "{i}", "text": "Text {i}."}}\n' for i in range(3)]
    (store / "texts.jsonl").write_text("".join(texts))
    (store / "photos/deep").mkdir(parents=True)
    picture(40, 60).save(store / "photos/deep/a.jpg")
    picture(60, 40).save(store / "dog.jpg")
    return store


@pytest.fixture(scope="module")
def full(store: Path, shared: Path) -> Path:
    """The same with STS and SICK, a trained run and the output of an evaluation."""
    (store / "sts").symlink_to(shared / "data/sts")
    for name in ("STS", "SICK"):
        (store / "data" / name).symlink_to(shared / "data/sts" / name)
    with contextlib.chdir(store):
        train = "python -m e5v_jax.train --config configs/demo.py --data.path my.csv --output RUN"
        run(train, Here("", f"{SMALL} --checkpoint-every 2"))
        run(
            "python -m e5v_jax.evaluate --model BASE --tasks retrieval --data IMAGES --output OUT_A"
        )
    (store / "runs/e5v-llama3-8b").symlink_to(store / "RUN")
    for name in ("OUT_B", "BEFORE", "AFTER"):
        (store / name).symlink_to("OUT_A")
    return store


def fill(command: str) -> list[str]:
    """A command's words, those in brackets if they name something, with a task and a step."""
    line = re.sub(r"\[--[^\]]*\]", "", re.sub(r"\[(--[a-z]+ [A-Z_]+)\]", r"\1", command))
    for name, value in (("TASKS", "stsb"), ("checkpoints/N", "checkpoints/2"), ("LLM", "LLM.gguf")):
        line = line.replace(name, value)
    return shlex.split(line)


def run(command: str, one: Here = Here("")) -> None:
    """Run a command of this project, in this process where it is a module. Its exit code is 0."""
    _, *words = fill(command)
    for word in shlex.split(one.more):
        if word in words:  # said twice: the shorter
            at = words.index(word)
            del words[at : at + 2]
    words += shlex.split(one.more)
    if words[0] != "-m":
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
        print(done.stdout)
        assert done.returncode == 0, done.stderr
        return
    _, name, *argv = words
    with pytest.raises(SystemExit) as end:
        if name in CONVERTERS:
            CONVERTERS[name](argv)
        else:
            importlib.import_module(f"{name}.__main__").main(argv)
    assert end.value.code in (0, None)


def check(
    command: str, one: Here, store: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs in a copy of the store, and says or leaves what is expected."""
    shutil.copytree(store, folder, symlinks=True)
    if (made := folder / one.makes) != folder:
        made.unlink() if made.is_symlink() else shutil.rmtree(made, ignore_errors=True)
    with contextlib.chdir(folder):
        run(command, one)
        assert one.says in capsys.readouterr().out or Path(one.says).exists()


@pytest.mark.parametrize(("command", "one"), [(c, one) for c, one in RUN if one.quick])
def test_quick(
    command: str, one: Here, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(command, one, store, tmp_path / "here", capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "one"), [(c, one) for c, one in RUN if not one.quick])
def test_slow(
    command: str, one: Here, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(command, one, full, tmp_path / "here", capsys)


def test_python_of_the_readme(store: Path) -> None:
    """Its block, on a tiny model: three unit vectors."""
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "README.md").read_text())
    names: dict[str, Any] = {}
    with contextlib.chdir(store):
        exec(block, names)
    vectors = names["vectors"]
    assert vectors.shape == (3, names["model"].config.text.hidden_size)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


# --- what is printed -----------------------------------------------------------------------------


def printed(start: str) -> list[str]:
    """The lines that README shows under the command that begins so."""
    text = re.sub(r" *\\\n\s*", " ", (ROOT / "README.md").read_text())
    (block,) = re.findall(rf"(?ms)^\$ {re.escape(start)}.*?\n(.*?)^```$", text)
    return block.splitlines()


def assert_same(shown: list[str], found: list[str], *, within: float) -> None:
    """The same words; figures as near as ``within`` units of their last digit."""
    number = re.compile(r"-?\d+(?:\.\d+)?")
    assert [number.sub("N", x).split() for x in shown] == [
        number.sub("N", x).split() for x in found
    ]
    for ours, theirs in zip(shown, found, strict=True):
        for a, b in zip(number.findall(ours), number.findall(theirs), strict=True):
            last = 10.0 ** -len(a.partition(".")[2])
            assert abs(float(a) - float(b)) <= (within + 0.01) * last, (ours, theirs)


@pytest.mark.slow
def test_the_example_as_printed(
    smollm2_converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """README's table of cosines, of the real SmolLM2: a digit may be rounded the other way."""
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/base").symlink_to(smollm2_converted)
    start = "python -m e5v_jax.encode --model runs/demo/base"
    (command,) = [c for c in COMMANDS if c.startswith(start)]
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.chdir(tmp_path):
        run(command)
    assert_same(printed(start), capsys.readouterr().out.splitlines(), within=1)


@pytest.mark.slow
def test_the_demo(smollm2_gguf: Path, tmp_path: Path) -> None:
    """What ``make demo`` ends with; another machine's fp32 moves a figure of training a little."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    demo = [sys.executable, "-m", "e5v_jax.demo"]
    done = subprocess.run(demo, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = [line for line in printed("make demo") if line.startswith("│")]
    found = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert_same(shown, found[: len(shown)], within=30)
