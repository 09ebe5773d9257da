"""Triplets a second in training: our step and torch + peft, in turns, on the same batches.

    python benchmarks/train_throughput.py --model BASE --data triplets_snli.csv --batch-size 24 \
        --length-groups 8
    python benchmarks/train_throughput.py --model BASE --data triplets_snli.csv --batch-size 64 \
        --gradient-checkpointing

BASE is SmolLM2-135M, converted (docs/results.md), or FOLDER/converted of a random Qwen3-VL:
benchmarks/encode_images.py --family qwen3_vl --model FOLDER. Both sides train LoRA r 16 in fp32 as
configs/demo.py says, from the same factors, on the same token ids in the same order. PyTorch runs
the decoder alone, without lm_head, on all sentences of a batch at once, padded to its longest, as
the authors' training script does. Losses are compared step by step. Tables: docs/benchmarks.md.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from encode_side_by_side import Notes, Run, Side, serve
from train_side_by_side import print_steps, take_steps

if TYPE_CHECKING:
    from e5v_jax.train.config import TrainConfig


@dataclass(frozen=True)
class Args:
    """Compare our training step with torch + peft."""

    model: Path
    """Converted folder of the base model."""
    data: tuple[Path, ...]
    """csv files with columns sent0, sent1, hard_neg."""
    batch_size: int = 64
    """Triplets a step."""
    turns: int = 2
    """Of each side."""
    steps: int = 3
    """Timed steps of a turn, after one that is not: the other side has just given back gigabytes,
    which the system takes its time to hand out again."""
    length_groups: int = 12
    """Ours."""
    remat: Literal["none", "dots", "full"] | None = None
    """Ours; by default that of configs/demo.py."""
    chunk_size: int | None = None
    """Ours."""
    texts_per_row: int = 1
    """Ours."""
    gradient_checkpointing: tyro.conf.FlagCreatePairsOff[bool] = False
    """PyTorch's: keep the input of each layer only."""
    threads: int = 2
    """CPUs of each side."""
    side: Side | None = None
    """Be one side (the command starts itself so)."""
    folder: Path | None = None
    """Files for the sides (written by the command itself)."""


def train_config(args: Args) -> "TrainConfig":
    """configs/demo.py with the flags."""
    from e5v_jax.cli import read_config
    from e5v_jax.train.config import TrainConfig

    cfg = read_config(Path(__file__).parents[1] / "configs" / "demo.py", TrainConfig)
    return dataclasses.replace(
        cfg,
        model=args.model,
        data=dataclasses.replace(cfg.data, path=args.data, length_groups=args.length_groups),
        batch_size=args.batch_size,
        chunk_size=args.chunk_size,
        texts_per_row=args.texts_per_row,
        remat=cfg.remat if args.remat is None else args.remat,
    )


def prepare(args: Args, folder: Path) -> None:
    """What PyTorch reads: the model as a Hugging Face folder, LoRA factors, batches of ids."""
    import jax
    from flax import nnx

    from e5v_jax.checkpoints.converted import ConvertedFolder
    from e5v_jax.checkpoints.loading import dotted
    from e5v_jax.checkpoints.peft import Adapter, write_adapter
    from e5v_jax.checkpoints.tokenizer import load_tokenizer
    from e5v_jax.data.pipeline import make_batches
    from e5v_jax.nn.layers import Build, LoRAParam, Precision
    from e5v_jax.runtime import Runtime
    from e5v_jax.sharding import make_mesh
    from e5v_jax.train.batches import tokenize_pairs
    from e5v_jax.train.feed import load_data

    cfg = train_config(args)
    command = [sys.executable, "-m", "convert.to_hf", str(cfg.model), str(folder / "model")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])

    base, lora = ConvertedFolder(cfg.model), cfg.lora
    assert lora is not None
    precision = Precision(param=np.float32, compute=np.float32)
    how = Build(precision, Runtime.on(make_mesh()), lora)

    @jax.jit  # so that the unused base weights are never computed; the values are load_model's
    def fresh() -> nnx.State:
        rngs = nnx.Rngs(cfg.seed)
        module = base.family.build(base.config, how, rngs=rngs, load_vision=False)
        return nnx.split(module, LoRAParam, ...)[1]

    factors = fresh()
    values = {dotted(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(factors)}
    write_adapter(folder / "adapter", Adapter(lora, values), base.table)

    triplets = load_data(cfg.data)
    tokenizer = load_tokenizer(cfg.model)
    processor = base.family.processor(base.config, tokenizer, cfg.data.template)
    tokens = tokenize_pairs(triplets, processor, cfg.data)
    order = list(
        make_batches(triplets, batch_size=cfg.batch_size, seed=cfg.seed, num_epochs=cfg.num_epochs)
    )
    needed = args.turns * (1 + args.steps)
    if len(order) < needed:
        raise SystemExit(f"{len(order)} batches in all, {needed} are needed")
    batches = [
        [column[row].ids for column in tokens.items for row in rows] for rows in order[:needed]
    ]
    recipe = {"temperature": cfg.loss.temperature, **dataclasses.asdict(cfg.optimizer)}
    contents = {"recipe": recipe, "total_steps": len(order), "batches": batches}
    (folder / "batches.json").write_text(json.dumps(contents))


def open_ours(args: Args) -> tuple[Run, Notes]:
    """A step as e5v_jax.train.loop runs it; padded lengths are those of the whole run."""
    import jax

    from e5v_jax.checkpoints.converted import ConvertedFolder
    from e5v_jax.train.feed import load_data
    from e5v_jax.train.setup import set_up

    cfg = train_config(args)
    training = set_up(cfg, ConvertedFolder(cfg.model), load_data(cfg.data))
    key = jax.random.key(cfg.seed)
    loss, tokens, positions = 0.0, 0, 0

    def step() -> np.ndarray:
        nonlocal loss, tokens, positions
        batch = next(training.feed.batches)
        loss = float(training.step(batch, key).loss)  # waits for the step
        tokens += batch.tokens
        positions += sum(group.input_ids.size for group in batch.arrays.groups)
        return np.array([loss], np.float32)

    def notes() -> dict[str, Any]:
        return {
            "loss": loss,
            "padding": f"{100 * (1 - tokens / positions):.0f} %",
            "remat": cfg.remat,
            "length groups": len(training.feed.lengths),
            **({} if cfg.chunk_size is None else {"chunk size": cfg.chunk_size}),
        }

    return step, notes


def open_reference(args: Args) -> tuple[Run, Notes]:
    """The same step in PyTorch: left padding and the last position, as the authors do."""
    import torch
    from peft import PeftModel
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        get_linear_schedule_with_warmup,
    )

    torch.set_num_threads(args.threads)
    assert args.folder is not None
    contents = json.loads((args.folder / "batches.json").read_text())
    recipe, batches = contents["recipe"], iter(contents["batches"])
    has_tower = hasattr(AutoConfig.from_pretrained(args.folder / "model"), "vision_config")
    auto: Any = AutoModelForImageTextToText if has_tower else AutoModelForCausalLM
    base = auto.from_pretrained(args.folder / "model", dtype=torch.float32)
    if args.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model: Any = PeftModel.from_pretrained(base, args.folder / "adapter", is_trainable=True)
    model.train()  # dropout is 0; without this, transformers checkpoints nothing
    decoder = model.base_model.model.model
    decoder = decoder.language_model if has_tower else decoder
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe["learning_rate"],
        betas=(recipe["b1"], recipe["b2"]),
        eps=recipe["eps"],
        weight_decay=recipe["weight_decay"],
    )
    schedule = get_linear_schedule_with_warmup(
        optimizer, recipe["warmup_steps"], contents["total_steps"]
    )
    loss, tokens, positions = 0.0, 0, 0

    def step() -> np.ndarray:
        nonlocal loss, tokens, positions
        batch = next(batches)
        length = max(map(len, batch))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in batch])  # [3B, L]
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in batch])
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        unit = torch.nn.functional.normalize(hidden[:, -1], dim=-1)  # [3B, D]
        anchor, candidates = unit.split([args.batch_size, 2 * args.batch_size])
        logits = anchor @ candidates.T / recipe["temperature"]  # [B, 2B]
        value = torch.nn.functional.cross_entropy(logits, torch.arange(args.batch_size))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe["max_grad_norm"])
        optimizer.step()
        schedule.step()
        loss = value.item()
        tokens += int(mask.sum())
        positions += ids.numel()
        return np.array([loss], np.float32)

    def notes() -> dict[str, Any]:
        return {
            "loss": loss,
            "padding": f"{100 * (1 - tokens / positions):.0f} %",
            "gradient checkpointing": "on" if args.gradient_checkpointing else "off",
            "attention": base.config._attn_implementation,
            "peft": version("peft"),
        }

    return step, notes


def main(args: Args) -> None:
    """Be one side, or start both and compare them."""
    if args.side is not None:
        serve(lambda: open_ours(args) if args.side == "e5v-jax" else open_reference(args))
        return
    turn = 1 + args.steps
    answers = take_steps(prepare, args, steps=args.turns * turn, turn=turn, threads=args.threads)
    print_steps("triplets", args.batch_size, answers, turn=turn)


if __name__ == "__main__":
    main(tyro.cli(Args))
