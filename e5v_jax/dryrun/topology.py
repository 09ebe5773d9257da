"""A slice of chips by name: ``v5e:4x8``, ``v5p:2x2x4``, ``gpu:h100:8``, ``cpu``."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jaxlib
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType

from e5v_jax.distributed import LIBTPU_INIT_ARGS
from e5v_jax.dryrun.chips import GPUS, TPUS, Chip
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import MESH_AXES, make_mesh, mesh_shape
from e5v_jax.train.config import MeshConfig

_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # it would ask a cloud, for a minute, which machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it would refuse while another process compiles
    "TPU_STDERR_LOG_LEVEL": "3",
    "LIBTPU_INIT_ARGS": LIBTPU_INIT_ARGS,  # as training has it
}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are connected."""

    name: str  # as given
    chip: Chip | None  # None: the CPU of this machine
    shape: tuple[int, ...]  # chips along each axis

    @property
    def chips(self) -> int:
        """How many chips there are."""
        return math.prod(self.shape)

    @property
    def platform(self) -> Literal["cpu", "gpu", "tpu"]:
        """What JAX calls it; only programs for CPUs and TPUs can be compiled here."""
        if self.chip is None:
            return "cpu"
        return "tpu" if self.chip.torus_axes else "gpu"

    @property
    def collective_bandwidth(self) -> float:
        """Bytes/s in or out of one chip in an all-gather or reduce-scatter over all of them.

        A ring along each axis of more than one chip sends both ways at once; all axes work at a
        time. Without wrap-around (a mesh, as small slices are) a chip at the end has one way
        only, and that is what the ring waits for: so each axis counts one link, not two. Axes of 16
        close to rings on v5e and v6e; on the others all do in slices of whole 4x4x4 cubes.
        """
        if self.chip is None or self.chips == 1:
            return math.inf
        if self.chip.torus_axes == 0:
            return self.chip.link_bandwidth
        cubes = len(self.shape) == 3 and all(side % 4 == 0 for side in self.shape)
        links = sum(2 if side == 16 or cubes else 1 for side in self.shape if side > 1)
        return links * self.chip.link_bandwidth


def parse_topology(name: str) -> Topology:
    """Read the name of a slice. Raises ValueError: no such chip, or not its number of axes."""
    if name == "cpu":
        return Topology(name, None, (1,))
    chips = GPUS if name.startswith("gpu:") else TPUS
    kind, _, sides = name.removeprefix("gpu:").partition(":")
    problem = "no such chip"
    if kind in chips:
        axes = chips[kind].torus_axes or 1
        if re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{axes - 1}}}", sides):
            return Topology(name, chips[kind], tuple(map(int, sides.split("x"))))
        example = {1: f"a number, gpu:{kind}:8", 2: f"2 axes, {kind}:4x8"}
        problem = f"{kind} chips have {example.get(axes, f'3 axes, {kind}:2x2x4')}"
    raise ValueError(
        f"topology {name!r}: {problem}; expected CHIP:SIDES such as v5e:4x8, with CHIP one of "
        f"{', '.join(TPUS)}; gpu:MODEL:COUNT with MODEL one of {', '.join(GPUS)}; or cpu"
    )


def open_runtime(topology: Topology, sizes: MeshConfig, *, compiles: bool = True) -> Runtime:
    """The runtime to compile for; for GPUs, which nothing here compiles for, one without devices.

    So it is where nothing is compiled. Raises ImportError, ValueError: as :func:`compile_devices`;
    the mesh does not fit.
    """
    if topology.platform == "gpu" or not compiles:
        shape = mesh_shape(sizes.data, sizes.fsdp, sizes.tensor, topology.chips)
        # as good as a Mesh to NamedSharding
        mesh: Any = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    else:
        mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices=compile_devices(topology))
    return Runtime(mesh, topology.platform)


def compile_devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for: they take programs, and run none (``cpu`` does run them).

    Raises ImportError: no libtpu, or not that of this jaxlib; ValueError: there is no such slice.
    """
    if topology.chip is None:
        return jax.devices("cpu")[:1]
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, tuple[int, ...] | str] = {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX has it on a v4
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:  # whatever libtpu has to say, of any class
        text = str(error)
        if "libtpu" in text.lower() or "not installed" in text:
            raise ImportError(
                f"compiling for a TPU needs the libtpu that goes with jaxlib {jaxlib.__version__}: "
                f"pip install 'jax[tpu]=={jax.__version__}' (or, in this checkout, pip install -e "
                "'.[tpu]')"
            ) from error
        raise ValueError(
            f"topology {topology.name!r}: libtpu knows no such slice: {text.splitlines()[0]}"
        ) from error
    return list(found.devices)
