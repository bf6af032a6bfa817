"""A bar chart of each kernel's share of its limit: python -m benchmarks.plot FOLDER plots its kernels.json."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmarks.table import LIMITS


def plot(folder: Path) -> Path:
    """Writes FOLDER/kernels.png, and returns its path."""
    result = json.loads((folder / "kernels.json").read_text())
    # bars are drawn from the bottom up: the first row is to be at the top
    rows = [row for row in result["rows"] if row["target"] and row.get("reached")][::-1]
    names = []
    for row in rows:
        name = f"{row['kernel']} {row['direction']}, {row['shape']}"
        names.append(name if row["provider"] == "ours" else f"{name} ({row['provider']})")
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.3 * len(rows)), layout="constrained")
    colours = dict(zip(LIMITS, ("C0", "C1", "C2")))
    axes.barh(names, [100 * row["reached"] for row in rows], color=[colours[row["limit"]] for row in rows])
    axes.plot([100 * row["target"] for row in rows], names, "k|", markersize=12)
    axes.set(xlabel="% of the limit; the mark is the target", title=result["machine"]["device"])
    bars = [Patch(color=colour, label=LIMITS[limit]) for limit, colour in colours.items()]
    figure.legend(handles=bars, loc="outside lower center", ncols=len(bars))
    path = folder / "kernels.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
