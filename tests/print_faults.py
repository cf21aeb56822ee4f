"""Prints the table that `make faults` collects: fault, what happened, lost steps, exit code."""

import json
import sys
from pathlib import Path

NAMES = {"fault": "fault", "happened": "what happened", "lost_steps": "lost steps", "exit_code": "exit code"}


def table(rows: list[dict]) -> str:
    """Markdown, a line a fault in alphabetical order."""
    cells = [[str("-" if row.get(name) is None else row[name]) for name in NAMES] for row in rows]
    lines = [list(NAMES.values()), ["---"] * len(NAMES), *sorted(cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(table([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []))
