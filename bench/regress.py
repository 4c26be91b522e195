"""What moved between two results of compare.py, beyond their noise.

    python bench/regress.py old.json new.json

Shares of the live peak are compared where both runs have them, else rates: shares do not move when
the machine's clock does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from report import markdown

DEVIATIONS = 4  # median absolute deviations of both runs together
LEAST_CHANGE = 0.02


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    old, new = (load(Path(argument)) for argument in sys.argv[1:])
    shared = [key for key in new if key in old]
    rows = [row for key in shared if (row := moved(key, old[key], new[key]))]
    print(f"{len(rows)} of {len(shared)} figures moved\n")
    if rows:
        header = [
            "candidate, direction, dtype, B, Hq, Hkv, Lq, Lk, D, Dv",
            "old",
            "new",
            "change",
            "noise",
        ]
        print(markdown(header, rows))


def load(path: Path) -> dict[str, dict]:
    """The timed measurements by what was measured."""
    measurements = json.loads(path.read_text())["measurements"]
    return {_label(m): m for m in measurements if m["seconds"]}


def _label(m: dict) -> str:
    case = m["case"]
    sizes = ", ".join(str(case[name]) for name in ("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv"))
    mask = " ".join(["causal" if case["causal"] else "full", case.get("option", "")]).rstrip()
    return f"{m['candidate']}, {case['direction']}, {case['dtype']}, {sizes} {mask}"


def moved(label: str, old: dict, new: dict) -> list[str] | None:
    """A row of the table, or None if the change is within the noise."""
    figure = "share" if old["share"] and new["share"] else "rate"
    change = new[figure] / old[figure] - 1
    noise = max(LEAST_CHANGE, DEVIATIONS * (old["spread"] + new["spread"]))
    if abs(change) <= noise:
        return None
    rates = [f"{m['rate'] / 1e9:.3g} {m['unit']}" for m in (old, new)]
    return [label, *rates, f"{change:+.0%}", f"{noise:.0%}"]


if __name__ == "__main__":
    main()
