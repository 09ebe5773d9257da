"""Reading and checking configurations, and that of the tower which families share."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, TypeVar, get_args

T = TypeVar("T")
LARGEST = 2**31 - 1
"""Of any number that counts something: what int32 holds."""
_LIMITS = {"num_hidden_layers": 1000, "rope_theta": 10**15}  # LARGEST for others, 1 for epsilons


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something this model does not compute; the message names it."""


def from_fields(
    cls: type[T], data: Any, name: str, parts: Mapping[str, Callable[[Any], Any]] | None = None
) -> T:
    """The dataclass ``cls`` of an object in a file, where it is ``name``.

    ``parts`` makes of some values what their fields hold. Raises ValueError: no object, a field is
    missing or one too many, or as ``cls`` and ``parts`` themselves.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{name} is {data!r}: expected an object")
    fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # any dataclass
    if missing := [field for field, required in fields.items() if required and field not in data]:
        raise ValueError(f"{name} has no {missing[0]!r}")
    if unknown := sorted(data.keys() - fields.keys()):
        raise ValueError(f"{name} has {unknown[0]!r}, which is not known")
    made = {field: make(data[field]) for field, make in (parts or {}).items() if field in data}
    return cls(**{**data, **made})


def check_numbers(config: Any, section: str = "") -> None:
    """Check that each field of a configuration has its type, and each number its range.

    Counts are from 1, ``rope_theta`` is too, epsilons are from 0 to 1; None is right where the type
    has it. Raises ValueError: names the field, in its ``section``.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if isinstance(kind, UnionType):
            if value is None:
                continue
            kind = get_args(kind)[0]
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{section}{field.name} is {value!r}: expected true or false")
        if kind is str and not isinstance(value, str):
            raise ValueError(f"{section}{field.name} is {value!r}: expected a string")
        if kind not in (int, float):
            continue
        low, high = (0, 1) if field.name.endswith("eps") else (1, LARGEST)
        high = _LIMITS.get(field.name, high)
        # a bool is an int to Python, and NaN is in no range
        if type(value) not in (int, kind) or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(
                f"{section}{field.name} is {value!r}: expected {what} from {low} to {high}"
            )


def check_multiple(config: Any, whole: str, part: str, section: str = "") -> None:
    """Check that one number divides another. Raises ValueError: names both."""
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{section}{whole} {getattr(config, whole)} is not a multiple of {part} "
            f"{getattr(config, part)}"
        )


def transformers_config(raw: dict[str, Any], model_type: str) -> Any:
    """The parsed ``config.json`` as transformers' own configuration of ``model_type``.

    Fields the file leaves out take the value of that class, which is what the file means:
    transformers writes only what differs.
    """
    import transformers  # takes a second, which what only imports this need not wait for

    # a copy: transformers completes the objects in it
    fields = copy.deepcopy({k: v for k, v in raw.items() if k != "model_type"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that old files have
        return transformers.AutoConfig.for_model(model_type, **fields)
