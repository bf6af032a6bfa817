"""What docs/clusters.md and examples/ start on clusters.

Each way is run as its cluster runs it, with stand-ins for what a cluster has: srun and scontrol, the variables that
SLURM, Kubeflow Trainer and SkyPilot set, and a file system where the node has /work.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from torch.distributed.run import parse_args

from minorca import cli
from minorca.config_file import config_text
from minorca.train import __main__ as train_command
from tests.helpers import ROOT, assert_same_bits, assert_same_run, lines_of, wait_until
from tests.train.test_ranks import RANKED, free_port

EXAMPLES = ROOT / "examples"
CLUSTERS = (ROOT / "docs" / "clusters.md").read_text()
README = (ROOT / "README.md").read_text()
SLURM = (EXAMPLES / "slurm.sbatch").read_text()
TRAINJOB = yaml.safe_load((EXAMPLES / "trainjob.yaml").read_text())
SKYPILOT = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
CONTAINERFILE = (EXAMPLES / "Containerfile").read_text()
CONFIG = "configs/mistral-7b-openorca-8gpu.yaml"


class Start(NamedTuple):
    """A process that a cluster starts, on one of its nodes."""

    words: list[str]
    environment: dict[str, str]


def by_hand() -> list[Start]:
    block = re.findall(r"## Several nodes\n.*?```bash[^\n]*\n(.*?)```", CLUSTERS, re.S)[0]
    return [Start(["bash", "-euc", block], {})] * 2


def by_slurm() -> list[Start]:
    """The script runs on the first node; its srun starts both."""
    names = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[0-1]", "CPUS_PER_TASK": "64"}
    environment = {f"SLURM_{name}": value for name, value in names.items()}
    return [Start(["bash", "examples/slurm.sbatch", CONFIG], environment)]


def by_trainer() -> list[Start]:
    """As pkg/runtime/framework/plugins/torch/torch.go of kubeflow/trainer sets PET_*, and kubelet expands $(NAME)."""
    trainer = TRAINJOB["spec"]["trainer"]
    environment = {variable["name"]: variable["value"] for variable in trainer["env"]}
    environment |= {"PET_MASTER_ADDR": "node0", "PET_MASTER_PORT": "29500", "PET_NNODES": str(trainer["numNodes"])}
    environment |= {"PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
    words = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in trainer["command"]]
    return [Start(words, environment | {"PET_NODE_RANK": str(rank)}) for rank in range(trainer["numNodes"])]


def by_skypilot() -> list[Start]:
    """The variables are those of docs/source/running-jobs/environment-variables.rst of skypilot-org/skypilot."""
    names = {"NODE_IPS": "127.0.0.1\n127.0.0.1", "NUM_NODES": str(SKYPILOT["num_nodes"]), "TASK_ID": "sky-7-minorca"}
    names |= {"NUM_GPUS_PER_NODE": SKYPILOT["resources"]["accelerators"].split(":")[1]}
    environment = SKYPILOT["envs"] | {f"SKYPILOT_{name}": value for name, value in names.items()}
    words = ["bash", "-uc", SKYPILOT["run"]]
    return [Start(words, environment | {"SKYPILOT_NODE_RANK": str(rank)}) for rank in range(SKYPILOT["num_nodes"])]


WAYS: dict[str, Callable[[], list[Start]]] = {
    "by hand": by_hand,
    "SLURM": by_slurm,
    "Kubeflow Trainer": by_trainer,
    "SkyPilot": by_skypilot,
}

# two nodes; SIGTERM is sent on to what runs there
SRUN = """
import signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
nodes = [subprocess.Popen(words) for _ in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCONTROL = """
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.1")
elif sys.argv[1] == "requeue":
    open("requeued", "w").write(sys.argv[2])
"""
# notes its arguments
RECORDED = """
import os, sys
open(f"torchrun-{os.getpid()}", "w").write("\\n".join(sys.argv[1:]))
"""
# torch's, with one process of one thread a node, and a port that is free
REAL = """
import os, sys
from torch.distributed.run import main
os.environ["OMP_NUM_THREADS"] = "1"
words = [word.replace(":29500", ":PORT") for word in sys.argv[1:]]
place = words.index("-m")
words[place:place] = ["--nproc-per-node", "1"]
main(words)
"""


class Cluster:
    """Two nodes with one directory, which is their working directory and /work.

    Args:
        torchrun: the code of its torchrun.
    """

    def __init__(self, directory: Path, torchrun: str):
        self.directory = directory
        self.started: list[subprocess.Popen] = []
        programs = {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun, "activate": ""}
        self.programs = directory / ".venv" / "bin"
        self.programs.mkdir(parents=True)
        for name, code in programs.items():
            (self.programs / name).write_text(f"#!{sys.executable}\n{code.strip()}\n")
            (self.programs / name).chmod(0o755)
        (directory / "configs").mkdir()
        (directory / "examples").symlink_to(EXAMPLES)

    def write_config(self, options: list[str]) -> None:
        _, config = cli.parse_config(cli.config_parser("", ""), options)
        (self.directory / CONFIG).write_text(config_text(config))

    def start(self, start: Start) -> subprocess.Popen:
        # the nodes' names, where the node has them
        words = [word.replace("/work", str(self.directory)).replace("node0", "127.0.0.1") for word in start.words]
        paths = {"PATH": f"{self.programs}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        environment = os.environ | start.environment | paths
        environment["XDG_CACHE_HOME"] = str(self.directory / "cache")
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(words, cwd=self.directory, env=environment, **options)
        self.started.append(process)
        return process

    def run(self, starts: list[Start]) -> None:
        processes = [self.start(start) for start in starts]
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(starts), errors


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "cluster", REAL.replace("PORT", str(free_port())))
    yield cluster
    for process in cluster.started:
        # of a test that failed
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("way", WAYS)
def test_torchrun_and_train_take_the_options(way, tmp_path, monkeypatch):
    starts = WAYS[way]()
    Cluster(tmp_path / "cluster", RECORDED).run(starts)
    recorded = [path.read_text().split("\n") for path in (tmp_path / "cluster").glob("torchrun-*")]
    assert len(recorded) == 2 and recorded[0] == recorded[1]
    for name, value in starts[0].environment.items():
        monkeypatch.setenv(name, value)
    options = parse_args(recorded[0])
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 3)
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "127.0.0.1:29500")
    assert options.rdzv_id not in ("", "none") and options.module and options.training_script == "minorca.train"
    monkeypatch.chdir(ROOT)
    _, config = cli.parse_config(cli.config_parser("", ""), options.training_script_args)
    assert config.train.output == f"runs/{Path(CONFIG).stem}" and config.train.resume == "auto"


# SLURM's two nodes train below, and two by hand in test_ranks.py
@pytest.mark.slow
@pytest.mark.parametrize("way", ["Kubeflow Trainer", "SkyPilot"])
def test_two_nodes_train_as_one(way, workplace, cluster):
    settings = RANKED | {"train.steps": 6}
    train_command.main(workplace("one", **settings))
    cluster.write_config(workplace("two", **settings))
    cluster.run(WAYS[way]())
    assert_same_run(workplace.path / "one", workplace.path / "two", losses=1e-6)


@pytest.mark.slow
def test_before_its_time_is_up_a_slurm_job_saves_and_is_queued_again(workplace, cluster):
    """SIGUSR1 reaches the script alone, as by --signal=B:USR1@600. The second job goes on to the same bits."""
    settings = RANKED | {"train.steps": 150, "train.checkpoint_every": 1000}
    cluster.write_config(workplace("whole", **settings))
    cluster.run(by_slurm())
    cluster.write_config(workplace("cut", **settings))
    (start,) = by_slurm()
    job = cluster.start(start)
    cut = workplace.path / "cut"
    wait_until(lambda: (cut / "metrics.jsonl").exists() and len(lines_of(cut)) > 8, 120)
    job.send_signal(signal.SIGUSR1)
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert (cluster.directory / "requeued").read_text() == "7"
    steps = len([line for line in lines_of(cut) if "loss" in line])
    assert steps < 150 and (cut / "checkpoints" / f"step-{steps:08d}").is_dir()
    cluster.run(by_slurm())
    assert_same_bits(workplace.path / "whole", cut)


# ---------------------------------------------------------------------------------------------------------- the files


def environments() -> dict[str, str]:
    """Every variable that the files set for processes, and its value."""
    found = dict(re.findall(r"^\s*export (\w+)=(\S+)", SLURM, re.M))
    found |= dict(re.findall(r"(\w+)=(\S+)", re.findall("^export (.*)$", CLUSTERS, re.M)[0]))
    return found | by_trainer()[0].environment | SKYPILOT["envs"]


def test_variables_are_read_by_somebody():
    """By torch's launcher or by minorca; SRUN_CPUS_PER_TASK by srun (its manual)."""
    import torch.distributed

    launcher = Path(torch.distributed.__file__).parent
    sources = [launcher / "run.py", launcher / "argparse_util.py", *(launcher / "elastic").rglob("*.py")]
    text = "".join(path.read_text() for path in [*sources, *(ROOT / "minorca").rglob("*.py")])
    for name in environments().keys() - {"SRUN_CPUS_PER_TASK"}:
        option = name.removeprefix("PET_").lower().replace("_", "-")
        assert f'"--{option}"' in text if name.startswith("PET_") else name in text, name


def test_a_job_is_given_the_time_to_save():
    """Longer than torchrun waits for its ranks."""
    seconds = int(environments()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert seconds == 300
    for text in (SLURM, CLUSTERS):
        assert f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}" in text
    assert SKYPILOT["envs"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == str(seconds)
    (patch,) = TRAINJOB["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > seconds
    assert int(re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", SLURM, re.M)[0]) > seconds


def test_the_slurm_script_asks_for_what_it_uses():
    """Options of sbatch, from its manual (Slurm 22.05 and later); a process for each GPU."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM, re.M))
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue"}
    assert options.keys() <= known | {"open-mode", "output", "error", "partition", "account", "mem", "exclusive"}
    assert len(options) == SLURM.count("#SBATCH") and options["ntasks-per-node"] == "1"
    assert f"--nproc-per-node {options['gpus-per-node']}" in SLURM


def test_shell_scripts_are_sound():
    blocks = re.findall(r"```bash[^\n]*\n(.*?)```", CLUSTERS, re.S)
    for script in [SLURM, *(f"#!/bin/bash\n{text}" for text in (*blocks, SKYPILOT["setup"], SKYPILOT["run"]))]:
        # 1091: it does not follow `. .venv/bin/activate`
        checked = subprocess.run(
            [Path(sys.executable).with_name("shellcheck"), "--exclude=SC1091", "-"],
            input=script,
            text=True,
            capture_output=True,
        )
        assert checked.returncode == 0, checked.stdout


def test_the_trainjob_is_one():
    """By the models that Kubeflow Trainer generates of its API; a field that they do not know is lost."""
    parsed = TrainerV1alpha1TrainJob.from_dict(TRAINJOB)
    assert parsed and parsed.to_dict() == TRAINJOB
    spec = TRAINJOB["spec"]
    assert (TRAINJOB["apiVersion"], TRAINJOB["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert str(spec["trainer"]["numProcPerNode"]) == spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    # the names in manifests/base/runtimes/torch_distributed.yaml; of this container a patch may set no variables
    (container,) = pod["containers"]
    assert (job["name"], container["name"]) == ("node", "node") and "env" not in container
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts["work"] == re.findall("^WORKDIR (.*)$", CONTAINERFILE, re.M)[-1]
    assert pod["securityContext"]["fsGroup"] == int(re.findall("^USER (.*)$", CONTAINERFILE, re.M)[-1])


def test_the_skypilot_task_has_fields_of_its_reference():
    """Those of docs/source/reference/yaml-spec.rst of skypilot-org/skypilot."""
    texts = {"name", "workdir", "setup", "run"}
    assert SKYPILOT.keys() <= texts | {"num_nodes", "resources", "volumes", "envs", "file_mounts", "secrets", "config"}
    assert all(isinstance(SKYPILOT[field], str) for field in texts) and isinstance(SKYPILOT["num_nodes"], int)
    assert SKYPILOT["resources"].keys() == {"infra", "accelerators", "job_recovery"}
    assert SKYPILOT["resources"]["job_recovery"].keys() <= {"strategy", "max_restarts_on_errors"}
    assert all(isinstance(value, str) for value in SKYPILOT["envs"].values())
    assert all(path.startswith("/") for path in SKYPILOT["volumes"])


def installation(text: str) -> list[str]:
    return re.findall(r"^(?:RUN )?(pip install .*)$", text, re.M)


def test_everybody_installs_what_the_readme_does():
    commands = installation(README)
    assert len(commands) == 2
    assert installation(CONTAINERFILE) == installation(SKYPILOT["setup"]) == commands


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", "", re.sub("^#.*\n", "", CONTAINERFILE, flags=re.M))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_is_built_from_what_is_there(tmp_path):
    """A pinned base, no user who is root in the end, no secrets, and the files that .dockerignore lets in."""
    found = instructions()
    assert {name for name, _ in found} <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    ((_, base),) = [line for line in found if line[0] == "FROM"]
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base)
    users = [index for index, line in enumerate(found) if line[0] == "USER"]
    assert found[users[-1]][1].isdecimal() and int(found[users[-1]][1]) > 0
    assert not any(name == "RUN" for name, _ in found[users[-1] :])
    assert not re.search("(?i)secret|token|passw|api_?key", CONTAINERFILE)
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    sources = {source for name, words in found if name == "COPY" for source in words.split()[:-1]}
    assert "*" in ignore and sources == let_in
    for source in sources:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    command = [sys.executable, "-c", "import setuptools, runpy, sys; sys.argv = ['setup.py', '--name']"]
    command[-1] += "; runpy.run_path('setup.py')"
    named = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert named.stdout.split()[-1:] == ["minorca"], named.stderr
