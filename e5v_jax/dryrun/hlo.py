"""Bytes that a compiled program moves, read from its HLO text with every loop counted.

``cost_analysis()`` of a compiled program counts the body of a loop once; here the program is walked
from its entry, and what is inside a loop counts as often as the loop runs.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
# [ROOT] %name = type opcode(arguments), attributes; no type has a word and a bracket behind a space
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(, .*|\s*)$")
_HEADER = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations)=(%[\w.-]+|\{[^}]*\})")
_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
_COLLECTIVES |= {"collective-permute", "collective-broadcast"}
# These name, hold or pass values on; the bytes are moved by who makes or uses them.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
_FREE |= {"conditional", "after-all", "partition-id", "replica-id", "iota", "broadcast"}
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(eq=False)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    type: str  # with layouts
    arguments: str
    attributes: str
    operands: list["Instruction"]
    called: dict[str, list["Computation"]]  # by the attribute that names it: calls, body, ...
    users: list["Instruction"] = field(default_factory=list)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the result."""
        return type_bytes(self.type)

    @cached_property
    def hbm_bytes(self) -> int:
        """Bytes of the result in main memory; S(1) and above are on-chip memories."""
        return type_bytes(self.type, main_memory=True)

    @property
    def to_host(self) -> list["Instruction"]:
        """What is moved, as the device has it, where a transfer to the host or from it begins."""
        if not self.opcode.endswith("-start") or "S(5)" not in self.type:  # the host's memory
            return []
        if self.opcode == "dynamic-update-slice-start":
            return [self.operands[1]]
        return [user for user in self.users if user.opcode.endswith("-done")]

    @property
    def number(self) -> int | None:
        """The number of a parameter, or the value of an integer constant."""
        return int(self.arguments) if self.arguments.isdecimal() else None


@dataclass(eq=False)
class Computation:
    """A function of the program."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None  # what it returns

    @cached_property
    def parameters(self) -> dict[int | None, Instruction]:
        """Parameters by their numbers."""
        return {i.number: i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclass(frozen=True)
class Traffic:
    """What one device moves in one run of the program."""

    hbm_bytes: float  # read and written
    host_bytes: float  # to the host's memory and from there
    collective_bytes: dict[str, float]  # in and out over the interconnect, by kind of collective


def type_bytes(text: str, *, main_memory: bool = False) -> int:
    """Bytes of the arrays in an HLO type; with ``main_memory`` without those kept on chip."""
    bits = 0
    for width, dims, layout in _ARRAY.findall(text):
        if not (main_memory and re.search(r"S\([1-9]", layout)):
            bits += int(width or 8) * math.prod(int(n) for n in dims.split(",") if n)
    return bits // 8


def parse(text: str) -> Computation:
    """The entry of a module; what a line refers to stands above it."""
    computations: dict[str, Computation] = {}
    entry = current = Computation()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation()
            entry = current if header[1] else entry
        if found := _INSTRUCTION.match(line):
            is_root, name, kind, opcode, arguments, attributes = found.groups()
            operands = [current.instructions[n] for n in _NAME.findall(arguments)]
            called = {
                key: [computations[n] for n in _NAME.findall(names)]
                for key, names in _CALLED.findall(attributes)
            }
            instruction = Instruction(name, opcode, kind, arguments, attributes, operands, called)
            for operand in operands:
                operand.users.append(instruction)
            current.instructions[name] = instruction
            current.root = instruction if is_root else current.root
    return entry


def trip_count(loop: Instruction) -> int:
    """How often a while loop runs: as XLA says, or from its start to what it compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    conditions = list(loop.called["condition"])
    bounds = []
    for condition in conditions:  # grows
        for instruction in condition.instructions.values():
            if instruction.opcode == "constant" and instruction.number is not None:
                bounds.append(instruction.number)
            conditions += instruction.called.get("calls", [])
    return max(bounds, default=1) - _start(loop)


def _start(loop: Instruction) -> int:
    """The number that a loop counts from: above 0 if XLA has taken its first round out."""
    (initial,), (condition,) = loop.operands, loop.called["condition"]
    taken = [i for i in condition.instructions.values() if i.opcode == "get-tuple-element"]
    if len(taken) != 1 or initial.opcode != "tuple":
        return 0
    (index,) = re.findall(r"\bindex=(\d+)", taken[0].attributes)
    counter = initial.operands[int(index)]
    while counter.opcode == "copy":
        counter = counter.operands[0]
    return counter.number or 0 if counter.opcode == "constant" else 0


def _group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one group of a collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sides[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return explicit[1].count(",") + 1
    return devices


def _collective(instruction: Instruction, kind: str, devices: int) -> float:
    """Bytes one device receives in a collective, by the ring algorithm."""
    n = _group_size(instruction.attributes, devices)
    passed = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    passed |= {"reduce-scatter": (n - 1) / n, "all-to-all": (n - 1) / n}
    return sum(operand.bytes for operand in instruction.operands) * passed.get(kind, 1)


def _fusion_bytes(fusion: Instruction) -> float:
    """Bytes a fusion reads and writes: of a sliced operand the slice, of an update its part."""
    (inner,) = fusion.called["calls"]
    total = 0.0
    for number, source in enumerate(fusion.operands):
        if source.hbm_bytes:
            total += min(source.hbm_bytes, _read_bytes(inner.parameters[number]))
    if fusion.hbm_bytes:
        total += min(fusion.hbm_bytes, _written_bytes(inner.root))
    return total


def _read_bytes(value: Instruction) -> float:
    """Bytes of a value inside a fusion that are read."""
    total = 0.0
    for user in value.users:
        if user.opcode in _SLICES and user.operands[0] is value:
            total += user.bytes
        elif user.opcode == "bitcast" or (user.users and _is_relayout(user)):
            total += _read_bytes(user)
        elif user.opcode == "fusion":  # one inside another: a sliced weight of a matmul, on v6e
            parameters = user.called["calls"][0].parameters
            total += sum(
                _read_bytes(parameters[number])
                for number, operand in enumerate(user.operands)
                if operand is value
            )
        elif user.opcode == "dynamic-update-slice" and user.operands[0] is value:
            continue  # in place
        else:
            return math.inf  # the whole of it: the caller takes the smaller
    return total


def _is_relayout(value: Instruction) -> bool:
    """Whether a value inside a fusion is its operand in another layout: no bytes of their own.

    So stacked 4-bit weights are before the slice of a layer is taken, as a fusion in place.
    """
    if value.opcode == "fusion":
        root = value.called["calls"][0].root
        return root is not None and root.opcode == "copy" and root.operands[0].opcode == "parameter"
    return value.opcode == "copy"


def _written_bytes(value: Instruction | None) -> float:
    """Bytes that a fusion writes which returns ``value``."""
    assert value is not None  # every computation has a root
    if value.opcode == "bitcast":
        return _written_bytes(value.operands[0])
    if value.opcode == "tuple":
        return sum(map(_written_bytes, value.operands))
    if value.opcode == "fusion":
        return _written_bytes(value.called["calls"][0].root)
    return value.operands[1].bytes if value.opcode == "dynamic-update-slice" else value.bytes


def _plain_bytes(instruction: Instruction) -> float:
    """Bytes of an instruction outside any fusion."""
    opcode, sources = instruction.opcode, instruction.operands
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if instruction.to_host:
        return sum(moved.hbm_bytes for moved in instruction.to_host)
    if opcode in ("copy-start", "slice-start"):
        # (destination, source, context), ((sources), destination, context): what arrives is read
        arrays = [array[0] for array in _ARRAY.finditer(instruction.type)]
        destination = arrays[opcode == "slice-start"]
        read = type_bytes(destination) if any(s.hbm_bytes for s in sources) else 0
        return read + type_bytes(destination, main_memory=True)
    if opcode in _SLICES:
        return (instruction.bytes if sources[0].hbm_bytes else 0) + instruction.hbm_bytes
    if opcode == "dynamic-update-slice":
        return 2 * sources[1].bytes if sources[0].hbm_bytes else 0.0
    return instruction.hbm_bytes + sum(source.hbm_bytes for source in sources)


def count_traffic(text: str, *, devices: int) -> Traffic:
    """Bytes moved by one device in one run of a compiled program, given its HLO text."""
    hbm = host = 0.0
    collectives: dict[tuple[str, str], float] = {}  # by kind and channel

    def walk(function: Computation, times: float, *, fused: bool) -> None:
        nonlocal hbm, host
        for instruction in function.instructions.values():
            opcode = instruction.opcode.removesuffix("-start")
            called = instruction.called
            if opcode in _COLLECTIVES:
                # an asynchronous collective shows in each fusion it runs beside: once is enough
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = (opcode, channel[1] if channel else instruction.name)
                moved = times * _collective(instruction, opcode, devices)
                collectives[key] = max(collectives.get(key, 0.0), moved)
            if opcode == "while":
                runs = times * trip_count(instruction)
                walk(called["body"][0], runs, fused=fused)
                walk(called["condition"][0], runs, fused=True)
                continue
            host += times * sum(moved.bytes for moved in instruction.to_host)
            if not fused:
                hbm += times * (_fusion_bytes if opcode == "fusion" else _plain_bytes)(instruction)
            inner = called.get("branch_computations", [])
            if opcode in ("fusion", "call", "async"):
                inner = called.get("calls") or called["to_apply"]
            for computation in inner:
                walk(computation, times, fused=fused or opcode == "fusion")

    walk(parse(text), 1.0, fused=False)
    by_kind: dict[str, float] = defaultdict(float)
    for (kind, _), moved in collectives.items():
        by_kind[kind] += moved
    return Traffic(hbm, host, dict(by_kind))
