"""Reading a compiled program's text: which collectives it runs, how often, and on how many bytes."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "token": 0, "bf16": 16} | {f"{t}{n}": n for t in "suf" for n in (4, 8, 16, 32, 64)}
_BITS |= {"c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$")
_INSTRUCTION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_SCOPE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective instruction. bytes: of its result, on one device; count: runs in a program run."""

    kind: str
    bytes: int
    count: int
    scope: str  # the operation's name in jax, e.g. jit(train_step)/jvp(online)/...


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program's text (`compiled.as_text()`), with how often each runs.

    A loop whose number of turns the compiler does not know counts as one turn.
    """
    bodies = dict(_computations(text))
    times = _times(bodies, next((name for name in bodies if name.startswith("ENTRY ")), ""))
    return [
        found._replace(count=times[name])
        for name, lines in bodies.items()
        for found in map(_collective, lines)
        if found and times[name]
    ]


def totals(
    found: list[Collective], group: Callable[[Collective], str]
) -> dict[str, dict[str, int]]:
    """{group: {'count', 'bytes'}} of the whole program."""
    sums: dict[str, dict[str, int]] = {}
    for one in sorted(found, key=group):
        total = sums.setdefault(group(one), {"count": 0, "bytes": 0})
        total["count"] += one.count
        total["bytes"] += one.count * one.bytes
    return sums


def aliased_outputs(text: str) -> set[int]:
    """Numbers of the outputs that take over the memory of an argument: donation that took effect."""
    header = text.split("\n", 1)[0]
    return {int(number) for number in re.findall(r"\{(\d+)\}: \(\d+, \{[\d, ]*\}, \w+-alias\)", header)}


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and instructions of each computation; the first one to run is called 'ENTRY name'."""
    name, lines = "", []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            name, lines = ("ENTRY " if head[1] else "") + head[2], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _times(bodies: dict[str, list[str]], entry: str) -> Counter:
    """How often each computation runs."""
    times: Counter = Counter()

    def visit(name: str, turns: int) -> None:
        times[name] += turns
        for line in bodies.get(name, ()):
            trips = _TRIPS.search(line) if " while(" in line else None
            for one, several in _CALLED.findall(line):
                for called in (one, *re.findall(r"[\w.\-]+", several)):
                    if called in bodies:
                        visit(called, turns * (int(trips[1]) if trips else 1))

    visit(entry, 1)
    return times


def _collective(line: str) -> Collective | None:
    found = _INSTRUCTION.search(line)
    if not found:
        return None
    sizes = [_bytes(*shape) for shape in _SHAPE.findall(found["shape"])]
    # An asynchronous start gives (operands, results); that of an all-reduce the results alone.
    if found["start"] and found["kind"] != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    scope = _SCOPE.search(line)
    return Collective(found["kind"], sum(sizes), 1, scope[1] if scope else "")


def _bytes(dtype: str, sides: str) -> int:
    count = 1
    for side in filter(None, sides.split(",")):
        count *= int(side)
    return count * _BITS.get(dtype, 32) // 8
