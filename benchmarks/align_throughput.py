"""Captions a second in alignment: our step and plain PyTorch (transformers + peft), in turns.

    python benchmarks/align_throughput.py --model BASE --data photos.parquet [--captions all]

BASE is SmolLM2-135M behind a ViT-S/14, composed so that transformers can load its export:
``e5v-compose SmolLM2.gguf vit_s_focus.onnx BASE --image-size 112 --grid-pinpoints 112x112 --dtype
float32``. Both sides train projector, image_newline and LoRA r 16 in fp32 as configs/nano_align.py
says, from the same weights, on the same captions of the same images. Ours has the features of the
frozen tower on disk, and with ``--captions all`` the captions of an image in one row; PyTorch runs
the tower in every step and has a row for each caption, as training scripts do. It gets its pixels
ready made. Losses are compared step by step. Tables: docs/benchmarks.md.
"""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from encode_side_by_side import SIDES, Notes, Run, Side, serve
from train_side_by_side import print_steps, take_steps

if TYPE_CHECKING:
    from e5v_jax.align.config import AlignConfig
    from e5v_jax.train.setup import Training


@dataclass(frozen=True)
class Args:
    """Compare our alignment step with transformers + peft."""

    model: Path
    """Converted folder of the base model."""
    data: tuple[Path, ...]
    """Parquet files or folders with images and captions."""
    captions: Literal["one", "all"] = "one"
    """Of each image in a step."""
    batch_size: int = 8
    """Images a step."""
    turns: int = 2
    """Of each side."""
    steps: int = 3
    """Timed steps of a turn, after one that is not."""
    threads: int = 2
    """CPUs of each side."""
    side: Side | None = None
    """Be one side (the command starts itself so)."""
    folder: Path | None = None
    """Files for the sides (written by the command itself)."""

    @property
    def needed(self) -> int:
        """Steps in all."""
        return self.turns * (1 + self.steps)


def align_config(args: Args, features: Path | None) -> "AlignConfig":
    """configs/nano_align.py with the flags."""
    from e5v_jax.align.config import AlignConfig
    from e5v_jax.cli import read_config

    cfg = read_config(Path(__file__).parents[1] / "configs" / "nano_align.py", AlignConfig)
    return dataclasses.replace(
        cfg,
        model=args.model,
        data=dataclasses.replace(
            cfg.data, path=args.data, captions=args.captions, features=features
        ),
        batch_size=args.batch_size,
        num_epochs=1,
        max_steps=args.needed,
        projector_start="model",  # a step takes as long from anywhere
    )


def open_training(args: Args, *, features: Path | None) -> "Training":
    """What e5v_jax.align trains with, of as many images as the steps need."""
    from e5v_jax.align.captions import load_captions
    from e5v_jax.align.task import set_up
    from e5v_jax.checkpoints.converted import ConvertedFolder

    cfg = align_config(args, features)
    data, count = load_captions(cfg.data.path), args.needed * args.batch_size
    if len(data) < count:
        raise SystemExit(f"{len(data)} images, {count} are needed")
    columns = {name: getattr(data, name)[:count] for name in ("images", "texts", "row_ids")}
    return set_up(cfg, ConvertedFolder(cfg.model), dataclasses.replace(data, **columns))


def prepare(args: Args, folder: Path) -> None:
    """What PyTorch reads: the model as a Hugging Face folder, LoRA factors, batches."""
    from flax import nnx

    from e5v_jax.checkpoints.converted import ConvertedFolder
    from e5v_jax.checkpoints.loading import dotted
    from e5v_jax.checkpoints.peft import Adapter, write_adapter
    from e5v_jax.nn.layers import LoRAParam

    command = [sys.executable, "-m", "convert.to_hf", str(args.model), str(folder / "model")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    training = open_training(args, features=None)
    lora = align_config(args, None).lora
    assert lora is not None
    factors = {
        dotted(path): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(training.trainable)
        if isinstance(leaf, LoRAParam)
    }
    write_adapter(folder / "adapter", Adapter(lora, factors), ConvertedFolder(args.model).table)
    for number in range(args.needed):
        batch = next(training.feed.batches).arrays
        rows: dict[str, Any] = _rows_of_their_own(batch, training.processor.config)
        np.savez(folder / f"{number}.npz", **rows)


def _rows_of_their_own(batch: Any, config: Any) -> dict[str, np.ndarray]:
    """A row for each caption: token ids, labels (-100 is none), pixels, the sizes of images."""
    vision, rows, owners = config.vision, [], []
    for i, (ids, labels) in enumerate(zip(batch.inputs.input_ids, batch.labels, strict=True)):
        ids = np.where(batch.inputs.image_index[i] >= 0, config.image_token_id, ids)
        prompt = ids[: batch.label_index[i, 0] + 1].tolist()
        labels = labels[labels >= 0]
        counts = [len(labels)]
        if batch.packing is not None:
            counts = np.bincount(batch.packing.segment[i])[1:].tolist()
        for caption in np.split(labels, np.cumsum(counts)[:-1]):
            rows.append((prompt, caption.tolist()))
            owners.append(i)
    length = max(len(prompt) + len(caption) for prompt, caption in rows)
    ids, target = np.zeros((len(rows), length), int), np.full((len(rows), length), -100)
    mask = np.zeros_like(ids)
    for i, (prompt, caption) in enumerate(rows):
        end = len(prompt) + len(caption)
        ids[i, :end], mask[i, :end] = prompt + caption, 1
        target[i, len(prompt) : end] = caption
    tiles = batch.inputs.tiles.reshape(len(batch.labels), -1, *batch.inputs.tiles.shape[1:])
    pixels = (tiles / 255.0 - np.array(vision.image_mean)) / np.array(vision.image_std)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": target,
        "pixel_values": pixels.transpose(0, 1, 4, 2, 3).astype(np.float32)[owners],
        "image_sizes": np.full((len(rows), 2), vision.image_size),
    }


def open_ours(args: Args) -> tuple[Run, Notes]:
    """A step as e5v_jax.align runs it, the features of the tower on disk."""
    import jax

    assert args.folder is not None
    training = open_training(args, features=args.folder / "features")
    key = jax.random.key(0)
    loss, captions = 0.0, 0

    def step() -> np.ndarray:
        nonlocal loss, captions
        batch = next(training.feed.batches)
        loss = float(training.step(batch, key).loss)  # waits for the step
        packing = batch.arrays.packing
        captions += args.batch_size if packing is None else int(packing.segment.max(axis=1).sum())
        return np.array([loss], np.float32)

    return step, lambda: {"loss": loss, "captions": captions}


def open_reference(args: Args) -> tuple[Run, Notes]:
    """The same step in PyTorch."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, get_linear_schedule_with_warmup

    torch.set_num_threads(args.threads)
    assert args.folder is not None
    folder, cfg = args.folder, align_config(args, None)
    base: Any = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    factors = [p for p in model.parameters() if p.requires_grad]
    connector = [*base.model.multi_modal_projector.parameters(), base.model.image_newline]
    for p in connector:
        p.requires_grad = True
    recipe = cfg.optimizer
    groups: list[dict[str, Any]] = [
        {"params": connector},
        {"params": factors, "lr": recipe.decoder_learning_rate or recipe.learning_rate},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(recipe.b1, recipe.b2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.warmup_steps, args.needed)
    number, loss, captions = 0, 0.0, 0

    def step() -> np.ndarray:
        nonlocal number, loss, captions
        with np.load(folder / f"{number}.npz") as file:
            batch = {name: torch.from_numpy(file[name]) for name in file.files}
        value = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_([*connector, *factors], recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        number, loss, captions = number + 1, value.item(), captions + len(batch["labels"])
        return np.array([loss], np.float32)

    return step, lambda: {"loss": loss, "captions": captions, "peft": version("peft")}


def main(args: Args) -> None:
    """Be one side, or start both and compare them."""
    if args.side is not None:
        serve(lambda: open_ours(args) if args.side == "e5v-jax" else open_reference(args))
        return
    turn = 1 + args.steps
    answers = take_steps(prepare, args, steps=args.needed, turn=turn, threads=args.threads)
    # of each side after its last step
    ours, theirs = [[answer.pop("captions") for answer in answers[side]][-1] for side in SIDES]
    if ours != theirs:
        raise SystemExit(f"the sides did not see the same captions: {ours}, {theirs}")
    print_steps("captions", ours // args.needed, answers, turn=turn)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
