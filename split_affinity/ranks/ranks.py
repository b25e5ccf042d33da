"""Ranks: processes that train one model together, each on its own part of the micro-batches.

torchrun starts them; torch.distributed, with gloo, carries what they tell each other. Code that
depends on there being several asks the class Ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import distributed

from split_affinity.errors import RunError, Stopped, UserError, likely_reason, one_line
from split_affinity.machine.description import describe_topology
from split_affinity.machine.plan import CorePlan, Host, rank_topology, this_host
from split_affinity.machine.topology import Topology
from split_affinity.ranks.launch import Launch
from split_affinity.text import format_cpu_list


class RankLost(RunError):
    """Another rank does not answer any more."""


class Ranks:
    """The processes that train one model together: here a single one. Rank 0 alone writes."""

    rank, size = 0, 1
    # False while an error of this rank may be unknown to the others. If they agree, all raise it
    # after the same step, and can still save a checkpoint together.
    agreed = True
    hosts: Sequence[Host] = ()  # of each rank, if there are several
    plans: Sequence[CorePlan] = ()

    def meet(self, topology: Topology) -> Topology:
        """Exchange `hosts`; returns this rank's part of its machine, or raises UserError."""
        return topology

    def introduce(self, plan: CorePlan) -> None:
        """Exchange `plans`."""

    def start(self) -> None:
        """Connect with all others. Threads of gloo get the mask of the calling thread."""

    def gather_objects(self, thing: Any) -> list[Any]:
        """What each rank hands in, anything that can be pickled, by rank."""
        return [thing]

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """The same for numbers, as many from each rank, and faster."""
        return [list(values)]

    def raise_on_all(self, error: Exception | None = None) -> None:
        """Raise on all ranks the error that the first of them hands in, if any does."""
        if error:
            raise error

    def on_rank_0(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the function on rank 0 alone; its result, or its error, is that of all ranks."""
        return function(*args)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error inside, on any rank, on all of them at the end."""
        yield

    def close(self, together: bool) -> None:
        """Part from the others; if they end together, wait until all of them have come here."""


ONE_PROCESS = Ranks()


class SeveralRanks(Ranks):
    """Several processes that a launcher has started; this one is `rank` of `size`.

    Its methods do what Ranks says of them; all ranks call the same ones in the same order, each
    from one thread at a time. They raise RankLost if a rank does not answer for `timeout_s`
    seconds, or has gone. Until `start` they talk through the launcher's store.
    """

    agreed = False

    def __init__(self, rank: int, size: int, store: distributed.Store, timeout_s: float):
        self.rank, self.size, self.lost = rank, size, False
        self._store, self._timeout_s = store, timeout_s
        self._started, self._exchanges = False, 0

    def begin(self) -> None:
        """Find the ranks that were started with this one, and a part of the store for them alone.

        A launcher may keep its store, with all that is in it, when it starts ranks once more; and
        it counts the starts on each machine by itself. So each process gives itself a name, and
        rank 0, the leader, tells its own to each until one that is alive has answered.
        """
        own, until_s = os.urandom(8).hex(), time.monotonic() + self._timeout_s
        with self.answered():
            if self.rank:
                self._store.set(f"here/{self.rank}", own)
                leader = self._store.get(f"begun/{own}").decode()
                self._store.set(f"heard/{leader}/{own}", "")
            else:
                leader, waiting = own, range(1, self.size)
                while waiting := [rank for rank in waiting if not self._invite(rank, leader)]:
                    if time.monotonic() > until_s:
                        raise RuntimeError("timeout")
                    time.sleep(0.01)
        self._store = distributed.PrefixStore(leader, self._store)

    def _invite(self, rank: int, leader: str) -> bool:
        """Tell a rank, once it is there, the leader's name; returns whether it has answered."""
        name = self._store.get(f"here/{rank}").decode()
        self._store.set(f"begun/{name}", leader)
        return self._store.check([f"heard/{leader}/{name}"])

    def meet(self, topology: Topology) -> Topology:
        self.hosts = self.gather_objects(this_host(topology))
        with self.together():
            versions = [host.torch_version for host in self.hosts]
            for rank, version in enumerate(versions):
                if version != versions[0]:
                    where = f"rank {rank} on {self.hosts[rank].name} has torch {version}"
                    raise UserError(f"{where}, rank 0 has {versions[0]}: all need the same")
            if "GLOO_SOCKET_IFNAME" not in os.environ:
                os.environ["GLOO_SOCKET_IFNAME"] = find_network_interface(self.hosts)
            return rank_topology(self.hosts, self.rank)

    def introduce(self, plan: CorePlan) -> None:
        self.plans = self.gather_objects(plan)

    def start(self) -> None:
        with self.answered():
            distributed.init_process_group(
                "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=self._timeout_s),
            )
        self._started = True

    def gather_objects(self, thing: Any) -> list[Any]:
        with self.answered():
            if self._started:
                things = [None] * self.size
                distributed.all_gather_object(things, thing)
                return things
            self._exchanges += 1
            self._store.set(f"{self._exchanges}/{self.rank}", pickle.dumps(thing))
            texts = [self._store.get(f"{self._exchanges}/{rank}") for rank in range(self.size)]
            return list(map(pickle.loads, texts))

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        own = torch.tensor(values, dtype=torch.float64)
        every = [torch.empty_like(own) for _ in range(self.size)]
        with self.answered():
            distributed.all_gather(every, own)
        return [each.tolist() for each in every]

    def raise_on_all(self, error: Exception | None = None) -> None:
        foreseen = error is None or isinstance(error, (UserError, RunError, Stopped))
        every = self.gather_objects(error if foreseen else RunError(likely_reason(error)))
        for rank, found in enumerate(every):
            if found:
                self.agreed = True
                if rank == self.rank and not foreseen:
                    raise error  # as it is, with its traceback; a RunError elsewhere
                if rank and not isinstance(found, Stopped):
                    place = f" on {self.hosts[rank].name}" if self.hosts else ""
                    found.args = (f"rank {rank}{place}: {found}",)
                raise found

    def on_rank_0(self, function: Callable[..., Any], *args: Any) -> Any:
        things = [None]
        with self.together():
            if not self.rank:
                things = [function(*args)]
        if not self._started:
            return self.gather_objects(things[0])[0]
        with self.answered():
            distributed.broadcast_object_list(things)
        return things[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (self.agreed or self.lost):
                self.raise_on_all(error)
            raise
        self.raise_on_all()

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Turn the many errors of gloo and of the store into RankLost."""
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            reason = one_line(error)
            if found := re.search(r"(?:closed|reset) by peer", reason):
                peer = re.search(r"\[([^][/]+)\]:\d", reason)
                reason = f"connection {found[0]}{f' ({peer[1]})' if peer else ''}"
            elif re.search("time(d |)out|timeout", reason, re.IGNORECASE):
                reason = f"no answer within --timeout {self._timeout_s:g} s"
            raise RankLost(f"rank {self.rank} has lost another one: {reason}") from None

    def close(self, together: bool) -> None:
        if together:
            with contextlib.suppress(RankLost):
                self.gather_objects(None)
        if self._started:
            self._started = False
            distributed.destroy_process_group()


def connect(launch: Launch, timeout_s: float) -> Ranks:
    """The ranks that were launched; a process by itself is the only one."""
    if launch.ranks == 1:
        return ONE_PROCESS
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise UserError(f"{launch.ranks} ranks: this build of torch has no gloo to connect them")
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = f"the store at {place} cannot be reached: {one_line(error)}"
        raise RunError(f"rank {launch.rank}: {reason}") from None
    ranks = SeveralRanks(rank, size, store, timeout_s)
    ranks.begin()
    return ranks


def find_network_interface(hosts: Sequence[Host]) -> str:
    """The network interface that leads to the launcher's address, and so to the other ranks.

    Gloo by itself takes the one of the machine's own name, on many systems 127.0.1.1. Raises
    UserError if it leads to this machine alone and ranks are on others.
    """
    place, own = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), ""
    for family, kind, _, _, address in socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)[::-1]:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(address)  # this sends nothing
            own = probe.getsockname()[0]
    if own.startswith(("127.", "::1")) and len({host.kernel for host in hosts}) > 1:
        remedy = "one that other machines know, or set GLOO_SOCKET_IFNAME"
        raise UserError(
            f"the address {place[0]} is this machine's own alone: give torchrun {remedy}"
        )
    for name, addresses in psutil.net_if_addrs().items():
        if own and own in (each.address.partition("%")[0] for each in addresses):
            return name
    raise UserError(f"no network interface leads to {place[0]}: set GLOO_SOCKET_IFNAME")


def machines_of(ranks: Ranks) -> Iterator[tuple[str, Topology, list[int]]]:
    """Each machine of several ranks: a line about it, what they may use of it, their numbers."""
    for kernel in dict.fromkeys(host.kernel for host in ranks.hosts):
        there = [rank for rank, host in enumerate(ranks.hosts) if host.kernel == kernel]
        cpus = frozenset().union(*(ranks.hosts[rank].topology.allowed for rank in there))
        host = ranks.hosts[there[0]]
        topology = dataclasses.replace(host.topology, allowed=cpus)
        yield f"{host.name}: {describe_topology(topology)}", topology, there


def rank_lines(ranks: Ranks) -> list[str]:
    """A line about each of several ranks: where it is, and its cores."""
    lines = []
    for rank, (host, plan) in enumerate(zip(ranks.hosts, ranks.plans, strict=True)):
        groups = "; ".join(f"{group.name} {group}" for group in plan.groups)
        loader = f"loader cores {format_cpu_list(plan.loader_cpus)}"
        notes = "".join(f"; {note}" for note in plan.notes)
        lines.append(f"rank {rank} on {host.name}: {groups}; {loader}{notes}")
    return lines


def rank_metrics(ranks: Ranks) -> dict[str, Any]:
    """Several ranks in metrics.jsonl: the machine's name and the plan of each."""
    pairs = zip(ranks.hosts, ranks.plans, strict=True)
    rows = [{"host": host.name, "plan": dataclasses.asdict(plan)} for host, plan in pairs]
    return {"ranks": rows} if rows else {}
