"""Which ranks of a run are alive, and why one left, so that no rank waits for one that is gone.

The ranks share a store: torchrun's, or rank 0's, whose loss is a sign too. A thread of each rank reports every second
that it is alive and what it is doing, and a rank that leaves early reports why first. The others then find that their
collectives fail (gloo), or never return (nccl): those that fail ask here which rank to name, those that hang are ended
by the thread.
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
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from minorca.errors import RunEnded

# seconds between heartbeats
PERIOD = 1.0
# seconds that a rank has to leave by itself once another has left
GRACE = 10.0


def _collectives() -> int:
    """How many collective operations this process has joined. Ranks that wait have joined more than those missing."""
    # missing from torch's annotations; a copy, for another thread may make a group
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


class RankMonitor:
    """One rank's side.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as lost.

    Attributes:
        status: what this rank tells the others that it is doing.
        noted: signals that this rank has received, where they are only noted.
    """

    def __init__(self, rank: int, size: int, timeout: float, device: torch.device):
        # a restarted run may find the store of the one before
        nonce = torch.tensor([secrets.randbits(62) if rank == 0 else 0], device=device)
        dist.all_reduce(nonce)
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
        self.store = PrefixStore(f"minorca-monitor/{nonce.item()}", store)
        self.rank = rank
        self.others = [other for other in range(size) if other != rank]
        self.timeout = timeout
        self.status = "starting"
        self.noted: Sequence[int] = ()
        self._beats = 0
        # seconds of this process, without those that it was suspended for
        self._awake, self._ticked = 0.0, time.monotonic()
        # of each other rank, its last heartbeat and when it came
        self._last_seen: dict[int, tuple[bytes, float]] = dict.fromkeys(self.others, (b"", 0.0))
        # of every rank, how many collectives it has joined, and when it joined the last
        self._joined: dict[int, tuple[int, float]] = dict.fromkeys(range(size), (0, 0.0))
        # the store's connection serves one request at a time
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._beat()
        dist.barrier()
        self._exchange_beats()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------------------------- heartbeats

    def _beat(self) -> None:
        self._beats += 1
        process = f"process {os.getpid()} on {socket.gethostname()}"
        heartbeat = {"beat": self._beats, "process": process, "status": self.status, "joined": _collectives()}
        self.store.set(f"alive/{self.rank}", json.dumps(heartbeat))

    def _exchange_beats(self) -> None:
        with self._lock:
            self._beat()
            heartbeats = self.store.multi_get([f"alive/{other}" for other in self.others])
            # a job that is suspended is so on all ranks, and none of them is to blame for its silence
            now = time.monotonic()
            self._awake += min(now - self._ticked, 3 * PERIOD)
            self._ticked = now
        joined = {self.rank: _collectives()}
        for other, heartbeat in zip(self.others, heartbeats):
            joined[other] = json.loads(heartbeat)["joined"]
            if heartbeat != self._last_seen[other][0]:
                self._last_seen[other] = (heartbeat, self._awake)
        for member, count in joined.items():
            if count != self._joined[member][0]:
                self._joined[member] = (count, self._awake)

    def _silent(self, seconds: float) -> list[int]:
        return [other for other, (_, seen) in self._last_seen.items() if self._awake - seen > seconds]

    def _missing(self, seconds: float) -> list[int]:
        """The ranks that this one has waited for in a collective for longer than this."""
        own, since = self._joined[self.rank]
        if self._awake - since <= seconds:
            return []
        return [rank for rank, (count, last) in self._joined.items() if count < own and self._awake - last > seconds]

    def _describe(self, other: int) -> str:
        heartbeat = json.loads(self._last_seen[other][0])
        return f"rank {other} ({heartbeat['process']}; last status: {heartbeat['status']})"

    def statuses(self) -> str:
        """The last status of every other rank."""
        return "; ".join(self._describe(other) for other in self.others)

    # ------------------------------------------------------------------------------------------------------ leaving

    def leave(self, status: int, reason: str) -> None:
        """Reports that this rank leaves, and why, unless another rank has left before."""
        departure = json.dumps({"rank": self.rank, "status": status, "reason": reason})
        with self._lock:
            self.store.compare_set("left", "", departure)
            self.store.add("leaving", 1)

    def wait_for_others(self) -> None:
        """On rank 0, whose process may hold the store: gives the others time to fail as it did, and to see why."""
        deadline = time.monotonic() + 5 * PERIOD
        while self.rank == 0 and time.monotonic() < deadline:
            with self._lock:
                if self.store.add("leaving", 0) > len(self.others):
                    return
            time.sleep(PERIOD / 10)

    def is_first_to_report(self, message: str) -> bool:
        """Whether no rank has reported this message yet: an error that all ranks meet is printed once."""
        with self._lock:
            return self.store.add(f"reported/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1

    def _departure(self) -> dict | None:
        """What the first rank to leave reported."""
        with self._lock:
            return json.loads(self.store.get("left")) if self.store.check(["left"]) else None

    def _ended_because(self, departure: dict) -> RunEnded:
        if not departure["reason"]:
            return RunEnded(departure["status"])
        message = f"rank {self.rank} ends because rank {departure['rank']} did: {departure['reason']}"
        return RunEnded(departure["status"], message)

    def _store_lost(self, error: Exception) -> RunEnded:
        reason = str(error).partition("\n")[0]
        return RunEnded(
            1, f"rank {self.rank} ends because it lost the run's store, on the machine of rank 0 ({reason})"
        )

    def cause_of_failure(self, signalled: bool = False) -> RunEnded | None:
        """Why a collective of this rank failed, or why it got a signal: another rank's departure, or its silence.

        None where all other ranks are alive, or got a signal too.
        """
        if signalled:
            with self._lock:
                self.store.add("signalled", 1)
        deadline = time.monotonic() + 5 * PERIOD
        while time.monotonic() < deadline:
            try:
                departure = self._departure()
                if departure and departure["rank"] != self.rank:
                    return self._ended_because(departure)
                if signalled and self._all_signalled():
                    return None
                self._exchange_beats()
            # dist.DistError among them
            except RuntimeError as error:
                return self._store_lost(error)
            if silent := self._silent(3.5 * PERIOD):
                lost = self._describe(silent[0])
                return RunEnded(
                    1, f"rank {self.rank} ends because {lost} stopped responding; killed, or out of memory?"
                )
            time.sleep(PERIOD / 4)
        return None

    def _all_signalled(self) -> bool:
        with self._lock:
            return self.store.add("signalled", 0) > len(self.others)

    # ------------------------------------------------------------------------------------------------------ waiting

    def rendezvous(self, name: str) -> None:
        """Waits until every rank has come here, however long one of them takes: a collective would time out.

        Raises:
            RunEnded: another rank left.
        """
        with self._lock:
            self.store.add(f"rendezvous/{name}", 1)
        while True:
            with self._lock:
                if self.store.add(f"rendezvous/{name}", 0) > len(self.others):
                    return
            if departure := self._departure():
                raise self._ended_because(departure)
            time.sleep(PERIOD / 10)

    def _watch(self) -> None:
        """The thread: heartbeats, and the end of a process whose main thread hangs in a collective."""
        while not self._closed.wait(PERIOD):
            if ended := self._reason_to_end():
                if str(ended):
                    print(f"minorca: {ended}", file=sys.stderr, flush=True)
                os._exit(ended.status)

    def _reason_to_end(self) -> RunEnded | None:
        try:
            if departure := self._departure():
                return None if self._closed.wait(GRACE) else self._ended_because(departure)
            self._exchange_beats()
        except RuntimeError as error:
            return None if self._closed.wait(GRACE) else self._store_lost(error)
        # torchrun signals the others when a rank has died
        patience = GRACE if self.noted else self.timeout
        if silent := self._silent(patience):
            lost = self._describe(silent[0])
            return RunEnded(1, f"rank {self.rank} ends because {lost} has been silent for {patience:.0f} seconds")
        if missing := self._missing(self.timeout):
            lost, waited = self._describe(missing[0]), f"{self.timeout:.0f} seconds"
            return RunEnded(1, f"rank {self.rank} ends because it has waited for {lost} in a collective for {waited}")
        return None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
