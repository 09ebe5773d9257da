"""The server under wrk (apt install wrk), beside E5V.encode and, with --peer, another server.

    python benchmarks/serve_wrk.py --sentences shared/data/sts [--peer 8001]

The same model, texts and servers as benchmarks/serve.py, whose own client checks every answer; wrk
knows nothing of this project, and counts. It closes the loop: each connection asks again as soon as
it has its answer. Sides take turns.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from encode_text import read_sentences
from serve import Args as ServeArgs
from serve import Bare, bodies, convert, with_prompt
from serve_load import EMBEDDINGS, serving  # in tests/, which serve.py has put on the path

_SCRIPT = Path(__file__).with_name("wrk_texts.lua")


@dataclass(frozen=True)
class Args:
    """Let wrk load a server of SmolLM2."""

    sentences: Path
    """Folder with STS/STSBenchmark/sts-test.csv."""
    model: Path | None = None
    """The model, converted; by default that is done first."""
    limit: int = 512
    """Distinct texts."""
    connections: tuple[int, ...] = (1, 64)
    """Requests at a time, in runs of their own."""
    seconds: int = 30
    """Of each run of wrk."""
    repetitions: int = 2
    """Runs of each side."""
    warm_up_text: int = 96
    """Tokens of the longest text, whose shapes the server compiles before it is ready."""
    peer: int | None = None
    """Port of another server of OpenAI's interface; texts come to it with the prompt around."""
    log: Path = Path("serve.log")
    """Where the server's log goes."""


class Run(NamedTuple):
    """What wrk says of one run; times in ms."""

    answered: int
    seconds: float
    refused: int  # with a status other than 2xx or 3xx
    broken: int
    p50: float
    p99: float
    most: float


def load(port: int, file: Path, connections: int, seconds: int) -> Run:
    """Run wrk. Raises CalledProcessError: it failed."""
    command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "--timeout", "60s"]
    url = f"http://127.0.0.1:{port}{EMBEDDINGS}"
    done = subprocess.run(
        [*command, "-s", str(_SCRIPT), url, "--", str(file)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    line = next(x for x in done.stdout.splitlines() if x.startswith("result "))
    answered, taken, refused, broken, *times = line.split()[1:]
    return Run(int(answered), float(taken), int(refused), int(broken), *map(float, times))


def write_bodies(texts: Sequence[str], file: Path) -> Path:
    """Write what is posted, a line each."""
    file.write_bytes(b"\n".join(bodies(texts)) + b"\n")
    return file


def main(args: Args) -> None:
    """Print a table. Raises SystemExit: wrk is not there, or a request failed."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt install wrk")
    texts = read_sentences(args.sentences, args.limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or convert(folder / "model")
        flags = ["--dtype", "float32", "--cache-size", "0"]
        flags += ["--warm-up-text", str(args.warm_up_text)]
        with serving(model, args.log, *flags) as server:
            sides = {"server": (server.port, write_bodies(texts, folder / "texts"))}
            if args.peer is not None:
                filled = write_bodies(with_prompt(model, texts), folder / "filled")
                sides["peer"] = (args.peer, filled)
            bare = Bare(model, ServeArgs(args.sentences, limit=args.limit))
            try:
                bare.run(0, args.limit, one_by_one=False)  # compiles
                rates: list[float] = []
                found: dict[tuple[int, str], list[Run]] = {}
                for _ in range(args.repetitions):
                    (taken,) = bare.run(0, args.limit, one_by_one=False)
                    rates.append(args.limit / taken)
                    for connections in args.connections:
                        for side, (port, file) in sides.items():
                            run = load(port, file, connections, args.seconds)
                            found.setdefault((connections, side), []).append(run)
                            print(json.dumps([connections, side, *run]), file=sys.stderr)
                            if side == "peer":  # it goes on with what nobody waits for any more
                                time.sleep(30)
            finally:
                bare.close()
    print(f"E5V.encode: {' '.join(f'{rate:.2f}' for rate in rates)} texts/s\n")
    print("| at a time | | texts/s | of encode | p50 | p99 | most, ms | refused, broken |")
    print("|---|---|---|---|---|---|---|---|")
    for (connections, side), runs in found.items():
        each = [run.answered / run.seconds for run in runs]
        share = f"{100 * np.median(each) / np.median(rates):.1f} %"
        times = " | ".join(
            f"{np.median([getattr(r, n) for r in runs]):.1f}" for n in Run._fields[4:]
        )
        failed = f"{sum(run.refused for run in runs)}, {sum(run.broken for run in runs)}"
        rate = " ".join(f"{x:.2f}" for x in each)
        print(f"| {connections} | {side} | {rate} | {share} | {times} | {failed} |")
    if any(run.refused or run.broken for runs in found.values() for run in runs):
        raise SystemExit("some requests failed")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
