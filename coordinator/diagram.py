"""`python -m coordinator.diagram [FILE]` draws the state diagrams of the protocol from its tables, in Mermaid.

It replaces what stands between the markers in docs/protocol.md, or in FILE. A test asks that the file is current.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.member import LOCAL, REMOTE, State
from coordinator.messages import NodeMessage
from coordinator.run import TABLE, Phase
from coordinator.table import Row

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"

Rows = Mapping[tuple[Any, type], Row[Any, Any]]


def coordinator_diagram() -> str:
    """The phases of `run.Run`. An arrow names the events that may lead along it."""
    return _diagram(Phase, [(TABLE, "{}")], Phase.JOINING, (Phase.FINISHED,))


def member_diagram() -> str:
    """The states of `member.Member`. An arrow names what this node says ("says Ready"), hears, or notices."""
    said = {key: row for key, row in LOCAL.items() if issubclass(key[1], NodeMessage)}
    noticed = {key: row for key, row in LOCAL.items() if key not in said}
    return _diagram(State, [(said, "says {}"), (REMOTE, "hears {}"), (noticed, "{}")], State.NEW, (State.GONE,))


def with_diagrams(page: str) -> str:
    """`page` with both diagrams between their markers."""
    for name, diagram in (("coordinator", coordinator_diagram()), ("member", member_diagram())):
        begin, end = f"<!-- {name} diagram -->\n", f"<!-- end of {name} diagram -->\n"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"the page has no markers for the {name} diagram"
        page = f"{before}{begin}```mermaid\n{diagram}```\n{end}{after}"
    return page


def _diagram(
    phases: type[enum.Enum], tables: Sequence[tuple[Rows, str]], first: enum.Enum, last: Sequence[enum.Enum]
) -> str:
    arrows: dict[tuple[enum.Enum, enum.Enum], list[str]] = {}
    for table, label in tables:
        for (phase, kind), row in table.items():
            for following in row.leads_to - {phase}:
                arrows.setdefault((phase, following), []).append(label.format(kind.__name__))
    order = list(phases)
    lines = ["stateDiagram-v2", *(f"    {phase.name}: {phase.name}<br/>{phase.value}" for phase in order)]
    lines.append(f"    [*] --> {first.name}")
    for phase, following in sorted(arrows, key=lambda arrow: [order.index(end) for end in arrow]):
        lines.append(f"    {phase.name} --> {following.name}: {', '.join(arrows[phase, following])}")
    lines += [f"    {phase.name} --> [*]" for phase in last]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Write the page anew."""
    path = Path(arguments[0]) if arguments else PAGE
    path.write_text(with_diagrams(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
