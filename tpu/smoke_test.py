"""Is the slice whole? Counts devices, adds across all, writes and reads a checkpoint.

On every host: ``tpu/run_all_workers.sh -- python tpu/smoke_test.py --path bucket/smoke``. Takes
seconds; the checkpoint is removed again.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from e5v_jax import cli


@dataclass(frozen=True)
class Args:
    """Check devices, their interconnect and the storage before anything is paid for in hours."""

    path: Path
    """Folder to write a small checkpoint to, as seen by all hosts; it must not exist."""
    devices: int | None = None
    """Devices expected in all; None only shows how many there are."""


def smoke_test(args: Args) -> None:
    """Run the three checks in turn.

    Raises:
        ValueError: one line naming the check, what was found and what was expected.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from orbax.checkpoint import v1 as ocp

    from e5v_jax.distributed import initialize, is_first, wait_for_all
    from e5v_jax.sharding import make_mesh

    initialize()
    count = jax.device_count()
    if is_first():
        print(f"devices: {count} {jax.devices()[0].device_kind} on {jax.process_count()} host(s)")
    if args.devices not in (None, count):
        raise ValueError(f"devices: found {count}, expected {args.devices}")

    mesh = make_mesh()
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    ones = jax.make_array_from_callback((count,), split, lambda index: np.ones(count)[index])
    total = float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
    if total != count:
        raise ValueError(f"all-reduce: the sum over {count} devices is {total}, expected {count}")
    if is_first():
        print(f"all-reduce: ok, {count} devices")

    path = args.path.absolute()
    if path.exists():
        raise FileExistsError(f"{path}: already exists; choose another folder or delete it")
    wait_for_all("checked")  # before anyone creates it
    state = {"ones": ones, "step": jnp.int32(7)}
    ocp.save_pytree(path, state)
    restored = ocp.load_pytree(path, jax.tree.map(ocp.arrays.to_shape_dtype_struct, state))
    same = jax.jit(lambda a, b: jnp.array_equal(a, b))(restored["ones"], ones)
    if not bool(same) or int(restored["step"]) != 7:
        raise ValueError(f"{path}: the checkpoint read back differs from the one written")
    wait_for_all("read")
    if is_first():
        shutil.rmtree(path)
        print(f"checkpoint: ok, written to and read from {path}")


if __name__ == "__main__":
    cli.run(smoke_test, Args)
