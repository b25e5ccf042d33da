#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.10", "torchvision>=0.25", "pillow>=9.4", "psutil>=5.9", "fsspec>=2024.2",
#     "tqdm>=4.60", "matplotlib>=3.8", "imagehash>=4.3",
# ]
#
# [[tool.uv.index]]
# name = "pytorch-cpu"  # without gigabytes of CUDA
# url = "https://download.pytorch.org/whl/cpu"
# explicit = true
#
# [tool.uv.sources]
# torch = { index = "pytorch-cpu" }
# torchvision = { index = "pytorch-cpu" }
# ///
"""Train image classifiers on CPUs, forward and backward each on their own cores.

The machine's cores are divided into a forward group, which runs the forward pass, and a backward
group, which runs loss, backpropagation and the optimizer step: two simulated devices inside one
machine. Every phase is audited: how long it took, how much CPU time its threads used and on which
cores, and how much of that time strayed outside its group. On two cores the split costs speed, and
`compare` says how much on yours.

    python train_split_affinity.py --batch-size 32 --steps 50    train ResNet-50, report the phases
    python train_split_affinity.py data photos                   look at your pictures first
    python train_split_affinity.py plan --split 1:2              show how cores would be divided
    python train_split_affinity.py compare                       every schedule beside plain loops

This file tells the story, from `main` to the loop over optimizer steps. What it leans on has rooms
of its own in split_affinity/; each imports only from those named before it (docs/house.md):

    errors, text, terminal, files, signals    what everything else may use
    options/        every option once, read without PyTorch
    machine/        cores and caches; which cores each group gets
    lanes/          the threads that own the groups, and the audit of where they ran
    models/         classifiers and trained weights by name
    data/, ranks/   pictures as batches; processes that train one model together
    training/       what a step computes, and the schedules that lay it over two lanes
    checkpoints/    everything that a run needs to go on
    reports/        the phase table, logs.md, metrics.jsonl, pictures
    runs/           setting up, validating, and the commands predict, plan and find-lr
    compare/        all ways to train side by side, and a verdict
    inspection/     the command data: a look at all pictures before anything is trained
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from split_affinity import DROPPED_VARIABLES, PROGRAM
except ModuleNotFoundError:  # this file alone was copied
    print(f"{__file__}: error: the folder split_affinity is not beside it", file=sys.stderr)
    raise SystemExit(2) from None
from split_affinity.start import begin

if __name__ == "__main__":
    begin()  # PyTorch takes seconds to load: `--help` and wrong options end here

import torch

from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.resume import resume
from split_affinity.checkpoints.state import Progress, asked_again
from split_affinity.compare.command import compare
from split_affinity.counters.counters import open_counters
from split_affinity.data.dataset import describe_images
from split_affinity.data.loader import BadImages, open_loaders
from split_affinity.errors import RunError, Stopped, UserError, likely_reason, memory_errors
from split_affinity.files import write_traceback
from split_affinity.inspection.command import inspect
from split_affinity.lanes.lane import Lanes, coordinating
from split_affinity.machine.description import read_machine
from split_affinity.machine.plan import CorePlan
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import Topology, read_topology
from split_affinity.models.freezing import describe_frozen, is_frozen
from split_affinity.options.commands import how_to_go_on, parse_arguments
from split_affinity.options.settings import Settings, batches_in_step, learning_rate
from split_affinity.ranks.launch import Launch, launched
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks, connect
from split_affinity.reports.plots import RangeTest
from split_affinity.reports.run_report import RunReport
from split_affinity.reports.summary import SHORTEST_LOOK_S
from split_affinity.reports.tensorboard import check_tensorboard
from split_affinity.runs.arguments import parse_on_all_ranks
from split_affinity.runs.ending import end_well
from split_affinity.runs.evaluation import evaluate_and_report, finish_epoch
from split_affinity.runs.find_lr import find_lr_and_report, range_test_settings
from split_affinity.runs.plan import decide_plan, list_models, plan_lines, print_model
from split_affinity.runs.predict import predict
from split_affinity.runs.setup import (
    build_train_state,
    check_run,
    check_same_images,
    check_subset,
    start_with_same_weights,
)
from split_affinity.runs.starting_weights import teacher_lines
from split_affinity.signals import StopRequest, ending_at_once
from split_affinity.terminal import lossy_output, say, say_lines, silenced_output, warn
from split_affinity.text import plural, shown, try_print
from split_affinity.training.optimizer import (
    planned_steps,
    steps_in_epoch,
    total_steps,
    warmup_epochs,
)
from split_affinity.training.profiling import OperatorWatch
from split_affinity.training.steps import (
    Diverged,
    Run,
    StepResult,
    check_between_steps,
    check_same_weights,
    run_schedule,
)


@lossy_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    What a user can cause ends in one line, and is said once on each machine.
    """
    launch, argv = launched(), sys.argv[1:] if argv is None else argv
    quiet = silenced_output() if launch.rank else contextlib.nullcontext()
    with quiet, ending_at_once(not launch.local_rank):
        for name, value in DROPPED_VARIABLES.items() if not launch.rank else ():
            warn(f"{name}={value} is ignored: lanes have their own threads")
        return run_command(argv, launch)


def run_command(argv: Sequence[str], launch: Launch) -> int:
    """Run a command on all ranks. Returns the exit code: 2 for what the user can mend, 1 for what
    ended a run, 128 + N for signal N.
    """
    ranks, folder, error = ONE_PROCESS, None, None
    try:
        # Ranks need --timeout before they can talk, and agree on all other settings.
        ranks = connect(launch, parse_arguments(argv, ranks=launch.ranks)[1].timeout)
        command, settings = parse_on_all_ranks(argv, ranks)
        folder = settings.output_dir
        machine = read_machine(settings.machine) if settings.machine else read_topology()
        topology = ranks.meet(machine)
        if command in WITH_PLAN:
            plan, ranks = show_plan(settings, topology, ranks)
            result = WITH_PLAN[command](settings, topology, plan, ranks)
        else:
            result = WITHOUT_PLAN[command](settings, topology)
        if not ranks.rank:
            end_well(command, settings, result)
    except (Exception, KeyboardInterrupt) as raised:
        error = Stopped(signal.SIGINT) if type(raised) is KeyboardInterrupt else raised
    foreseen = isinstance(error, (UserError, RunError, Stopped))
    # A signal's handler has spoken already. Of an error that all ranks end with, the first rank of
    # each machine speaks.
    said = isinstance(error, KeyboardInterrupt) or (launch.local_rank and ranks.agreed and foreseen)
    if error and not said:
        say(f"{PROGRAM}: {error_text(error, folder)}", sys.stderr)
    ranks.close(not error or ranks.agreed)
    return getattr(error, "exit_code", RunError.exit_code) if error else 0


def error_text(error: Exception, folder: Path | None) -> str:
    """Why the program ends; a traceback of what was not foreseen goes into a file."""
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, (UserError, RunError)):
        return shown(f"error: {error}")
    return f"error: {shown(likely_reason(error))}; {write_traceback(folder, error)}"


def show_plan(settings: Settings, topology: Topology, ranks: Ranks) -> tuple[CorePlan, Ranks]:
    """Divide the cores into a forward and a backward group, and print them.

    `plan_cores` in machine/plan.py divides them; `--split auto` measures first. Returns the plan,
    and the ranks: `plan` may show some that nobody has started.
    """
    plan, ranks = decide_plan(settings, topology, ranks)
    precision, reason = choose_precision(settings, topology)
    lines = plan_lines(settings, topology, plan, ranks)
    say("\n".join([*lines, f"precision {precision}: {reason}"]))
    return plan, ranks


def train(
    asked: Settings, topology: Topology, plan: CorePlan, ranks: Ranks = ONE_PROCESS
) -> torch.nn.Module:
    """Train a model, or go on with that, and return it. Raises UserError before it writes.

    `asked` are the settings as you gave them, `run.settings` those in force.
    """
    if not ranks.rank:
        check_tensorboard(asked)
    with set_up(asked, topology, plan, ranks) as run:
        settings, network = run.settings, run.train_state.network
        run.bad.offer(asked)
        if settings.test_only:
            with run.stop:
                evaluate_and_report(run, asked)
            return network.model
        data = describe_images(run.data)
        checkpoints = Checkpoints(settings, warn, data, asked_again(asked, settings), ranks)
        with contextlib.closing(checkpoints):
            with ranks.together():
                check_same_images(ranks, data["fingerprint"], data.get("class_weights"))
                checkpoints.lock()  # loaders have been started, and do not share the lock
                progress, notes = resume(run, checkpoints)
                checkpoints.lock(make=True)  # a folder that was not there before
                run.bad.messages = progress.bad_images  # one list: it is saved with the progress
                check_subset(run, bool(progress.step))
            report = RunReport(settings, topology, run.plan, progress, asked, ranks)
            checkpoints.warn = report.alarm
            if is_frozen(settings, progress.epoch):
                notes.append(describe_frozen(settings, network.model, network.frozen))
            say_lines((*notes, *teacher_lines(settings), run.train_state.network.fusing))
            for text in run.notes:
                report.warn(text, text)
            if settings.epochs and not settings.output_dir:
                report.warn("unsaved", "nothing will be saved without --output-dir")
            with run.stop:
                fit(run, progress, report, checkpoints, asked)
    return network.model


@contextlib.contextmanager
def set_up(
    settings: Settings, topology: Topology, plan: CorePlan, ranks: Ranks = ONE_PROCESS
) -> Iterator[Run]:
    """Loaders, lanes and a model that is ready to train; loaders and lanes end with the context.

    Raises UserError if there can be no such run, on all ranks if on any.
    """
    with contextlib.ExitStack() as stack:
        with ranks.together(), memory_errors():
            settings, data, notes = check_run(settings, topology, plan, ranks)
            stop = StopRequest(ranks.size, "" if ranks.rank else "this step")
            stack.enter_context(coordinating(settings, plan))
            torch.manual_seed(settings.seed)
            # Loaders come first: no process may be forked once a lane has its OpenMP team.
            cpus = plan.loader_cpus
            train, val = open_loaders(stack, data, settings, cpus, ranks.rank, stop.check)
            lanes = stack.enter_context(Lanes(plan, topology.online, open_counters(settings, plan)))
            plan = lanes.plan
            counts = steps_in_epoch(settings, len(train)), planned_steps(settings, len(train))
            settings = dataclasses.replace(
                settings,
                lr=learning_rate(settings),
                lr_warmup_epochs=warmup_epochs(settings, *counts),
                forward_threads=plan.forward.threads,
                backward_threads=plan.backward.threads,
            )
            of_data = data.classes, ranks, data.class_weights
            state = build_train_state(settings, lanes, *counts, *of_data)
            fused = "on" if state.network.fused else "off"
            settings = dataclasses.replace(settings, fused_norm=fused)
        bad, notes = BadImages.of(settings, data), (*notes, *lanes.notes)
        run = Run(settings, topology, plan, data, train, val, lanes, state, stop, bad, notes)
        if ranks.size > 1:
            lanes.backward.adopt(ranks.start)
            start_with_same_weights(run)
        yield run


def fit(
    run: Run, progress: Progress, report: RunReport, checkpoints: Checkpoints, asked: Settings
) -> None:
    """Train until there is a reason to end; save and report on the way.

    An error ends the report too. The latest step is saved then, unless the run diverged or a rank
    has gone.
    """
    settings, run.stop.saves = run.settings, bool(run.settings.output_dir)
    save = partial(checkpoints.save, run.train_state, progress)
    report.watch = watch = OperatorWatch(run.lanes, run.train_state.network, settings.operators)
    try:
        while not (outcome := reason_to_end(settings, progress)):
            for result in watch.steps(train_epoch(run, progress)):
                report.step(result)
                check_between_steps(run)  # raises Stopped after a signal, on any rank
                report.bad_images(run.bad)
                if settings.save_steps and result.step % settings.save_steps == 0:
                    save()
            check_same_weights(run, progress.step)
            if epoch_done(settings, progress):
                if settings.epochs:
                    finish_epoch(run, progress, report)
                else:
                    progress.begin_epoch()
            save()
            check_between_steps(run)
    except Exception as error:
        run.lanes.close()  # what still runs there ends first
        together = run.ranks.agreed
        if together and not isinstance(error, Diverged):
            save()
        report.finish(likely_reason(error), together)
        said = run.bad.command and run.bad.command in str(error)
        if checkpoints.exist() and not said and not isinstance(error, Diverged):
            try_print(how_to_go_on(asked), sys.stdout)  # in one line, to be copied
        raise
    run.stop.begin("the report")
    report.contention(run.lanes.monitor.look(SHORTEST_LOOK_S))
    report.finish(outcome)


# One optimizer step over the two lanes, as `--schedule sequential` lays it. How `overlap` and
# `delayed` have both lanes work at once stands beside it in training/schedules.py.
#
#     for batch in batches:                                             # --accumulate
#         output = lanes.forward.run("forward", forward, batch)         # on the forward cores
#         lanes.backward.run("backward", backward, output)              # on the backward cores
#     lanes.backward.run("update", update)                              # there, too
#
# A lane is a thread that called os.sched_setaffinity and torch.set_num_threads before its first
# operation, so that all threads that PyTorch starts for it stay on its cores. Around each phase it
# sees that both still hold (lanes/lane.py); the audit tells who ran where (lanes/audit.py).


def train_epoch(run: Run, progress: Progress) -> Iterator[StepResult]:
    """Make the steps that are left of an epoch, or of the run; gives the result of each.

    Contention is looked for between two steps, where it costs none of their time.
    """
    settings = run.settings
    left = total_steps(settings, progress.epoch_batches) - progress.step
    taken = batches_in_step(settings)
    whole = steps_in_epoch(settings, len(run.train)) * taken
    stop = min(whole, progress.batches + left * taken)
    if progress.batches >= stop:
        return
    if run.train_state.network.frozen and not is_frozen(settings, progress.epoch):
        say(f"thawed: epoch {progress.epoch + 1} trains all weights")
        run.lanes.backward.call(run.train_state.thaw)
    run.stop.begin("this step")
    with run.ranks.together():
        batches = run.train.batches(run.bad, progress.epoch + 1, progress.batches, stop)
    for result in run_schedule(settings, run.lanes, run.train_state, batches, progress.step + 1):
        progress.add_step(result.images, result.loss, result.top1, result.top5, taken)
        progress.lr = result.lr
        run.stop.begin("this step", result.step_s)
        yield dataclasses.replace(result, contention=run.lanes.monitor.look())


def epoch_done(settings: Settings, progress: Progress) -> bool:
    """Whether the running epoch has all its steps."""
    steps = steps_in_epoch(settings, progress.epoch_batches)
    return progress.batches >= steps * batches_in_step(settings)


def reason_to_end(settings: Settings, progress: Progress) -> str | None:
    """Why a run is over, or None; None too while a finished epoch waits for its validation."""
    if epoch_done(settings, progress):
        return None
    if progress.step >= total_steps(settings, progress.epoch_batches):
        return "finished"
    scores = [row["val_top1"] for row in progress.history if row["val_top1"] is not None]
    target, patience = settings.target_top1, settings.early_stopping
    if target and len(scores) >= 2 and min(scores[-2:]) >= target:
        return f"top-1 of {target:g} % reached in two validations"
    if patience and len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience]):
        return f"no better top-1 in {plural(patience, 'epoch')}: stopped early"
    return None


def find_lr(
    settings: Settings, topology: Topology, plan: CorePlan, ranks: Ranks = ONE_PROCESS
) -> RangeTest:
    """The `find-lr` command: try learning rates on a run that is set up like one to train."""
    with set_up(range_test_settings(settings), topology, plan, ranks) as run, run.stop:
        return find_lr_and_report(run)


# The commands, by whether the cores and their plan are shown first.
WITH_PLAN: dict[str, Callable[[Settings, Topology, CorePlan, Ranks], Any]] = {
    "train": train,
    "plan": print_model,
    "find-lr": find_lr,
}
WITHOUT_PLAN: dict[str, Callable[[Settings, Topology], Any]] = {
    "compare": compare,
    "data": inspect,
    "predict": predict,
    "list-models": list_models,
}

if __name__ == "__main__":
    sys.exit(main())
