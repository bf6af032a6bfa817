"""Each kernel against its limit, as bars: python -m benchmarks.plot FOLDER writes FOLDER/kernels.png from its kernels.json."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.table import LIMITS


def plot(folder: Path) -> Path:
    result = json.loads((folder / "kernels.json").read_text())
    rows = [row for row in result["rows"] if row["target"] and row.get("reached")][::-1]  # the first at the top
    names = [
        "{kernel} {direction}, {shape}".format(**row) + ("" if row["provider"] == "ours" else f" ({row['provider']})")
        for row in rows
    ]
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.3 * len(rows)), layout="constrained")
    colours = dict(zip(LIMITS, ("C0", "C1", "C2")))
    axes.barh(names, [100 * row["reached"] for row in rows], color=[colours[row["limit"]] for row in rows])
    axes.plot([100 * row["target"] for row in rows], names, "k|", markersize=12)
    axes.set(xlabel="% of the limit; the mark is the target", title=result["machine"]["device"])
    bars = [plt.Rectangle((0, 0), 1, 1, color=colour, label=LIMITS[limit]) for limit, colour in colours.items()]
    figure.legend(handles=bars, loc="outside lower center", ncols=len(bars))
    figure.savefig(path := folder / "kernels.png", dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
