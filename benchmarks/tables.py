"""Tables that benchmarks write as they go, as CSV and Markdown, and read back: a run may be stopped."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def earlier(file: Path, names: Sequence[str], texts: Sequence[str] = ()) -> dict[tuple[str, ...], Row]:
    """The rows that an earlier run wrote, by their columns `names`; numbers are numbers but in those and in `texts`."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        found = list(csv.DictReader(lines))
    rows = [{key: text if key in (*names, *texts) else float(text) for key, text in row.items() if text} for row in found]
    return {tuple(row.get(name, "") for name in names): row for row in rows}


def write(folder: Path, name: str, head: Sequence[str], rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> None:
    """Write `rows` to <folder>/<name>.csv and, behind the lines of `head`, to <name>.md.

    Args:
        columns: By the key in a row: heading, and format of numbers.
    """

    def cell(row: Row, key: str) -> str:
        return "" if row.get(key) is None else format(row[key], columns[key][1])

    lines = ["| " + " | ".join(heading for heading, _ in columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row, key) for key in columns) + " |" for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join([*head, "", *lines, ""]), encoding="utf-8")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
