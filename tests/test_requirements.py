"""The versions of packages that setup.py allows: listed, and run at both ends."""

import ast
import json
import re
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

from tests.helpers import ENVIRONMENT, ROOT, lines_of
from tests.serve.test_serve import serving


def requirements() -> list[str]:
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return ast.literal_eval(node.value)
    raise AssertionError


def test_every_package_is_bounded_and_listed():
    listed = re.findall(r"^\| `([a-z0-9-]+)` \| (>=\S+,<\S+) \| .+ \|$", (ROOT / "SECURITY.md").read_text(), re.M)
    assert [name + bounds for name, bounds in listed] == requirements()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["lowest", "newest"])
def test_the_versions_at_both_ends(end, workplace, tmp_path):
    """Beside this environment's torch and triton, which are gigabytes."""
    site = tmp_path / "site"
    path = f"{site}:{ENVIRONMENT['PYTHONPATH']}"
    wanted = [requirement for requirement in requirements() if not requirement.startswith(("torch", "triton"))]
    if end == "lowest":
        wanted = [re.sub(r">=(\S+),<.*", r"==\1", requirement) for requirement in wanted]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", site, *wanted]
    subprocess.run(pip, check=True)

    def run(*arguments) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    code = "import datasets, json; json_rows = datasets.load_dataset('json', data_files=%r, split='train'); "
    parquet = tmp_path / "rows.parquet"
    run("-c", code % str(tmp_path / "rows.jsonl") + f"json_rows.to_parquet({str(parquet)!r})")
    run("-m", "minorca.train", *workplace(**{"train.steps": 2, "data.train": parquet}))
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "curves.png").is_file() and any((tmp_path / "run" / "tensorboard").iterdir())
    model = next(tmp_path.glob("model-*"))
    options = ["--model", model, "--adapter", tmp_path / "run" / "adapter", "--prompt", "a", "--max-new-tokens", 2]
    assert json.loads(run("-m", "minorca.generate", *options, "--json"))["tokens"] <= 2
    with serving("--model", model, PYTHONPATH=path) as server:
        ask = {"model": model.name, "prompt": "a", "max_tokens": 2}
        for body, status in ((ask, 200), (ask | {"prompt": 1.5}, 400)):
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == status
        assert httpx.get(f"{server.url}/metrics").status_code == 200 and server.end(signal.SIGTERM) == (143, "")
    found = run("-c", "import tokenizers, datasets; print(tokenizers.__file__, datasets.__file__)")
    assert found.count(str(site)) == 2
    shutil.rmtree(site)
