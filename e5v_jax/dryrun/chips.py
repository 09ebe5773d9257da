"""Published figures of accelerators; every one is a peak.

TPUs: Google Cloud's page of each generation (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x).
Their interconnect is given there per chip, in Gbit/s or GB/s over all links and both directions;
here it is bytes/s that one link carries one way. GPUs: NVIDIA's data sheets of the SXM modules,
dense (no sparsity); NVLink one way, over all links.

To the host's memory, one way: TPUs' rates are those of "How to Scale Your Model" (Austin et al.
2025, part 2), GPUs' of PCIe with 16 lanes (A100 gen4, others gen5), GH200's of NVLink-C2C. How much
memory there is: that of Google Cloud's machine types over their chips, of NVIDIA's DGX over eight,
GH200's own.
"""

from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator, as it is allocated and paid for."""

    usable_hbm: int  # bytes that a program may take; the runtime keeps the rest
    flops: float  # bf16 FLOP/s
    int8_ops: float  # int8 op/s; of a chip without int8 units its bf16 FLOP/s
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one link, one way
    host_memory: float  # bytes
    host_bandwidth: float | None  # bytes/s one way; None is not published
    torus_axes: int = 0  # dimensions of the interconnect; 0 means all chips hang on one switch
    jax_devices: int = 1  # devices that JAX sees in one chip


def _tpu(gib: float) -> int:
    return int((gib - 0.25) * GiB)  # libtpu refuses programs above 15.75 GiB on v5e


def _gpu(gb: float) -> int:
    return int(gb * 0.95e9)  # XLA_PYTHON_CLIENT_MEM_FRACTION=.95, beside the CUDA context


TPUS: dict[str, Chip] = {
    "v4": Chip(_tpu(32), 275e12, 275e12, 1228e9, 50e9, 100e9, 16e9, torus_axes=3),
    "v5e": Chip(_tpu(16), 197e12, 394e12, 819e9, 50e9, 48e9, 16e9, torus_axes=2),
    "v5p": Chip(_tpu(95), 459e12, 918e12, 2765e9, 100e9, 112e9, 16e9, torus_axes=3),
    "v6e": Chip(_tpu(32), 918e12, 1836e12, 1640e9, 100e9, 176e9, 32e9, torus_axes=2),
    "tpu7x": Chip(
        _tpu(192), 2307e12, 2307e12, 7380e9, 100e9, 240e9, None, torus_axes=3, jax_devices=2
    ),
}
GPUS: dict[str, Chip] = {
    "a100": Chip(_gpu(80), 312e12, 624e12, 2039e9, 300e9, 250e9, 32e9),
    "h100": Chip(_gpu(80), 989e12, 1979e12, 3350e9, 450e9, 250e9, 64e9),
    "gh200": Chip(_gpu(96), 989e12, 1979e12, 4000e9, 450e9, 480e9, 450e9),
    "h200": Chip(_gpu(141), 989e12, 1979e12, 4800e9, 450e9, 250e9, 64e9),
    "b200": Chip(_gpu(180), 2250e12, 4500e12, 8000e9, 900e9, 250e9, 64e9),
}
