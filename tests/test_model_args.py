"""The flags that say which model and how it is loaded: the same for every command."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import e5v_jax
from e5v_jax import E5V
from e5v_jax.cli import UsageError
from e5v_jax.encode.model_args import ModelArgs
from e5v_jax.encode.options import Args
from e5v_jax.evaluate.config import AnalyseArgs, EvaluateConfig

COMMANDS = (Args, EvaluateConfig, AnalyseArgs)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_every_flag_with_its_default(command: type) -> None:
    found = {field.name: field for field in dataclasses.fields(command)}
    for field in dataclasses.fields(ModelArgs):
        assert found[field.name].type == field.type
        if field.name != "model":  # evaluate --compare needs none
            assert found[field.name].default == field.default


def test_help_loads_neither_jax_nor_transformers() -> None:
    code = (
        "import sys; import e5v_jax.evaluate.command, e5v_jax.encode.options; "
        "print(*{'jax', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_commands_say_nothing_of_a_missing_pytorch() -> None:
    """transformers tells everyone that models are not available; ours need none of its."""
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); "
        "import e5v_jax.cli, e5v_jax.checkpoints.from_hf"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fsdp": 0}, "--fsdp: 0, expected at least 1"),
        ({"tensor": -1}, "--tensor: -1, expected at least 1"),
        ({"template": "x"}, "--template: unknown 'x', expected one of llama3, mistral"),
    ],
)
def test_values_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelArgs(model="m", **change).check()


def test_a_mesh_that_the_devices_do_not_make() -> None:
    with pytest.raises(UsageError, match="mesh data=-1 fsdp=1 tensor=3 does not fit 2 devices"):
        ModelArgs(model="m", tensor=3).load(jax.devices()[:1] * 2)


def test_attention_that_the_devices_do_not_have() -> None:
    """Before the model is looked for: there is none."""
    for name in ("cudnn", "splash"):
        with pytest.raises(UsageError, match=f"attn_implementation '{name}' is for a [GT]PU, this"):
            ModelArgs(model="none", attn_implementation=name).load()
        with pytest.raises(ValueError, match=f"attn_implementation '{name}' is for a [GT]PU, this"):
            E5V.from_pretrained("none", attn_implementation=name)


def test_all_is_passed_on_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: dict[str, Any] = {}

    class Fake:
        @classmethod
        def from_pretrained(cls, path: str, **options: Any) -> "Fake":
            loaded.update(model=path, **options)
            return cls()

    monkeypatch.setitem(vars(e5v_jax), "E5V", Fake)
    args = ModelArgs(
        model="a/b",
        revision="v2",
        adapter=Path("run"),
        template="phi3",
        dtype="float16",
        quantize="nf4",
        attn_implementation="xla",
        verify=True,
    )
    assert isinstance(args.load(jax.devices()[:1]), Fake)
    assert dict(loaded.pop("mesh").shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert loaded.pop("verify")  # which changes no vector
    assert {**loaded, "adapter": "run"} == args.describe()
