"""A vision tower in an ONNX file, as transformers' own files have it.

The file is one that PyTorch's exporter wrote of a transformers model, alone or inside another. It
keeps the names of parameters and of the modules whose nodes use them. These are the rules:

- The prefix of the tower is what stands before the one initialiser whose name ends with
  ``embeddings.patch_embeddings.projection.weight`` (DINOv2) or
  ``embeddings.patch_embedding.weight`` (CLIP and SigLIP; ``embeddings.class_embedding`` is CLIP's).
- An initialiser that has the prefix is the parameter that the rest of its name says.
- The second input of a MatMul node is the weight of the module that the node's name says
  (``/backbone/encoder/layer.0/mlp/fc1/MatMul``), whatever its own name, and is transposed.
- What else has three axes under ``embeddings`` and no name are positions: all in one, or those of
  the class token, [1, 1, D], apart from those of the patches, [1, N, D].
- What the tower's nodes use besides is refused; what only others use belongs to another model.

What no shape shows is read from the nodes of the first block: the size of a head from the Reshape
behind the queries, the epsilon from the norm, the activation from the operators of the MLP.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from e5v_jax.checkpoints.safetensors_file import DTYPES
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.nn.vision_config import CLIP, DINOV2, SIGLIP

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto


class _Names(NamedTuple):
    """How transformers calls parts of a tower."""

    patch: str
    block: str  # the first one
    query: str
    norm: str
    positions: str


_NAMES = (
    _Names(
        patch="embeddings.patch_embeddings.projection.weight",
        block="encoder.layer.0.",
        query="attention.attention.query.",
        norm="norm1.",
        positions="embeddings.position_embeddings",
    ),
    _Names(
        patch="embeddings.patch_embedding.weight",
        block="encoder.layers.0.",
        query="self_attn.q_proj.",
        norm="layer_norm1.",
        positions="embeddings.position_embedding.weight",
    ),
)
_RENAMED = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}
"""DINOv2's modules in transformers since 5.24, and what its files call them in any."""
_DTYPES = {1: "F32", 10: "F16", 16: "BF16"}
"""Those of weights, by ONNX's numbers."""


class OnnxTower:
    """The tensors of a tower under transformers' names, and the configuration that they have."""

    def __init__(self, path: Path) -> None:
        """Read the file and find the tower in it.

        Raises:
            ImportError: the package onnx is not installed.
            ValueError: no ONNX file, or a damaged one.
            UnsupportedModelError: no tower or none by the rules above; names what is off.
        """
        self.path, graph = path, _read(path)
        self._weights = {
            x.name: x for x in graph.initializer if x.data_type in _DTYPES and _size(x) > 1
        }
        self._nodes: list[tuple[str, NodeProto]] = [(_module(node), node) for node in graph.node]
        self._numbers = _numbers(graph)
        self._names, self._prefix = self._find()
        self.others: set[str] = set()
        """The first parts of the names of what belongs to other models in the file."""
        self._parts: dict[str, tuple[TensorProto, ...]] = {}
        self._transposed: set[str] = set()
        self._collect()
        self.config = self._config()
        """The fields of transformers' configuration, ``model_type`` among them."""
        self.image_size = self._image_size(graph) or self.config["image_size"]
        """The side of the images, in pixels, for which the file was made."""

    def keys(self) -> list[str]:
        """The names of the parameters, such as ``encoder.layer.0.norm1.weight``."""
        return list(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, as torch has it."""
        first, *others = (tuple(x.dims) for x in self._parts[key])
        if key in self._transposed:
            return first[::-1]
        for other in others:  # positions in two
            first = (first[0], first[1] + other[1], *first[2:])
        return first

    def dtype(self, key: str) -> np.dtype[Any]:
        """Dtype of one tensor."""
        return DTYPES[_DTYPES[self._parts[key][0].data_type]]

    def read(self, key: str) -> np.ndarray:
        """One tensor, as torch has it."""
        from onnx.numpy_helper import to_array

        arrays = [np.asarray(to_array(x)) for x in self._parts[key]]
        if key in self._transposed:
            return np.ascontiguousarray(arrays[0].T)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(f"{self.path}: {reason}")

    def _find(self) -> tuple[_Names, str]:
        found = [
            (names, name.removesuffix(names.patch))
            for names in _NAMES
            for name, tensor in self._weights.items()
            if re.search(rf"(^|\.){re.escape(names.patch)}$", name) and len(tensor.dims) == 4
        ]
        if len(found) != 1:
            what = "no" if not found else f"{len(found)} times"
            wanted = " or ".join(names.patch for names in _NAMES)
            has = min(self._weights, default="none")
            self._refuse(
                f"{what} initialiser {wanted}: expected one DINOv2, CLIP or SigLIP tower under "
                f"transformers' names (this file has {has} and {len(self._weights)} in all)"
            )
        return found[0]

    def _collect(self) -> None:
        """Give each weight that a node uses its name."""
        inside = self._prefix
        positions: list[TensorProto] = []
        for module, node in self._nodes:
            for place, name in enumerate(node.input):
                if (tensor := self._weights.get(name)) is None:
                    continue
                if not (module.startswith(inside) or name.startswith(inside)):
                    self.others.add((module or name).partition(".")[0])
                elif node.op_type == "MatMul" and place == 1 and module.startswith(inside):
                    key = f"{module.removeprefix(inside)}weight"
                    self._parts[key] = (tensor,)
                    self._transposed.add(key)
                elif name.startswith(inside) and not name.startswith("onnx::"):
                    key = _renamed(name).removeprefix(inside)
                    self._parts.setdefault(key, (tensor,))
                elif module == f"{inside}embeddings." and len(tensor.dims) == 3:
                    if tensor not in positions:
                        positions.append(tensor)
                else:
                    self._refuse(f"{node.name or node.op_type}: {name} has no name of a parameter")
        if positions:
            positions.sort(key=lambda x: x.dims[1])
            shapes = [list(x.dims) for x in positions]
            if len(shapes) > 2 or (len(shapes) == 2 and shapes[0][1] != 1):
                self._refuse(f"{inside}embeddings: cannot tell positions from {shapes}")
            self._parts[self._names.positions] = tuple(positions)

    def _config(self) -> dict[str, Any]:
        patch, block = self._names.patch, self._names.block
        wanted = (patch, self._names.positions, f"{block}mlp.fc1.bias")
        for key in wanted:
            if key not in self._parts:
                self._refuse(f"{self._prefix}{key}: no initialiser has this name, and no node")
        (width, _, _, size), rows = self.shape(patch), self.shape(wanted[1])[-2]
        is_dinov2, is_clip = self._names is _NAMES[0], "embeddings.class_embedding" in self._parts
        side = math.isqrt(rows - (is_dinov2 or is_clip))
        blocks = re.compile(rf"{re.escape(block[:-2])}(\d+)\.")
        numbers = {int(found[1]) for key in self._parts if (found := blocks.match(key))}
        config = {
            "hidden_size": width,
            "num_hidden_layers": max(numbers) + 1,
            "num_attention_heads": width // self._head_dim(width),
            "image_size": side * size,  # of the positions
            "patch_size": size,
            "layer_norm_eps": self._epsilon(),
            "hidden_act": self._activation(),
        }
        (inner,) = self.shape(wanted[2])
        if not is_dinov2:
            config |= {"model_type": CLIP if is_clip else SIGLIP, "intermediate_size": inner}
            if not is_clip:
                config["vision_use_head"] = "head.probe" in self._parts
            return config
        config["mlp_ratio"] = inner // width if inner % width == 0 else inner / width
        config["qkv_bias"] = f"{block}{self._names.query}bias" in self._parts
        config["use_mask_token"] = "embeddings.mask_token" in self._parts
        return {"model_type": DINOV2, **config}

    def _within(self, module: str) -> Iterator["NodeProto"]:
        """The nodes of a module of the first block and of those inside it."""
        start = f"{self._prefix}{self._names.block}{module}"
        return (node for name, node in self._nodes if name.startswith(start))

    def _head_dim(self, width: int) -> int:
        outputs = {name for node in self._within(self._names.query) for name in node.output}
        for _, node in self._nodes:
            if node.op_type == "Reshape" and node.input[0] in outputs:
                numbers = self._numbers.get(node.input[1], [None])
                size = numbers[-1] if numbers else None
                if isinstance(size, int) and size > 0 and width % size == 0:
                    return size
        where = f"{self._prefix}{self._names.block}{self._names.query}"
        self._refuse(f"{where[:-1]}: no Reshape behind it says how wide a head is")

    def _epsilon(self) -> float:
        for node in self._within(self._names.norm):
            if node.op_type == "LayerNormalization":
                given = [x.f for x in node.attribute if x.name == "epsilon"]
                return _short(given[0] if given else 1e-5)
            if node.op_type == "Add":
                for name in node.input:
                    if (value := self._numbers.get(name)) and isinstance(value[0], float):
                        return _short(value[0])
        self._refuse(f"{self._prefix}{self._names.block}{self._names.norm[:-1]}: no epsilon in it")

    def _activation(self) -> str:
        nodes = list(self._within("mlp."))
        operators = {node.op_type for node in nodes}
        if "Gelu" in operators:
            tanh = any(x.s == b"tanh" for n in nodes for x in n.attribute if n.op_type == "Gelu")
            return "gelu_pytorch_tanh" if tanh else "gelu"
        constants = [self._numbers.get(name, [None])[0] for n in nodes for name in n.input]
        factors = [_short(x) for x in constants if isinstance(x, float)]
        if "Sigmoid" in operators and 1.702 in factors:
            return "quick_gelu"
        for operator, name in (("Erf", "gelu"), ("Tanh", "gelu_pytorch_tanh")):
            if operator in operators:
                return name
        has = ", ".join(sorted(operators))
        self._refuse(f"{self._prefix}{self._names.block}mlp: no known activation among {has}")

    def _image_size(self, graph: "GraphProto") -> int | None:
        """The side of the images, where the file fixes it."""
        for value in graph.input:
            sizes = [x.dim_value for x in value.type.tensor_type.shape.dim]
            if len(sizes) == 4 and sizes[1] == 3 and sizes[2] == sizes[3] and sizes[2] > 0:
                return int(sizes[2])
        return None


def _read(path: Path) -> "GraphProto":
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"{path}: reading ONNX needs a package: pip install onnx") from error
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's and onnx's own, of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged, or no ONNX file ({reason}); fetch it again") from error
    if not graph.node:
        raise ValueError(f"{path}: damaged, or no ONNX file (no node in it); fetch it again")
    return graph


def _size(tensor: "TensorProto") -> int:
    return math.prod(tensor.dims)


def _module(node: "NodeProto") -> str:
    """The module whose node this is: ``backbone.encoder.layer.0.norm1.``, or nothing."""
    path = node.name.strip("/").rpartition("/")[0]
    return _renamed(f"{path.replace('/', '.')}.") if path else ""


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def _numbers(graph: "GraphProto") -> dict[str, list[Any]]:
    """Small constants by name, None for what is only known when the graph runs."""
    from onnx.numpy_helper import to_array

    found = {x.name: to_array(x).ravel().tolist() for x in graph.initializer if _size(x) <= 8}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            if _size(node.attribute[0].t) <= 8:
                found[node.output[0]] = to_array(node.attribute[0].t).ravel().tolist()
        elif node.op_type == "Concat":  # of a shape
            found[node.output[0]] = [x for name in node.input for x in found.get(name, [None])]
    return found


def _short(value: float) -> float:
    """The shortest number that has this value in fp32: 1e-06 of 9.999999974752427e-07."""
    return float(str(np.float32(value)))
