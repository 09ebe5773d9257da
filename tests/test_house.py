"""The house: nothing imports upward, rows are what modules have, and a family is one line."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hf_models import TEXT_RECIPES, build_text

from e5v_jax import E5V
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.loading import abstract_model, dotted
from e5v_jax.families import FAMILIES, architectures
from e5v_jax.families.base import Family, Measured, ModelConfig
from e5v_jax.families.text import TEXT
from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.families.text.model import TextModel
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.nn.config import transformers_config
from e5v_jax.nn.layers import Build, LoRAConfig, Precision
from e5v_jax.nn.parameters import Parameter, ParameterTable, Section
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

PACKAGE = Path(__file__).parents[1] / "e5v_jax"
FLOORS = (  # from low to high; a file imports from its own floor and those below
    "exits",
    "storage",
    "atomic",
    "checksums",
    "cli",
    "distributed",
    "lock",
    "memory",
    "prompts",
    "presets",
    "sharding",
    "runtime",
    "nn",
    "data",
    "families",
    "checkpoints",
    "encode",
    "serve",
    "search",
    "evaluate",
    "train",
    "align",
    "dryrun",
    "demo",
    "integrations",
)


def floor_of(module: str) -> str | None:
    """``e5v_jax.train.loop`` is on the floor ``train``; other projects' modules are on none."""
    parts = module.split(".")
    return parts[1] if parts[0] == "e5v_jax" and len(parts) > 1 else None


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Every import of this project in a file, those inside functions too: (line, module)."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            if node.module == "e5v_jax":
                for name in node.names:  # E5V and __version__ are the package's own
                    module = "encode" if name.name == "E5V" else name.name
                    yield node.lineno, f"e5v_jax.{module}"
            else:
                yield node.lineno, node.module or ""


def test_nothing_imports_upward() -> None:
    upward = []
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":  # the package's own: it gives E5V, from the floor it is on
            continue
        if file.name == "__main__.py":  # a command stands above all floors, and nothing imports it
            continue
        for line, module in imports(file):
            assert not module.startswith("convert"), f"{file}:{line}: the package without convert/"
            floor = floor_of(module)
            if floor in (None, "__version__"):
                continue
            if FLOORS.index(floor) > FLOORS.index(own):
                upward.append(f"{file.relative_to(PACKAGE)}:{line} imports {module}")
    assert not upward
    assert {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in
            PACKAGE.rglob("*.py")} == {*FLOORS, "__init__"}  # fmt: skip


@pytest.mark.parametrize("name", architectures())
def test_rows_are_the_module(name: str) -> None:
    """Every array of the module has its row with its shape, and every row its array."""
    family, config = architectures()[name]
    runtime = Runtime.on(make_mesh())
    precision = Precision(np.float32, np.float32)
    lora = LoRAConfig(rank=2, alpha=1.0)
    model = abstract_model(family, config, Build(precision, runtime, lora))
    found = {dotted(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    expected: dict[str, tuple[int, ...]] = {}
    for path, row in family.parameters(config).by_path.items():
        stack = () if row.layers is None else (row.layers,)
        expected[path] = (*stack, *row.shape)
        if row.lora:
            base = path.removesuffix("kernel")
            expected[f"{base}lora_a"] = (*stack, row.shape[0], lora.rank)
            expected[f"{base}lora_b"] = (*stack, lora.rank, row.shape[1])
    assert found == expected


# A family in one place: decoders whose token embeddings are scaled by a learned factor.


@dataclasses.dataclass(frozen=True)
class ToyConfig(TextModelConfig):
    """A decoder that says "toy" in its configuration."""

    @classmethod
    def from_hf(cls, raw: dict[str, object]) -> "ToyConfig":
        return cls(TextModelConfig.from_hf({**raw, "model_type": "llama"}).text)


class ToyModel(TextModel):
    """A decoder with one more parameter."""

    def __init__(
        self, config: ModelConfig, build: Build, *, rngs: nnx.Rngs, load_vision: bool = True
    ) -> None:
        super().__init__(config, build, rngs=rngs)
        self.factor = nnx.Param(jax.numpy.ones((config.text.hidden_size,), build.precision.param))

    def decoder_inputs(self, batch: object) -> jax.Array:
        return super().decoder_inputs(batch) * self.factor[...]


class ToyProcessor(TextProcessor):
    """Texts by an even number of tokens, batched apart from those by an odd one."""

    def _measure(self, *arguments: object) -> Measured:
        measured = super()._measure(*arguments)  # type: ignore[arg-type]
        return dataclasses.replace(measured, shape_key=1 + measured.length % 2)


def toy_parameters(config: TextModelConfig) -> ParameterTable:
    table = TEXT.parameters(config)
    row = Parameter("factor", "factor", "factor", (config.text.hidden_size,), jax.P(None))
    factor = Section(prefixes=("toy.",), anchors=("factor",), export="toy.")
    return dataclasses.replace(
        table, rows=(*table.rows, row), sections={**table.sections, "factor": factor}
    )


TOY = Family(
    read_config=ToyConfig.from_hf,
    config_from_dict=ToyConfig.from_dict,
    build=ToyModel,
    parameters=toy_parameters,
    processor=ToyProcessor,
    example_batch=TEXT.example_batch,
)


def test_a_family_is_its_folder_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted, loaded and embedded like any other, without a change anywhere else."""
    import json

    import safetensors.numpy

    monkeypatch.setitem(FAMILIES, "toy", TOY)
    case = build_text(TEXT_RECIPES["llama"], tmp_path / "hf")
    sentences = ["A dog sits.", "Snow falls on the roofs.", "Two men play."]
    plain = E5V.from_pretrained(tmp_path / "hf", dtype="float32").encode(sentences)
    file = tmp_path / "hf" / "model.safetensors"
    size = transformers_config(case.torch_model.config.to_dict(), "llama").hidden_size
    for factor, equal in ((1.0, True), (1.5, False)):
        tensors = safetensors.numpy.load_file(file)
        tensors["toy.factor"] = np.full(size, factor, np.float32)
        safetensors.numpy.save_file(tensors, file, {"format": "pt"})
        raw = json.loads((tmp_path / "hf" / "config.json").read_text())
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**raw, "model_type": "toy"}))
        folder = tmp_path / f"toy-{factor}"
        convert(Args(str(tmp_path / "hf"), folder))
        assert ConvertedFolder(folder).info.model_type == "toy"
        model = E5V.from_pretrained(folder, dtype="float32")
        found = model.encode(sentences)
        assert np.allclose(found, plain, atol=1e-5) == equal
        assert {shape.shape_key for shape in model.statistics.compilations} <= {1, 2}
