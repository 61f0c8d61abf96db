"""Everything that is measured of speed and memory, one after the other on this machine: what `make bench` runs.

    python -m tests.benchmarks [runtimes job memory pipeline shards api] [--out bench-output]

Each part runs in a process of its own, prints its figures and writes them as JSON; `bench.json` holds them together and
`runtimes.svg` shows the network beside other runtimes. Ratios are what to read: seconds are this machine's at this
moment, and other work on it spoils them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

PARTS = {
    "runtimes": ["-m", "tests.benchmarks.runtimes"],
    "job": ["-c", "from api.cli import main; main()", "bench"],
    "memory": ["-m", "tests.benchmarks.memory"],
    "pipeline": ["-m", "tests.benchmarks.pipeline"],
    "shards": ["-m", "tests.benchmarks.shards"],
    "api": ["-m", "tests.benchmarks.api"],
}

BAR_PX, LABEL_PX, ROW_PX, FIGURE_PX = 420, 230, 26, 190


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure speed and memory on this machine.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--tensorflow", metavar="PYTHON", help="a Python that has TensorFlow, to measure it too")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help="folder of what is written")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {"at": datetime.now(UTC).isoformat(timespec="seconds")}
    failed = []
    for part in asked.parts or PARTS:
        print(f"--- {part}", flush=True)
        file = asked.out / f"{part}.json"
        more = ["--tensorflow", asked.tensorflow] if part == "runtimes" and asked.tensorflow else []
        if subprocess.run([sys.executable, *PARTS[part], *more, "--json", str(file)]).returncode != 0:
            failed.append(part)
            continue
        measured[part] = json.loads(file.read_text())
    (asked.out / "bench.json").write_text(json.dumps(measured, indent=2) + "\n")
    if "runtimes" in measured:
        (asked.out / "runtimes.svg").write_text(chart(measured["runtimes"]))
    print(f"--- written: {asked.out / 'bench.json'}")
    if failed:
        print(f"--- failed: {', '.join(failed)}")
    return 1 if failed else 0


def chart(runtimes: dict[str, Any]) -> str:
    """Bars of the result's megapixels a second, for each size of picture; an SVG document."""
    rows: list[str] = []
    y = 34
    for size, found in runtimes["sizes"].items():
        rows.append(f'<text x="8" y="{y}" class="size">{escape(size)} px, enlarged 4 times</text>')
        forms = found["forms"]
        fastest = max(form["result_megapixels_per_second"] for form in forms.values())
        for name, form in sorted(forms.items(), key=lambda each: each[1]["seconds"]):
            y += ROW_PX
            speed = form["result_megapixels_per_second"]
            kind = "own" if name == "enlarger" else "other"
            rows.append(f'<text x="{LABEL_PX - 8}" y="{y}" text-anchor="end">{escape(name)}</text>')
            width = BAR_PX * speed / fastest
            rows.append(f'<rect x="{LABEL_PX}" y="{y - 13}" width="{width:.1f}" height="17" class="{kind}"/>')
            rows.append(f'<text x="{LABEL_PX + width + 6:.1f}" y="{y}">{speed:.2f} MP/s</text>')
        y += 2 * ROW_PX
    machine = runtimes["machine"]
    note = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; medians of interleaved rounds"
    rows.append(f'<text x="8" y="{y - 8}" class="note">{escape(note)}</text>')
    style = (
        "text{font:14px sans-serif;fill:#222}.size{font-weight:bold}.note{fill:#666}"
        ".own{fill:#1a7f5a}.other{fill:#9aa5b1}svg{background:#fff}"
    )
    width = LABEL_PX + BAR_PX + FIGURE_PX
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 8}"><style>{style}</style>'
    return "\n".join([head, *rows, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
