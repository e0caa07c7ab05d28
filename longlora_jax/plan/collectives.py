"""What a compiled program sends between devices, read from its text: operation, mesh axes, bytes.

The text is XLA's HLO (`compiled.as_text()`); an operation in a loop counts as often as the loop turns.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_SIZES |= {"f64": 8, "s64": 8, "u64": 8}
_OPERATION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\((?P<rest>.*)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)")


class Collective(NamedTuple):
    """One operation of a program: op, the mesh axes that it goes over ("fsdp" or "fsdp+context"), the shapes and bytes
    of its result on one device, and how often it runs."""

    op: str
    axis: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int


def collectives(text: str, mesh: Mesh, shares: Sequence[float] = ()) -> list[Collective]:
    """Every collective of a compiled program's text, whose devices are those of the mesh in its order.

    shares: how much of the time each branch of a conditional with so many branches is taken: of a scan over layers of
    several kinds, the share of each kind. Of other conditionals every branch counts.
    """
    computations = _computations(text)
    times = _times(computations, shares)
    axes = _axes_of_groups(mesh)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            if not (match := _OPERATION.search(line)) or not times[name]:
                continue
            shape = match["shape"]
            if match["start"] and match["kind"] != "all-reduce":
                shape = _elements(shape)[1]  # (what is given, what comes back, context)
            parts = [
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
                if dtype in _SIZES
            ]
            size = sum(math.prod(shape) * _SIZES[dtype] for dtype, shape in parts)
            axis = _axis(match["rest"], mesh, axes)
            if not axis:
                continue
            origin = re.search(r'op_name="([^"]*)"', line)
            count = _count(times[name], origin[1].count("while/body") if origin else None)
            one = Collective(match["kind"], axis, tuple(s for _, s in parts), size, count)
            # TPUs spread one gather over several fusions, which share its channel.
            channel = re.search(r"channel_id=(\d+)", line)
            spread = channel and match["kind"] == "all-gather"
            key = f"{channel[1]} {match['shape']}" if channel and spread else f"{name} {line}"
            if key not in found or found[key].times < one.times:
                found[key] = one
    return list(found.values())


def totals(found: list[Collective]) -> list[dict]:
    """[{"op", "axis", "bytes"}] of a whole run of the program on one device, the largest first."""
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for one in found:
        sums[one.op, one.axis] += one.bytes * one.times
    rows = [{"op": op, "axis": axis, "bytes": size} for (op, axis), size in sums.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples: GPUs join several operations of a kind in one."""
    depth, found = 0, [""]
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation; the one that the program begins with is called ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line):
            lines = found.setdefault("ENTRY" if header[1] else header[2], [])
        else:
            lines.append(line)
    return found


def _count(calls: list[tuple[float, ...]], loops: int | None) -> int:
    """How often an operation runs that stands within so many loops of the program as it was written.

    What is written outside of a loop may be overlapped with it, piece by piece, and still runs once.
    """
    if loops is not None and any(len(turns) > loops for turns in calls):
        return round(max(math.prod(turns[:loops]) for turns in calls))
    return round(sum(map(math.prod, calls)))


def _times(computations: dict[str, list[str]], shares: Sequence[float]) -> dict[str, list[tuple[float, ...]]]:
    """The calls of each computation: of each, how often every loop around it turns, the outermost first.

    The share of a branch is a part of the turns of the loop around it.
    """
    times: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def visit(name: str, loops: tuple[float, ...]) -> None:
        times[name].append(loops)
        for line in computations.get(name, ()):
            turns = _turns(line, computations) if " while(" in line else 1
            for group in _CALLED.findall(line):
                names = group.replace(" ", "").split(",")
                taken = shares if " conditional(" in line and len(names) == len(shares) else [1] * len(names)
                for called, share in zip(names, taken, strict=True):
                    inside = (*loops, turns) if " while(" in line else loops
                    visit(called, (*inside[:-1], inside[-1] * share) if inside else inside)

    visit("ENTRY", ())
    return times


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """Turns of a while loop: as the compiler noted them, else the constant that its condition compares with."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=(%[\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    return max((int(n) for row in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", row)), default=1)


def _axes_of_groups(mesh: Mesh) -> dict[frozenset, str]:
    """{the groups of devices that differ along some axes alone: the names of those axes}."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [name for name, size in mesh.shape.items() if size > 1]
    found = {}
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            where = [mesh.axis_names.index(name) for name in chosen]
            groups = np.moveaxis(ids, where, range(-count, 0)).reshape(-1, math.prod(mesh.shape[n] for n in chosen))
            found[frozenset(map(frozenset, groups.tolist()))] = "+".join(chosen)
    return found


def _axis(attributes: str, mesh: Mesh, axes: dict[frozenset, str]) -> str:
    """The axes that an operation goes over, "?" for groups that are no axes', "" for groups of one device."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        moved = set()
        for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1]):
            here, there = (np.unravel_index(int(i), mesh.devices.shape) for i in (source, target))
            moved |= {name for name, a, b in zip(mesh.axis_names, here, there, strict=True) if a != b}
        return "+".join(name for name in mesh.axis_names if name in moved)
    groups = _groups(attributes, mesh.size)
    return axes.get(groups, "?") if any(len(group) > 1 for group in groups) else ""


def _groups(attributes: str, devices: int) -> frozenset:
    """replica_groups in its three spellings: {{0,1},{2,3}}, [2,2]<=[4] (turned: T(1,0)), mesh['a'=2,'b'=2] {'b'}."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[2])]
        ids = np.arange(devices).reshape(list(sizes.values()))
        groups = np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(
            -1, math.prod(list(sizes.values())[i] for i in chosen)
        )
    elif counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source = ([int(n) for n in text.split(",")] for text in counted.groups()[:2])
        ids = np.arange(devices).reshape(source)
        groups = (ids.transpose([int(n) for n in counted[3].split(",")]) if counted[3] else ids).reshape(shape)
    elif listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return frozenset(
            frozenset(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1])
        )
    else:
        groups = np.arange(devices)[None]
    return frozenset(map(frozenset, groups.tolist()))
