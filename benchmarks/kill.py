"""Does a run that is killed again and again end as if it had not been? A measurement of some
minutes, not a test.

Trains a ResNet-20 on scikit-learn's digits, saving after every step; then trains it once more,
killing the process at random moments and resuming it with `--resume auto`. Compares weights, moving
average, optimizer and history of both, bit for bit; exit code 1 if anything differs:

    python benchmarks/kill.py --schedule delayed --signal SIGKILL --kills 20

With `--faults` the process is not killed, but meets a fault, drawn each time: a loader process that
is killed, pictures that cannot be read, a disk that takes nothing, a limit of memory, an allocation
that is refused within a phase. Then only the ends of epochs are saved, and what the program saves
by itself when it ends by an error:

    python benchmarks/kill.py --schedule delayed --faults --kills 20

With `--ranks 2` as many ranks train together, under torchrun, and a kill is that of one of them,
drawn each time; the others end by themselves:

    python benchmarks/kill.py --schedule delayed --ranks 2 --kills 20
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

SCRIPT = Path(__file__).parents[1] / "train_split_affinity.py"
sys.path.insert(0, str(SCRIPT.parent))
from split_affinity.data.digits import write_digits

STEPS_IN_EPOCH = 13  # of 16 images each, of 15 % of the digits
COMPARED = ("model", "average", "optimizer", "scheduler", "progress", "ranks")


@dataclass(frozen=True)
class Job:
    """A run in a folder of its own, which goes on from what is there. It needs all that a
    checkpoint holds: dropout, mixup, a course of the learning rate, a moving average.
    """

    folder: Path
    schedule: str
    epochs: int
    save_steps: int = 1
    ranks: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * STEPS_IN_EPOCH

    def start(self, program: Sequence[str] = (str(SCRIPT),)) -> subprocess.Popen:
        """The process; what it prints goes to a file, since its loaders outlive it for a while."""
        files = {"data-path": "../digits", "output-dir": ".", "log-file": "logs.md"}
        options = (
            "--model resnet20 --subset 0.15 --image-size 32 --accumulate 2 -j 1 "
            f"-b {8 // self.ranks} "
            "--lr 0.01 --lr-scheduler cosine --lr-warmup-epochs 1 --mixup-alpha 0.2 --model-ema "
            f"--model-ema-decay 0.99 --epochs {self.epochs} --schedule {self.schedule} "
            f"--print-freq 1 --save-steps {self.save_steps} --resume auto "
            + " ".join(f"--{option} {path}" for option, path in files.items())
        )
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "printed.txt").open("w") as printed:
            launcher = f"-m torch.distributed.run --standalone --nproc-per-node {self.ranks}"
            before = launcher.split() if self.ranks > 1 else []
            return subprocess.Popen(
                [sys.executable, *before, *program, *options.split()],
                cwd=self.folder,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )

    def printed(self) -> str:
        """What the latest process has printed so far."""
        return (self.folder / "printed.txt").read_text()

    def begun_at(self) -> int:
        """The step after which the latest process went on."""
        resumed = re.search(r"^resumed from .*, after step (\d+)$", self.printed(), re.MULTILINE)
        return int(resumed[1]) if resumed else 0

    def made(self) -> list[int]:
        """The steps that the latest process has made."""
        return [int(step) for step in re.findall(r"^step (\d+)/", self.printed(), re.MULTILINE)]

    def victim(self, process: subprocess.Popen, draw: random.Random) -> psutil.Process:
        """The process to kill: the latest one, or one of its ranks, once they are there."""
        while self.ranks > 1 and process.poll() is None:
            ranks = psutil.Process(process.pid).children()
            if len(ranks) == self.ranks:
                return draw.choice(ranks)
            time.sleep(0.002)
        return psutil.Process(process.pid)

    def in_save(self, since: float) -> bool:
        """Whether the latest process, which began at that time, left half a save behind."""
        half = self.folder / "last.pt.tmp"
        return half.exists() and half.stat().st_mtime > since


def run_unbroken(job: Job) -> tuple[float, float]:
    """Run to the end; the seconds until the first step was made, and of a step and its save."""
    begin_s, made_s = time.perf_counter(), []
    process = job.start()
    while process.poll() is None:
        if len(job.made()) > len(made_s):
            made_s.append(time.perf_counter())
        time.sleep(0.002)
    finish(job, process)
    step_s = statistics.median(after - before for before, after in itertools.pairwise(made_s))
    return made_s[0] - begin_s, step_s


def finish(job: Job, process: subprocess.Popen) -> None:
    """Wait for the end of a run; ends the measurement if it is a bad one."""
    if process.wait():
        sys.exit(f"exit code {process.returncode}:\n{job.printed()}")


def go_on(job: Job, steps: int, delay_s: float) -> subprocess.Popen:
    """Go on for so many steps and a while."""
    process = job.start()
    while process.poll() is None and len(job.made()) < steps:
        time.sleep(0.002)
    time.sleep(delay_s)
    return process


def where(job: Job) -> str:
    """Which steps the latest process made."""
    made = job.made()
    return f"begun after step {job.begun_at()}, ended after step {made[-1]}" if made else "starting"


def kill(job: Job, draw: random.Random, signum: signal.Signals, steps: int, delay_s: float) -> str:
    """Go on for so many steps and a while, and kill the process; says what it was at."""
    since = time.time()
    process = go_on(job, steps, delay_s)
    job.victim(process, draw).send_signal(signum)
    if process.wait() == 0:
        sys.exit("the run ended before it could be killed: fewer kills fit into its steps")
    if process.returncode not in ((-signum, 128 + signum) if job.ranks == 1 else (1,)):
        sys.exit(f"{signum.name}: exit code {process.returncode}:\n{job.printed()}")
    text = where(job) + (", in a save" if job.in_save(since) else "")
    return f"{text}: exit code {process.returncode}"


def killed_loader(job: Job, steps: int, delay_s: float, draw: random.Random) -> subprocess.Popen:
    """As by the system when memory runs out."""
    process = go_on(job, steps, delay_s)
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children()[:1]:
            child.kill()
    process.wait(120)
    return process


def broken_pictures(job: Job, steps: int, delay_s: float, draw: random.Random) -> subprocess.Popen:
    """All of a digit; repaired once the process has ended."""
    process = go_on(job, steps, delay_s)
    paths = [*job.folder.parent.glob("digits/*/3/*.png")]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"no picture")
    process.wait(120)
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    return process


def full_disk(job: Job, steps: int, delay_s: float, draw: random.Random) -> subprocess.Popen:
    """No file can grow any more, the one that takes what is printed neither; then a signal."""
    return limited(go_on(job, steps, delay_s), resource.RLIMIT_FSIZE, 0)


def no_memory(job: Job, steps: int, delay_s: float, draw: random.Random) -> subprocess.Popen:
    """No more than there is, which may do for a while, until a signal."""
    return limited(go_on(job, steps, delay_s), resource.RLIMIT_AS, 2**20)


def limited(process: subprocess.Popen, what: int, limit: int) -> subprocess.Popen:
    """Limit a process from now on, and end it soon."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, what, (limit, resource.prlimit(process.pid, what)[1]))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    process.terminate()  # Python may wait for a thread that could not begin
    process.wait(120)
    return process


def refused_memory(job: Job, steps: int, delay_s: float, draw: random.Random) -> subprocess.Popen:
    """In one call of a phase; a step has two micro-batches."""
    phase, most = draw.choice(
        (("forward", 2), ("backward", 2), ("update", 1), ("step_end", 1), ("evaluate", 40))
    )
    call = most * steps + draw.randint(1, most)
    process = job.start((__file__, "refusing", phase, str(call)))
    process.wait(120)
    return process


def run_refusing(phase: str, call: str, *options: str) -> int:
    """The program, but that a call of a phase, counted from 1, asks for more than any memory."""
    from split_affinity.training.network import Network
    from split_affinity.training.update import TrainState
    from train_split_affinity import main as run

    kind = TrainState if hasattr(TrainState, phase) else Network
    real, count = getattr(kind, phase), itertools.count(1)

    def refused(*args: Any) -> Any:
        if next(count) == int(call):
            torch.empty(2**60, dtype=torch.uint8)
        return real(*args)

    setattr(kind, phase, refused)
    return run(options)


FAULTS = (killed_loader, broken_pictures, full_disk, no_memory, refused_memory)


def harm(job: Job, draw: random.Random, steps: int, delay_s: float) -> str:
    """Go on for so many steps and a while, and have the process meet a fault; says how it ended."""
    fault = draw.choice(FAULTS)
    process = fault(job, steps, delay_s, draw)
    if process.returncode == 0:
        sys.exit(f"{fault.__name__} came too late: fewer faults fit into the run's steps")
    reason = job.printed().strip().splitlines()[-1].rpartition("error: ")[2][:90]
    return f"{fault.__name__}, {where(job)}: exit code {process.returncode}, {reason}"


def differing(first: Any, second: Any, name: str = "") -> Iterator[str]:
    """The paths at which two saved values differ; times of day do not count."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted((first.keys() | second.keys()) - {"timestamp"}, key=str):
            yield from differing(first.get(key), second.get(key), f"{name}.{key}")
    elif type(first) is not type(second):
        yield name
    elif isinstance(first, (list, tuple)) and len(first) == len(second):
        for index, pair in enumerate(zip(first, second, strict=True)):
            yield from differing(*pair, f"{name}[{index}]")
    elif isinstance(first, torch.Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield name
    elif first != second:
        yield name


def main(
    schedule: str, signum: signal.Signals | None, kills: int, seed: int, ranks: int, root: Path
) -> int:
    """Run both, by faults if no signal is given; prints a line per kill and the verdict, returns
    the exit code.
    """
    write_digits(root / "digits")
    # A fault takes some steps to be met.
    epochs = max(3, math.ceil((2 if signum else 8) * kills / STEPS_IN_EPOCH))
    every = 1 if signum else 10**6
    names = "whole", "killed"
    whole, killed = (Job(root / name, schedule, epochs, every, ranks) for name in names)
    startup_s, step_s = run_unbroken(whole)
    print(
        f"{schedule}, {epochs} epochs of {STEPS_IN_EPOCH} steps: {startup_s:.1f} s to the first "
        f"step, {step_s:.3f} s a step with its save",
        flush=True,
    )
    draw = random.Random(seed)
    in_saves = reached = 0
    for number in range(1, kills + 1):
        # On average a run makes half of these steps, and half a one more.
        most = 2 * (whole.steps - reached) // (kills - number + 2) - 1
        steps = draw.randint(0, max(0, most))
        delay_s = draw.uniform(0, step_s if steps else startup_s)
        if signum:
            text = kill(killed, draw, signum, steps, delay_s)
        else:
            text = harm(killed, draw, steps, delay_s)
        in_saves += "in a save" in text
        reached = max(reached, *killed.made(), killed.begun_at())
        print(f"kill {number}: {text}", flush=True)
    finish(killed, killed.start())
    states = [torch.load(job.folder / "last.pt", weights_only=True) for job in (whole, killed)]
    pairs = ([state.get(part) for state in states] for part in COMPARED)
    found = [
        path for part, pair in zip(COMPARED, pairs, strict=True) for path in differing(*pair, part)
    ]
    by = f"kills by {signum.name}, {in_saves} of them in a save" if signum else "faults"
    print(f"{kills} {by}: ", end="")
    print("differs in " + ", ".join(found[:9]) if found else "equal to the unbroken run")
    return int(bool(found))


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    choices = ("sequential", "overlap", "delayed")
    parser.add_argument("--schedule", choices=choices, default="delayed")
    parser.add_argument(
        "--signal", choices=("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"), default="SIGKILL"
    )
    parser.add_argument("--faults", action="store_true", help="faults, not signals")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["refusing"]:
        sys.exit(run_refusing(*sys.argv[2:]))
    asked = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        signum = None if asked.faults else signal.Signals[asked.signal]
        sys.exit(main(asked.schedule, signum, asked.kills, asked.seed, asked.ranks, Path(folder)))
