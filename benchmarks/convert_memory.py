"""Peak memory of ``convert.from_hf`` on a synthetic checkpoint of any size.

    python benchmarks/convert_memory.py            # 8.36 B parameters, 16.7 GB: E5-V's own shapes
    python benchmarks/convert_memory.py --layers 2 # the same widths, fewer layers

The checkpoint is made of sparse files: it reads as zeros, and takes no disk space. The converted
folder is real (its size again on the disk, in a temporary folder that is deleted).
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from e5v_jax.checkpoints.safetensors_file import TensorSpec, header, split_shards, write_index
from e5v_jax.families import find_family

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Args:
    """Convert a synthetic checkpoint with the shapes of royokong/e5-v and print the peak memory."""

    layers: int = 32
    """Decoder layers; 32 is the full size."""
    hidden_size: int = 4096
    """Width of the decoder; its MLP is 3.5 times as wide."""
    vocab_size: int = 128320
    """Rows of the token embedding, the largest tensor."""
    shard_gb: float = 5.0
    """Size of a safetensors shard."""
    allowance_gb: float = 2.0
    """Memory allowed beyond twice the largest tensor; above it, the exit code is 1."""
    folder: Path | None = None
    """Where to work; by default the system's temporary folder."""


def hf_config(args: Args) -> dict[str, Any]:
    """``config.json`` of llava-hf/llama3-llava-next-8b-hf, with the given sizes."""
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_token_index": 128256,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": args.hidden_size,
            "intermediate_size": args.hidden_size * 7 // 2,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.hidden_size // 128,
            "num_key_value_heads": args.hidden_size // 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": args.vocab_size,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-5,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "torch_dtype": "bfloat16",
    }


def write_sparse_checkpoint(folder: Path, args: Args) -> list[TensorSpec]:
    """A sharded checkpoint whose tensors are holes in sparse files."""
    raw = hf_config(args)
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # a model needs one
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    family = find_family(raw)
    table = family.parameters(family.read_config(raw))
    specs = [
        TensorSpec(slot.key(table.export_prefixes), slot.row.hf_shape, BFLOAT16)
        for slot in table.slots
        if slot.needed or slot.row.hf == "lm_head.weight"
    ]
    shards = split_shards(specs, int(args.shard_gb * 1e9))
    for name, shard in shards.items():
        with (folder / name).open("wb") as file:
            file.write(header(shard))
            file.truncate(file.tell() + sum(spec.nbytes for spec in shard))
    if len(shards) > 1:
        write_index(folder, shards)
    return specs


def main(args: Args) -> None:
    """Make the checkpoint, convert it in a process of its own, print its peak memory."""
    work = Path(tempfile.mkdtemp(prefix="convert_memory.", dir=args.folder))
    try:
        (work / "hf").mkdir()
        specs = write_sparse_checkpoint(work / "hf", args)
        command = ["-m", "convert.from_hf", str(work / "hf"), str(work / "converted")]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
    finally:
        shutil.rmtree(work)
    total, largest = sum(s.nbytes for s in specs), max(s.nbytes for s in specs)
    bound = 2 * largest + args.allowance_gb * 1e9
    print(
        f"checkpoint {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, "
        f"converted in {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB "
        f"(bound: 2 x largest + {args.allowance_gb:g} GB = {bound / 1e9:.2f} GB)"
    )
    if peak > bound:
        raise SystemExit("the peak is above the bound")


if __name__ == "__main__":
    main(tyro.cli(Args))
