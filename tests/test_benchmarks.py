"""The table of kernels: results become a page, a figure and the README's rows."""

import json
import shutil
import subprocess

from benchmarks.plot import plot
from benchmarks.table import page, readme_kernels, with_kernels
from tests.helpers import ROOT
from tests.kernels.test_compiled import run


def test_readme_is_generated():
    readme = (ROOT / "README.md").read_text()
    assert "<!-- kernels -->" in readme
    assert readme == with_kernels(readme, ROOT / "benchmarks" / "results"), "python -m benchmarks.table --readme"


def test_kernels(tmp_path):
    """On the CPU with tiny sizes: every case runs, is correct and is shown; the README shows only a GPU's results."""
    folder = tmp_path / "results" / "machine-2000-01-01"
    run("-m", "benchmarks.kernels", "--smoke", "--output", folder, check=True, stderr=subprocess.PIPE)
    result = json.loads((folder / "kernels.json").read_text())
    rows = [row for row in result["rows"] if row["provider"] == "ours"]
    assert rows and all(row.get("wrong") is False and row["seconds"]["median"] > 0 for row in rows)
    assert "## Kernels" in page(folder) and plot(folder).stat().st_size
    assert "No GPU" in readme_kernels(folder.parent)

    # invented results of a GPU
    gpu = result | {"machine": {"device": "a GPU"}, "device_type": "cuda", "smoke": False}
    forward, _, backward, _, *_ = rows
    gpu["rows"] = [row | {"shape": "8192 x 4096", "reached": 0.5} for row in (forward, backward)]
    newer = tmp_path / "results" / "gpu-2000-01-02"
    shutil.copytree(folder, newer)
    (newer / "kernels.json").write_text(json.dumps(gpu))
    table = readme_kernels(folder.parent)
    assert "a GPU" in table and table.count("**50.0%**") == 2 and "gpu-2000-01-02" in table
