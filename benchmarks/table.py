"""Print a result file as the README's Markdown table: `python -m benchmarks.table benchmarks/results/int8.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """Return a table of a benchmark's rows; rows that could not run say why."""
    peer = result.get("peer")
    head = ["problem", "tier", "step", "GOP/s", "% of peak", "vs our f32"]
    head += [f"vs {peer['name']} {peer['version']}"] if peer else []
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for row in result["rows"]:
        if "why_not" in row:
            lines.append([row["case"], row["tier"], "not on this host", *["-"] * (len(head) - 3)])
            continue
        ours = row["ours"]
        cells = [row["case"], row["tier"], "+".join(ours["chains"]), _cell(ours["gops"], ".0f")]
        cells += [_cell(ours["pct_peak"], ".0f"), _cell(row["vs_f32"], ".2f")]
        lines.append(cells + ([_cell(row["vs_peer"], ".2f")] if peer else []))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
