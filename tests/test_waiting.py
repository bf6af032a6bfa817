"""How threads of a CPU wait for each other: what commands set before torch is loaded."""

import os
import subprocess
import sys

import pytest

from minorca import waiting

QUIET, BUSY = "0.00 0.00 0.00 1/99 7\n", "0.00 0.00 0.00 2/99 7\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets a machine of four processors, and returns what `set_waiting_policy` adds to an environment."""

    def changes(load: str = QUIET, visible: int = 4, usable: int = 4, **environment: str) -> dict[str, str]:
        (tmp_path / "loadavg").write_text(load)
        monkeypatch.setattr(waiting, "LOAD", tmp_path / "loadavg")
        monkeypatch.setattr(waiting, "host_processors", lambda: usable)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(visible)))
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(os, "environ", dict(environment))
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        waiting.set_waiting_policy()
        return {name: value for name, value in os.environ.items() if name not in environment}

    return changes


def test_threads_spin_shortly_on_a_quiet_machine(machine):
    assert machine() == {"GOMP_SPINCOUNT": "3000"}
    # one program and two threads leave a processor
    assert machine(BUSY, OMP_NUM_THREADS="2") == {"GOMP_SPINCOUNT": "3000"}
    assert machine("no such file's format") == {"GOMP_SPINCOUNT": "3000"}


def test_threads_sleep_where_more_run_than_there_are_processors(machine):
    assert machine(BUSY) == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert machine(BUSY, OMP_NUM_THREADS="4,1") == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert machine("0.00 0.00 0.00 9/99 7", OMP_NUM_THREADS="1") == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_a_limited_container_gets_as_many_threads_as_it_may_use(machine):
    assert machine(usable=2) == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    assert machine(usable=2, OMP_NUM_THREADS="3") == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", waiting.VARIABLES)
def test_what_the_user_has_set_stays(machine, name):
    assert machine(BUSY, **{name: "0"}) == {}
    assert machine(BUSY, usable=2, **{name: "0"}) == {"OMP_NUM_THREADS": "2"}
    assert f"{name}=0" in waiting.waiting_policy()


def test_too_late_for_a_torch_that_is_loaded(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setitem(sys.modules, "torch", os)
    waiting.set_waiting_policy()
    assert os.environ == {}


@pytest.mark.parametrize("module", ["minorca.train", "minorca.generate", "minorca.evaluate", "minorca.compare"])
def test_commands_set_it_before_torch_is_loaded(module):
    names = {*waiting.VARIABLES, "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    # what sets it looks whether torch is loaded: where it is set, torch was not
    code = f"import os, sys; import {module}.__main__; print([n for n in {waiting.VARIABLES} if n in os.environ])"
    run = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout.strip() in ("['OMP_WAIT_POLICY']", "['GOMP_SPINCOUNT']")
