"""Published figures of accelerators; every one is a peak.

TPUs: Google Cloud's page of each generation (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x).
Their interconnect is given there per chip, in Gbit/s or GB/s over all links and both directions;
here it is bytes/s that one link carries one way. GPUs: NVIDIA's data sheets of the SXM modules,
dense (no sparsity); NVLink one way, over all links.
"""

from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator, as it is allocated and paid for."""

    name: str
    hbm: int  # bytes
    usable_hbm: int  # bytes that a program may take; the runtime keeps the rest
    flops: float  # bf16 FLOP/s
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one link, one way
    torus_axes: int  # dimensions of the interconnect; 0 means all chips hang on one switch
    jax_devices: int = 1  # devices that JAX sees in one chip


def _tpu(
    name: str,
    gib: float,
    flops: float,
    hbm_bandwidth: float,
    link_bandwidth: float,
    torus_axes: int,
    jax_devices: int = 1,
) -> Chip:
    # libtpu's compiler refuses programs above 15.75 GiB on v5e: a quarter GiB is the runtime's
    usable = int((gib - 0.25) * GiB)
    return Chip(
        name,
        int(gib * GiB),
        usable,
        flops,
        hbm_bandwidth,
        link_bandwidth,
        torus_axes,
        jax_devices,
    )


TPUS: dict[str, Chip] = {
    "v4": _tpu("v4", 32, 275e12, 1228e9, 50e9, 3),
    "v5e": _tpu("v5e", 16, 197e12, 819e9, 50e9, 2),
    "v5p": _tpu("v5p", 95, 459e12, 2765e9, 100e9, 3),
    "v6e": _tpu("v6e", 32, 918e12, 1640e9, 100e9, 2),
    "tpu7x": _tpu("tpu7x", 192, 2307e12, 7380e9, 100e9, 3, jax_devices=2),
}


def _gpu(name: str, gb: float, flops: float, hbm_bandwidth: float, nvlink: float) -> Chip:
    # what XLA_PYTHON_CLIENT_MEM_FRACTION=.95 leaves, beside the CUDA context
    return Chip(name, int(gb * 1e9), int(gb * 0.95e9), flops, hbm_bandwidth, nvlink, 0)


GPUS: dict[str, Chip] = {
    "a100": _gpu("a100", 80, 312e12, 2039e9, 300e9),
    "h100": _gpu("h100", 80, 989e12, 3350e9, 450e9),
    "h200": _gpu("h200", 141, 989e12, 4800e9, 450e9),
    "b200": _gpu("b200", 180, 2250e12, 8000e9, 900e9),
}
