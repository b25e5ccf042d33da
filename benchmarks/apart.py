"""Does training over two machines work, and outlast a network that is cut off and a machine that
goes? A measurement of some minutes, not a test; for root, on Linux with the program `ip`.

Makes two "machines" on this one: network namespaces joined by a cable (veth), each with an address,
a core, a folder, a host name and a boot id of its own. Over both, torchrun trains the recipe
`digits`

1. to its end;
2. until the cable is pulled, so that no packet comes through, none that says so either; plugged in
   again, the same command with `--resume auto` goes on to the end;
3. until all processes of the second machine are killed (SIGKILL), and, gone on with, until all of
   the first, which has the files, are; then to the end.

It shows how long each side took to end and in which words, from which step the run went on, and
what it learnt; exit code 1 if one side did not end in time, with one line, or learnt too little:

    python benchmarks/apart.py

What follows `--` are further options of the training: `-- --model resnet20 --epochs 6`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "train_split_affinity.py"
sys.path.insert(0, str(SCRIPT.parent))
from split_affinity.data.digits import write_digits

ENOUGH_PERCENT = 97.0  # top-1
TIMEOUT_S = 10.0  # how long a rank waits for the other one, where that is to be seen
PATIENT_S = 120.0  # and elsewhere: the first rank may save and draw for a while
SPARE_S = 20.0  # beyond that: to tell the summary and to draw pictures
TRAIN = "--recipe digits --data-path digits --split none -b 16 -j 1 --save-steps 20 --resume auto"
# A name and a boot id of its own for what is started in a namespace.
AS_MACHINE = 'hostname "$0" && mount --bind boot_id /proc/sys/kernel/random/boot_id && exec "$@"'


@dataclass(frozen=True)
class Machine:
    """A network namespace that has an address, a core and a folder."""

    number: int
    cpu: int
    folder: Path

    @property
    def name(self) -> str:
        """Of the machine, its namespace, and its end of the cable."""
        return f"apart{self.number}"

    @property
    def address(self) -> str:
        """Of its end of the cable."""
        return f"10.77.0.{self.number + 1}"

    def ip(self, arguments: str) -> None:
        """Run `ip` in the namespace."""
        subprocess.run(["ip", "-n", self.name, *arguments.split()], check=True)

    def plug(self, end: str) -> None:
        """Take one end of the cable."""
        subprocess.run(
            ["ip", "link", "set", end, "netns", self.name, "name", self.name], check=True
        )
        self.ip(f"addr add {self.address}/24 dev {self.name}")
        for device in (self.name, "lo"):
            self.ip(f"link set {device} up")

    def kill(self) -> None:
        """Kill all of its processes."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(self, master: Machine, options: Sequence[str]) -> Half:
        """Start torchrun; what its rank prints goes to files of their own."""
        log = Path(tempfile.mkdtemp(prefix="log", dir=self.folder))
        ways = (
            f"--nnodes 2 --node-rank {self.number} --nproc-per-node 1 --redirects 3 "
            f"--master-addr {master.address} --master-port 29500 --log-dir {log}"
        )
        as_machine = f"ip netns exec {self.name} unshare --uts sh -c".split()
        torchrun = [sys.executable, "-m", "torch.distributed.run", *ways.split(), str(SCRIPT)]
        pinned = [self.name, "taskset", "-c", str(self.cpu), *torchrun, *options]
        with (log / "torchrun.txt").open("w") as printed:
            return Half(
                self,
                subprocess.Popen(
                    [*as_machine, AS_MACHINE, *pinned],
                    cwd=self.folder,
                    stdout=printed,
                    stderr=subprocess.STDOUT,
                ),
                log,
            )


@dataclass(frozen=True)
class Half:
    """What one machine has of a run: the process of torchrun, and a folder with what is printed."""

    machine: Machine
    process: subprocess.Popen
    log: Path

    def printed(self, name: str = "*") -> str:
        """What the rank has printed so far: all, or on "stdout" or "stderr" alone."""
        return "".join(path.read_text() for path in sorted(self.log.rglob(f"{name}.log")))

    def found(self, pattern: str) -> str:
        """The last text that the rank has printed which a line's pattern finds; or nothing."""
        return next(reversed(re.findall(pattern, self.printed(), re.MULTILINE)), "")

    def step(self) -> int:
        """The latest step that it told of."""
        return int(self.found(r"^(?:step|finished after) (\d+)[ /]") or 0)

    def ended_well(self) -> tuple[bool, str]:
        """Whether it came to the end of the run, and a text that says how it ended."""
        code = self.process.wait()
        return code == 0, f"{self.machine.name} ended with code {code}"

    def gave_up(self, since_s: float) -> tuple[bool, str]:
        """Whether it ended in time with one line of ours, and a text that says so."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TIMEOUT_S + SPARE_S)
        took_s, code = time.perf_counter() - since_s, self.process.poll()
        lines = self.printed("stderr").splitlines()
        ours = [line for line in lines if line.startswith(SCRIPT.name)]
        good = code == 1 and len(ours) == 1 and "Traceback" not in self.printed()
        return good, f"{self.machine.name} ended after {took_s:.1f} s with code {code}: {ours}"


@contextlib.contextmanager
def two_machines(root: Path) -> Iterator[tuple[Machine, Machine]]:
    """Make them; however that ends, neither they nor any of their processes are left."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    machines = Machine(0, first, root / "0"), Machine(1, second, root / "1")
    with contextlib.ExitStack() as stack:
        for machine in machines:
            write_digits(machine.folder / "digits")
            (machine.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
            subprocess.run(["ip", "netns", "add", machine.name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", machine.name])
            stack.callback(machine.kill)
        ends = "apart-a", "apart-b"
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", ends[1]], check=True)
        for machine, end in zip(machines, ends, strict=True):
            machine.plug(end)
        yield machines


class Claims:
    """What is claimed, line by line, and whether all of it held."""

    def __init__(self):
        self.hold = True

    def add(self, holds: bool, text: str) -> None:
        """Print a claim, or that it does not hold."""
        self.hold &= holds
        print(text if holds else f"NOT AS CLAIMED: {text}", flush=True)


class Training:
    """A run over two machines in an output folder of its own, begun or gone on with."""

    def __init__(
        self, machines: Sequence[Machine], folder: str, options: Sequence[str], claims: Claims
    ):
        self._machines, self._claims = machines, claims
        self._options = [*TRAIN.split(), "--output-dir", folder, *options]
        self._folder, self._steps = folder, 0

    def start(self, timeout_s: float) -> list[Half]:
        """Type the same command on both."""
        options = [*self._options, "--timeout", f"{timeout_s:g}"]
        return [each.start(self._machines[0], options) for each in self._machines]

    def to_the_end(self) -> int:
        """Begin or go on, to the end; the number of steps."""
        began_s = time.perf_counter()
        halves = self.start(PATIENT_S)
        for half in halves:
            self._claims.add(*half.ended_well())
        first = halves[0]
        if first.process.returncode:
            print(first.printed()[-2000:])
        top1 = float(first.found(r"^best validation top-1: ([\d.]+) %") or 0)
        resumed = first.found(r"^resumed from .*, (after step \d+)$")
        begun = f"went on {resumed}" if resumed else "began anew"
        took_s = time.perf_counter() - began_s
        text = f"{self._folder}: {begun}, {first.step()} steps, {took_s:.0f} s, top-1 {top1:.2f} %"
        self._claims.add(top1 >= ENOUGH_PERCENT, text)
        if self._steps:  # it has been stopped before
            self._claims.add(bool(resumed), f"it was stopped near step {self._steps}")
        written = [*self._machines[1].folder.glob(f"{self._folder}/*")]
        self._claims.add(not written, f"{self._machines[1].name} wrote no files")
        return first.step()

    def until(self, step: int) -> list[Half]:
        """Begin or go on, until so many steps are made."""
        halves = self.start(TIMEOUT_S)
        while halves[0].process.poll() is None and halves[0].step() < step:
            time.sleep(0.05)
        self._steps = halves[0].step()
        return halves

    def cut(self, step: int) -> None:
        """Pull the cable after so many steps; it is plugged in again once both sides have ended."""
        halves = self.until(step)
        since_s = time.perf_counter()
        self._machines[1].ip(f"link set {self._machines[1].name} down")
        print(f"{self._folder}: cable pulled after step {self._steps}", flush=True)
        for half in halves:
            self._claims.add(*half.gave_up(since_s))
        self._machines[1].ip(f"link set {self._machines[1].name} up")

    def kill(self, victim: Machine, step: int) -> None:
        """Kill all processes of a machine after so many steps."""
        halves = self.until(step)
        since_s = time.perf_counter()
        victim.kill()
        print(f"{self._folder}: {victim.name} killed after step {self._steps}", flush=True)
        for half in halves:
            if half.machine != victim:
                self._claims.add(*half.gave_up(since_s))


def main(options: Sequence[str]) -> int:
    """Train undisturbed, then with a cut, then with kills; the exit code."""
    claims = Claims()
    with tempfile.TemporaryDirectory() as folder, two_machines(Path(folder)) as machines:
        steps = Training(machines, "whole", options, claims).to_the_end()
        disturbed = Training(machines, "cut", options, claims)
        disturbed.cut(steps // 2)
        disturbed.to_the_end()
        disturbed = Training(machines, "killed", options, claims)
        disturbed.kill(machines[1], steps // 3)
        disturbed.kill(machines[0], 2 * steps // 3)
        disturbed.to_the_end()
    print("all as claimed" if claims.hold else "not all is as claimed")
    return int(not claims.hold)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("options", nargs="*", help="further options of the training, after --")
    given = parser.parse_args()
    if os.geteuid() or len(os.sched_getaffinity(0)) < 2:
        sys.exit("benchmarks/apart.py makes network namespaces: root and two cores are needed")
    sys.exit(main(given.options))
