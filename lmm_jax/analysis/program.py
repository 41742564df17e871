"""What a program does on its devices: its FLOPs, from the jaxpr, and its collectives, from the compiled text.

XLA's own cost analysis counts the body of a loop once, so both are counted here, loops as often as they turn.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}


def flops(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all matrix products and convolutions of a program on all its devices; of branches the dearest.

    A loop of unknown length counts once; so does the body of a kernel for each turn of its grid. What no result needs does not
    count: backward passes hold some, which XLA drops.
    """
    return _flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _flops(jaxpr: core.Jaxpr) -> float:
    return sum(_equation_flops(eqn) for eqn in jaxpr.eqns)


def _equation_flops(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / features
    inner = [_flops(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return times * sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for found in value if isinstance(value, (tuple, list)) else (value,):
            found = getattr(found, "jaxpr", found)
            if isinstance(found, core.Jaxpr):
                yield found


def dependent_bytes(jaxpr: core.Jaxpr, first: int) -> float:
    """Bytes of the results that depend on the first so many arguments, each result once and no argument itself."""
    dependent = set(jaxpr.invars[:first])
    for eqn in jaxpr.eqns:
        if any(isinstance(v, core.Var) and v in dependent for v in eqn.invars):
            dependent.update(eqn.outvars)
    kept = {v for v in jaxpr.outvars if isinstance(v, core.Var) and v in dependent} - set(jaxpr.invars)
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange among groups of devices.

    Attributes:
      kind: one of COLLECTIVES.
      group: devices that exchange with each other.
      received: bytes that each of them receives at least, over all turns of loops.
      count: how often.
    """

    kind: str
    group: int
    received: float
    count: int


def collectives(text: str) -> list[Collective]:
    """The exchanges of a compiled program (`jax.stages.Compiled.as_text`), summed by kind and size of group."""
    bodies, entry = _computations(text)
    everyone = re.search(r"(?:num_partitions|replica_count)=(\d+)", text)
    devices = int(everyone[1]) if everyone else 1
    found: dict[str, tuple[str, int, float, int]] = {}
    for body, times in _turns(bodies, entry).items():
        for line in bodies[body]:
            match = re.match(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([a-z\-]+)\(", line)
            if match and match[3].removesuffix("-start") in COLLECTIVES:
                # a TPU may spread one exchange over several fusions, each of which then names it
                channel = re.search(r"channel_id=\d+", line)
                key, group = channel[0] if channel else match[1], _group(line) or devices
                kind = match[3].removesuffix("-start")
                times = max(times, found[key][3]) if key in found else times
                found[key] = kind, group, _bytes(match[2], match[3]), times
    sums: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for kind, group, size, times in found.values():
        part = {"all-gather": 1 - 1 / group, "all-reduce": 2 - 2 / group, "reduce-scatter": group - 1.0}
        part |= {"all-to-all": 1 - 1 / group, "collective-permute": 1.0}
        total = sums[kind, group]
        total[0] += times * size * part[kind]
        total[1] += times
    return [Collective(kind, group, received, int(n)) for (kind, group), (received, n) in sorted(sums.items())]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of each computation, and which is the entry."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:  # until the next head: the text of a kernel may hold any brackets
            bodies[name].append(line)
    return bodies, entry


def _turns(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs; a loop of unknown length turns once."""
    turns: dict[str, int] = collections.Counter()
    one = r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    several = r"(?:calls|called_computations|branch_computations)=\{([^}]*)\}"

    def visit(name: str, times: int) -> None:
        turns[name] += times
        for line in bodies[name]:
            called = re.findall(one, line)
            called += [("", name.strip(" %")) for names in re.findall(several, line) for name in names.split(",")]
            called = [(key, other) for key, other in called if other in bodies]
            trips = _trips(line, bodies.get(dict(called).get("condition", ""), []))
            for key, other in called:
                visit(other, times * (trips if key == "body" else 1))

    visit(entry, 1)
    return turns


def _trips(line: str, condition: list[str]) -> int:
    """Turns of a loop: as the compiler notes them, else the number that its condition compares a counter from 0 with."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    numbers = [int(n) for other in condition for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", other)]
    return numbers[0] if len(numbers) == 1 and any("direction=LT" in other for other in condition) else 1


def _group(line: str) -> int:
    """Devices of a group: {{0,1},{2,3}}, [2,4]<=[8], mesh['a'=2,'b'=4] {'b'}, a part of an axis {'b':(1)2}, a pair; 0: all."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if meshed := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return 2 if "source_target_pairs" in line else 0


def _bytes(shapes: str, operation: str) -> float:
    """Of the arrays that an exchange gives; one that only starts it may tell its arguments first, and counters last."""
    sizes = []
    for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shapes):
        bits = _BITS.get(dtype) or int(re.match(r"[a-z]+(\d+)", dtype)[1])  # type: ignore[index]
        sizes.append(math.prod(int(n) for n in dims.split(",") if n) * bits / 8)
    if operation == "collective-permute-start":
        return max(sizes, default=0)
    if operation.endswith("-start") and operation != "all-reduce-start":
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)
