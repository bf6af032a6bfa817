"""Which ranks of a run are alive, and why one left: told through the store they met at (torchrun's, or rank 0's, whose loss is a sign
too), so that none waits for the dead.

A thread of each rank says every second that it lives and what it is at. A rank that leaves early says why first. The others then
find their collectives broken (gloo), or hanging (nccl): the first ask here whom to name, the second are ended from here.
"""

import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from minorca.errors import RunEnded

PERIOD = 1.0  # seconds between signs of life
GRACE = 10.0  # for a rank to leave by itself, once another has left


class RankMonitor:
    """One rank's side. `doing` is what this rank tells the others it is at."""

    def __init__(self, rank: int, size: int, timeout: float, device: torch.device):
        nonce = torch.tensor(
            [secrets.randbits(62) if rank == 0 else 0], device=device
        )  # a restarted run may find an old store
        dist.all_reduce(nonce)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
        self.store = dist.PrefixStore(f"minorca-watch/{nonce.item()}", store)
        self.rank, self.others, self.timeout, self.doing = (
            rank,
            [r for r in range(size) if r != rank],
            timeout,
            "starting",
        )
        self.noted: Sequence[int] = ()  # signals that this rank has been sent, where they are only noted
        self._beats = 0
        self._heard = {
            other: ("", time.monotonic()) for other in self.others
        }  # the last sign of life, and when it came
        self._lock, self._over = (
            threading.Lock(),
            threading.Event(),
        )  # a store's connection serves one question at a time
        self._live()
        dist.barrier()
        self._listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        self._beats += 1
        life = {"beat": self._beats, "who": f"process {os.getpid()} on {socket.gethostname()}", "doing": self.doing}
        self.store.set(f"alive/{self.rank}", json.dumps(life))

    def _listen(self) -> None:
        with self._lock:
            self._live()
            lives = self.store.multi_get([f"alive/{other}" for other in self.others])
        for other, life in zip(self.others, lives):
            if life != self._heard[other][0]:
                self._heard[other] = (life, time.monotonic())

    def _silent(self, seconds: float) -> list[int]:
        return [other for other, (_, heard) in self._heard.items() if time.monotonic() - heard > seconds]

    def _name(self, other: int) -> str:
        life = json.loads(self._heard[other][0])
        return f"rank {other} ({life['who']}; last heard at: {life['doing']})"

    def _left(self) -> dict | None:
        """What the first rank to leave said."""
        with self._lock:
            return json.loads(self.store.get("left")) if self.store.check(["left"]) else None

    def leave(self, status: int, why: str) -> None:
        """Says that this rank leaves, and why, unless another said so before."""
        said = json.dumps({"rank": self.rank, "status": status, "why": why})
        with self._lock:
            self.store.compare_set("left", "", said)
            self.store.add("leaving", 1)

    def linger(self) -> None:
        """On rank 0, whose process may hold the store: gives the others time to fail as it did, and to see that it has been said."""
        deadline = time.monotonic() + 5 * PERIOD
        while self.rank == 0 and time.monotonic() < deadline:
            with self._lock:
                if self.store.add("leaving", 0) > len(self.others):
                    return
            time.sleep(PERIOD / 10)

    def first_to_say(self, words: str) -> bool:
        """Whether no rank has said these words yet: what all complain of is printed once."""
        with self._lock:
            return self.store.add(f"said/{hashlib.sha256(words.encode()).hexdigest()}", 1) == 1

    def meet(self, where: str) -> None:
        """Waits until every rank has come here, however long one of them takes: a collective would run out of time.

        Raises:
            RunEnded: another rank left.
        """
        with self._lock:
            self.store.add(f"met/{where}", 1)
        while True:
            with self._lock:
                if self.store.add(f"met/{where}", 0) > len(self.others):
                    return
            if left := self._left():
                raise self._because_of(left)
            time.sleep(PERIOD / 10)

    def _because_of(self, left: dict) -> RunEnded:
        return RunEnded(
            left["status"],
            f"rank {self.rank} ends because rank {left['rank']} did: {left['why']}" if left["why"] else "",
        )

    def who_left(self, signalled: bool = False) -> RunEnded | None:
        """Why a collective of this rank broke, or why it got a signal: another's own words, or its silence. None where all others are
        well, or got a signal too."""
        if signalled:
            with self._lock:
                self.store.add("signalled", 1)
        deadline = time.monotonic() + 5 * PERIOD
        while time.monotonic() < deadline:
            try:
                if (left := self._left()) and left["rank"] != self.rank:
                    return self._because_of(left)
                if signalled and self._all_signalled():
                    return None
                self._listen()
            except RuntimeError as error:  # dist.DistError among them
                return self._unreachable(error)
            if silent := self._silent(3.5 * PERIOD):
                return RunEnded(
                    1,
                    f"rank {self.rank} ends because {self._name(silent[0])} is not heard of any more; was it killed, or out of memory?",
                )
            time.sleep(PERIOD / 4)
        return None

    def _all_signalled(self) -> bool:
        with self._lock:
            return self.store.add("signalled", 0) > len(self.others)

    def whereabouts(self) -> str:
        """What every other rank last said it is at."""
        return "; ".join(self._name(other) for other in self.others)

    def _unreachable(self, error: Exception) -> RunEnded:
        reason = str(error).partition("\n")[0]
        return RunEnded(
            1, f"rank {self.rank} ends because it lost the run's store, on the machine of rank 0 ({reason})"
        )

    def _run(self) -> None:
        while not self._over.wait(PERIOD):
            ended = None
            try:
                if left := self._left():
                    if not self._over.wait(GRACE):
                        ended = self._because_of(left)
                else:
                    self._listen()
                    patience = GRACE if self.noted else self.timeout  # torchrun signals the others when a rank has died
                    if silent := self._silent(patience):
                        ended = RunEnded(
                            1,
                            f"rank {self.rank} ends because {self._name(silent[0])} has been silent for {patience:.0f} seconds",
                        )
            except RuntimeError as error:
                if not self._over.wait(GRACE):
                    ended = self._unreachable(error)
            if ended:  # the main thread is in a collective that may never end
                if str(ended):
                    print(f"minorca: {ended}", file=sys.stderr, flush=True)
                os._exit(ended.status)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
