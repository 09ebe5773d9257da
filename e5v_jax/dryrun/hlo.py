"""Bytes that a compiled program moves, read from its HLO text with every loop counted.

``cost_analysis()`` of a compiled program counts the body of a loop once; here the program is walked
from its entry, and what is inside a loop counts as often as the loop runs.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%([\w.-]+) \(")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These name, hold or pass values on; the bytes are moved by who makes or uses them.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
_FREE |= {"conditional", "after-all", "partition-id", "replica-id", "iota", "broadcast"}


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    type: str  # with layouts
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The computation that attribute ``name`` names."""
        found = re.search(rf"\b{name}=%([\w.-]+)", self.attributes)
        return found and found[1]

    @cached_property
    def hbm_bytes(self) -> int:
        """Bytes of the result in main memory; S(1) and above are on-chip memories."""
        return type_bytes(self.type, main_memory=True)


@dataclass
class Computation:
    """A function of the program."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that take each value."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Name of each parameter by its number."""
        return {
            int(i.attributes.split(")")[0].split(",")[0]): i.name
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions.values() if i.is_root)


@dataclass(frozen=True)
class Traffic:
    """What one device moves in one run of the program."""

    hbm_bytes: float  # read and written
    collective_bytes: dict[str, float]  # in and out over the interconnect, by kind of collective


def type_bytes(text: str, *, main_memory: bool = False) -> int:
    """Bytes of the arrays in an HLO type; with ``main_memory`` without those kept on chip."""
    bits = 0
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype not in _BITS or (main_memory and re.search(r"S\([1-9]", layout)):
            continue
        size = 1
        for n in dims.split(","):
            size *= int(n) if n else 1
        bits += size * _BITS[dtype]
    return bits // 8


def _balanced(text: str, start: int) -> int:
    """Index behind the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced brackets in HLO: {text[:80]}")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a module by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and line.rstrip().endswith("{"):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if current is None or found is None:
            continue
        rest = line[found.end() :]
        end = _balanced(rest, 0) if rest[0] == "(" else rest.index(" ")
        kind, rest = rest[:end], rest[end:].lstrip()
        bracket = rest.index("(")
        close = _balanced(rest, bracket)
        inside = rest[bracket:close]
        current.instructions[found[2]] = Instruction(
            name=found[2],
            opcode=rest[:bracket],
            type=kind,
            operands=tuple(re.findall(r"%([\w.-]+)", inside)),
            attributes=inside[1:-1] + rest[close:],
            is_root=found[1] is not None,
        )
    return computations, entry


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int:
    """How often a while loop runs: as XLA says, or the bound that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    names = [loop.attribute("condition")]
    bounds = []
    while names:
        for instruction in computations[names.pop() or ""].instructions.values():
            if instruction.opcode == "constant" and re.fullmatch(
                r"\d+", instruction.attributes.split(",")[0]
            ):
                bounds.append(int(instruction.attributes.split(",")[0]))
            if called := instruction.attribute("calls"):
                names.append(called)
    return max(bounds, default=1)


def _group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one group of a collective."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if mesh:
        sides = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        size = 1
        for name in re.findall(r"'(\w+)'", mesh[2]):
            size *= sides[name]
        return size
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return explicit[1].count(",") + 1
    return devices


def _collective(instruction: Instruction, computation: Computation, devices: int) -> float:
    """Bytes one device receives in a collective, by the ring algorithm."""
    n = _group_size(instruction.attributes, devices)
    operands = sum(
        type_bytes(computation.instructions[name].type)
        for name in instruction.operands
        if name in computation.instructions
    )
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-gather":
        return operands * (n - 1)
    if kind == "all-reduce":
        return 2 * operands * (n - 1) / n
    if kind in ("reduce-scatter", "all-to-all"):
        return operands * (n - 1) / n
    return operands


def _fusion_bytes(
    fusion: Instruction, caller: Computation, computations: dict[str, Computation]
) -> float:
    """Bytes a fusion reads and writes: of a sliced operand the slice, of an update its part."""
    inner = computations[fusion.attribute("calls") or ""]
    total = 0.0
    for number, operand in enumerate(fusion.operands):
        source = caller.instructions[operand]
        if source.hbm_bytes:
            read = _read_bytes(inner, inner.parameters[number], computations)
            total += min(source.hbm_bytes, read)
    if fusion.hbm_bytes:
        total += min(fusion.hbm_bytes, _written_bytes(inner, inner.root, computations))
    return total


def _read_bytes(inner: Computation, value: str, computations: dict[str, Computation]) -> float:
    total = 0.0
    for user in inner.users.get(value, []):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value:
            total += type_bytes(user.type)
        elif user.opcode == "bitcast":
            total += _read_bytes(inner, user.name, computations)
        elif user.opcode == "fusion":  # one inside another: a sliced weight of a matmul, on v6e
            called = computations[user.attribute("calls") or ""]
            for number, operand in enumerate(user.operands):
                if operand == value:
                    total += _read_bytes(called, called.parameters[number], computations)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value:
            continue  # in place
        else:
            return float("inf")  # the whole of it: the caller takes the smaller
    return total


def _written_bytes(
    inner: Computation, value: Instruction, computations: dict[str, Computation]
) -> float:
    while value.opcode == "bitcast" and value.operands[0] in inner.instructions:
        value = inner.instructions[value.operands[0]]
    if value.opcode == "tuple":
        return sum(
            _written_bytes(inner, inner.instructions[n], computations) for n in value.operands
        )
    if value.opcode == "fusion":
        called = computations[value.attribute("calls") or ""]
        return _written_bytes(called, called.root, computations)
    if value.opcode == "dynamic-update-slice":
        return type_bytes(inner.instructions[value.operands[1]].type)
    return type_bytes(value.type)


def _plain_bytes(instruction: Instruction, computation: Computation) -> float:
    """Bytes of an instruction outside any fusion."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    sources = [computation.instructions[n] for n in instruction.operands]
    if opcode in ("copy-start", "slice-start"):
        # (destination, source, context): only what arrives is read
        arrays = _ARRAY.finditer(instruction.type)
        destination = next(arrays)[0]
        if opcode == "slice-start":  # ((sources), destination, context)
            destination = next(arrays)[0]
        read = type_bytes(destination) if any(s.hbm_bytes for s in sources) else 0
        return read + type_bytes(destination, main_memory=True)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return (type_bytes(instruction.type) if sources[0].hbm_bytes else 0) + instruction.hbm_bytes
    if opcode == "dynamic-update-slice":
        return 2 * type_bytes(sources[1].type) if sources[0].hbm_bytes else 0.0
    return instruction.hbm_bytes + sum(s.hbm_bytes for s in sources)


def count_traffic(text: str, *, devices: int) -> Traffic:
    """Bytes moved by one device in one run of a compiled program, given its HLO text."""
    computations, entry = parse(text)
    hbm = 0.0
    collectives: dict[tuple[str, str], float] = {}  # by kind and channel

    def walk(name: str, times: float, *, fused: bool) -> None:
        nonlocal hbm
        computation = computations[name]
        for instruction in computation.instructions.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in _COLLECTIVES:
                # an asynchronous collective shows in each fusion it runs beside: once is enough
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = (opcode, channel[1] if channel else instruction.name)
                moved = times * _collective(instruction, computation, devices)
                collectives[key] = max(collectives.get(key, 0.0), moved)
            if opcode == "while":
                body, condition = instruction.attribute("body"), instruction.attribute("condition")
                runs = times * trip_count(instruction, computations)
                walk(body or "", runs, fused=fused)
                walk(condition or "", runs, fused=True)
                continue
            called = instruction.attribute("calls") or instruction.attribute("to_apply")
            if opcode == "fusion":
                if not fused:
                    hbm += times * _fusion_bytes(instruction, computation, computations)
                walk(called or "", times, fused=True)
                continue
            if not fused:
                hbm += times * _plain_bytes(instruction, computation)
            if called and opcode in ("call", "async"):
                walk(called, times, fused=fused)
            for branch in re.findall(
                r"%([\w.-]+)",
                (re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes) or [""])[-1],
            ):
                walk(branch, times, fused=fused)

    walk(entry, 1.0, fused=False)
    by_kind: dict[str, float] = {}
    for (kind, _), moved in collectives.items():
        by_kind[kind] = by_kind.get(kind, 0.0) + moved
    return Traffic(hbm, by_kind)
