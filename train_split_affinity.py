#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.10", "torchvision>=0.25", "pillow>=9.4", "psutil>=5.9", "fsspec>=2024.2",
#     "tqdm>=4.60", "matplotlib>=3.8",
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
`compare` says how much on yours; docs/performance.md has what was measured so far.

    python train_split_affinity.py --batch-size 32 --steps 50    train ResNet-50, report the phases
    python train_split_affinity.py --recipe cifar10 --data-path cifar --download    a whole training
    python train_split_affinity.py plan --split 1:2              show how cores would be divided
    python train_split_affinity.py compare                       every schedule beside plain loops
    python train_split_affinity.py predict new --resume out/mine/best.pt    what new pictures show
    torchrun --nproc-per-node 2 train_split_affinity.py --recipe imagenet --data-path imagenet
                                                    two processes, each with a split of its own

Vocabulary. A *lane* is one long-lived thread that owns one core group, used like a device queue. A
*phase* is one piece of work on a lane: forward; backward (loss and backpropagation); update. A
*schedule* lays the phases of one optimizer step over the two lanes. *Stray time* is CPU time used
during a phase by compute threads that may run outside the phase's group. A *rank* is one of several
processes that train one model together, with a part of the cores; they add their gradients up in a
phase of its own, reduce.

Sections, each using only those above it:

    1  Settings and options    every option once, --help; the errors a user can meet
    2  Topology and core plan  what the machine has, and which cores each group gets
    3  Lanes                   threads that stay on their cores, and the audit that proves it
    4  Models                  classifiers and trained weights by name; models of our own
    5  Data                    image folders, data sets by name and synthetic images, as batches
    6  Recipe                  optimizer, learning rate, moving average, gradient norms
    7  Ranks                   processes that train one model together, as torchrun starts them
    8  Schedules               optimizer steps over two lanes
    9  Checkpoints             everything that a run needs to go on, in files that stay whole
    10 Summary                 what the records of a run add up to
    11 Timelines               what every lane and core did when, as a picture and as a trace
    12 Reports                 progress, the summary, logs.md, metrics.jsonl, curves
    13 Training                steps, epochs, validation, and reasons to stop
    14 Runs                    how a run is set up, resumed, taken to its end; testing, asking it
    15 Measurement             phase times, and the split that suits a machine
    16 Comparison              all ways to train side by side, and a verdict
    17 Commands                commands to what they do, errors to exit codes

PyTorch and other packages are imported between the first two sections: that takes seconds, for
which nobody shall wait who asks for `--help`, or has misspelt an option.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from split_affinity import ALLOWED_CPUS, DROPPED_VARIABLES, PROGRAM, __version__, process_cpus  # noqa: F401
from split_affinity.errors import (  # noqa: F401
    LESS_MEMORY,
    LIKELY_REASONS,
    STOP_SIGNALS,
    RunError,
    Stopped,
    UserError,
    likely_reason,
    memory_errors,
    one_line,
)
from split_affinity.files import (  # noqa: F401
    LOCK,
    TRACEBACK,
    append_bytes,
    append_text,
    can_be_edited,
    check_appendable,
    flush_folder,
    link_file,
    lock_folder,
    read_text,
    replace_text,
    why_not_saved,
    write_end,
    write_traceback,
    write_whole,
)
from split_affinity.options.command_line import (  # noqa: F401
    ALIASES,
    ASKED_WITH,
    COMMANDS,
    Command,
    Parser,
    Tell,
    add_option,
    build_parser,
    command_defaults,
    describe_command,
    describe_use,
    installed_version,
    is_shown,
    parse_arguments,
    split_arguments,
    typed_options,
    version_line,
)
from split_affinity.options.contradictions import (  # noqa: F401
    ALONE,
    checkpoint_contradictions,
    command_contradictions,
    contradictions,
    data_contradictions,
    is_name,
    prediction_contradictions,
    rank_contradictions,
    rate_contradictions,
    resizing_contradictions,
    teacher_contradictions,
    typed_contradictions,
)
from split_affinity.options.data_sets import (  # noqa: F401
    DATA_SETS,
    IMAGE_FOLDER,
    IMAGENET_FILES,
    NAMED_DATA,
    NOT_MIRRORED,
    SYNTHETIC,
    VAL_SHARE,
    NamedData,
    describe_data_set,
    parse_data_set,
)
from split_affinity.options.recipes import (  # noqa: F401
    FROM_CHECKPOINT,
    GIVE_WEIGHTS,
    RECIPES,
    list_recipes,
    recipe_defaults,
)
from split_affinity.options.settings import (  # noqa: F401
    COMPARED_BATCHES,
    MOST_CLASSES,
    MOST_SYNTHETIC_IMAGES,
    RESIZING_STEP,
    AugmentationSettings,
    CheckpointSettings,
    ComparisonSettings,
    CoreSettings,
    DataSettings,
    PredictionSettings,
    RankSettings,
    ReportSettings,
    Settings,
    SpeedSettings,
    TrainingSettings,
    as_options,
    batches_in_step,
    fixed,
    free,
    images_in_step,
    learning_rate,
    option,
    plain_settings,
    rate,
    settings_of,
)
from split_affinity.options.values import (  # noqa: F401
    BELOW_1,
    COUNT,
    COUNT_FROM_0,
    LARGEST_CPU,
    LARGEST_NUMBER,
    METAVARS,
    MIXING,
    NOT_NEGATIVE,
    PART,
    PERCENT,
    SHARE,
    Values,
    channels,
    number,
    parse_cpu_list,
    parse_milestones,
    parse_split,
    whole_number,
)
from split_affinity.ranks.launch import Launch, launched  # noqa: F401
from split_affinity.text import (  # noqa: F401
    alike,
    as_option,
    csv_text,
    format_cpu_list,
    markdown_table,
    nearest,
    nearest_of_each,
    option_text,
    plural,
    readable,
    span_text,
    speed_text,
    tell,
    utc_now,
)

# ==================================================================================================
# 1  Settings and options
# Every option once: name, default, help, parser. Parsers are pure; they take the user's text and
# return a checked value, or raise with a message that quotes the text and says what is allowed.
# Below them the commands and the command line, which need Python's own library alone.
# ==================================================================================================


ENDED_WITHIN_S = 5  # a launcher ends the other processes of a machine once one has failed


# fmt: on


# fmt: on


# fmt: on


# ==================================================================================================
# Imports that take seconds
# They stand below all that `--help` and wrong arguments need: a script ends above them with these.
# ==================================================================================================


def end_early() -> None:
    """End a script here if its arguments are wrong, or ask for nothing but a text."""
    launch = launched()
    try:
        parse_arguments(sys.argv[1:], ranks=launch.ranks)
    except UserError as error:
        if launch.local_rank:  # which the launcher ends as soon as the first one has said why
            time.sleep(ENDED_WITHIN_S)
        else:
            tell(f"{PROGRAM}: error: {readable(str(error))}", sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    end_early()


def explain_import_error(error: Exception) -> str:
    """One line that says which packages do not fit together and how to mend it."""
    versions = (f"{package} {installed_version(package)}" for package in ("torch", "torchvision"))
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{PROGRAM}: error: cannot load {' with '.join(versions)}: {reason}; a torch "
        "release needs the torchvision made for it: pip install --upgrade -r requirements.txt"
    )


try:
    import psutil
    import torch
    from torch import distributed, nn
except (ImportError, RuntimeError, OSError) as import_error:
    if __name__ != "__main__":
        raise
    print(explain_import_error(import_error), file=sys.stderr)
    raise SystemExit(2) from None
from split_affinity.checkpoints.folder import (  # noqa: F401
    BEST,
    KEPT,
    LAST,
    LAST_UPLOADS_S,
    PREVIOUS,
    UPLOAD_ATTEMPTS,
    Checkpoints,
    Mirror,
)
from split_affinity.checkpoints.resume import (  # noqa: F401
    IN_PLACE_OF,
    check_classes,
    check_new,
    check_resumable,
    check_same_classes,
    check_same_step,
    defaults_to_ask,
    defaults_to_go_on,
    find_again,
    find_resumed,
    find_to_go_on,
    fitting,
    resume,
    saved_defaults,
)
from split_affinity.checkpoints.state import (  # noqa: F401
    BY_MACHINE,
    CHECKPOINT_FORMAT,
    NOT_TAKEN,
    ON_RESUME,
    PLACES,
    SEAL,
    SEAL_BYTES,
    STATE_FIELDS,
    BadCheckpoint,
    Digested,
    Progress,
    State,
    asked_again,
    best_epoch,
    fault_of_state,
    fault_of_values,
    is_sealed,
    load_plain,
    make_state,
    preprocessing_of,
    read_checkpoint,
    restore_part,
    restore_state,
    saved_settings,
    seal,
    settings_to_go_on,
    verify_checkpoint,
    versions,
    write_verified,
)
from split_affinity.data.classes import (  # noqa: F401
    WORDNET_STEPS,
    Renumbered,
    confused_classes,
    knows_classes,
    match_classes,
    named_classes,
    spelling,
    with_known_classes,
    wordnet_ids,
)
from split_affinity.data.dataset import (  # noqa: F401
    choose_images,
    describe_data,
    describe_images,
    drawn,
    find_data,
    open_data,
    unvalidated_classes,
    with_validation,
)
from split_affinity.data.image_folder import (  # noqa: F401
    VALIDATION_FOLDERS,
    PictureFolder,
    folder_data,
    open_image_folder,
    what_is,
)
from split_affinity.data.loader import (  # noqa: F401
    BadImages,
    Batches,
    Feed,
    LoaderDied,
    check_open_files,
    child_signal_kept,
    picture_feed,
    start_loader,
    training_feed,
    validation_feed,
)
from split_affinity.data.named import (  # noqa: F401
    BY_FLAG,
    CIFAR10,
    CIFAR10_FOLDER,
    CIFAR10_MEAN,
    CIFAR10_STD,
    READERS,
    SYNTHETIC_CLASSES,
    SYNTHETIC_IMAGES,
    SYNTHETIC_PATTERNS,
    TRAIN_TEST,
    TRAIN_VAL,
    Pictures,
    Reader,
    SyntheticImages,
    file_samples,
    named_data,
    names_of_classes,
    prepare_imagenet,
    sets,
    synthetic_data,
    whole,
    why_not_read,
)
from split_affinity.data.pictures import (  # noqa: F401
    BrokenImage,
    ImageData,
    NewPictures,
    derived_seed,
    kept_apart,
    load_image,
    picture_files,
    pictures_in,
    to_rgb,
)
from split_affinity.data.samples import (  # noqa: F401
    Batch,
    EpochOrder,
    Loaded,
    LoadRecord,
    SampleKey,
    Samples,
    shared,
)
from split_affinity.data.transforms import (  # noqa: F401
    auto_augmentation,
    image_size_in,
    mixing_transform,
    same_transform,
    to_tensor,
    training_transform,
    transform_of_epoch,
    validation_transform,
)
from split_affinity.lanes.audit import (  # noqa: F401
    LOOK_SHARE,
    NOT_LOOKED_AT,
    STRAY_WARNING_SHARE,
    UNKNOWN,
    Audit,
    PhaseRecord,
    Reading,
    children_cpu_ns,
    cpu_busy_s,
    last_cpu,
    placement_warnings,
    process_cpu_ns,
    thread_clocks_ns,
    thread_cpu_ns,
    thread_ids,
    thread_role,
)
from split_affinity.lanes.contention import (  # noqa: F401
    COMPANY_SHARE,
    Company,
    Lookout,
    Usage,
    company_between,
    joined,
    less_own_s,
    own_time_s,
    read_usage,
)
from split_affinity.lanes.lane import (  # noqa: F401
    Lane,
    Lanes,
    confine_thread,
    confined_to,
    coordinating,
    give_memory_back,
    start_team,
    tune_allocator,
)
from split_affinity.machine.description import (  # noqa: F401
    CORE_FIELDS,
    MACHINE_FIELDS,
    MACHINE_FORMAT,
    MACHINE_VERSION,
    core_rows,
    cpu_mark,
    describe_plan,
    describe_topology,
    draw_plan,
    exact_number,
    machine_text,
    number_or,
    one_of,
    parse_fields,
    parse_machine,
    read_machine,
)
from split_affinity.machine.plan import (  # noqa: F401
    CorePlan,
    Group,
    Host,
    PhaseTimes,
    check_core_options,
    check_cpus,
    divide_cores,
    forward_count,
    fullest_subset,
    make_group,
    plan_cores,
    plan_notes,
    rank_topology,
    share_by_kind,
    share_out,
    split_name,
    take,
    this_host,
    usable_cores,
)
from split_affinity.machine.topology import (  # noqa: F401
    BF16_FLAGS,
    CONTAINERS,
    VIRTUAL_MAKERS,
    Core,
    Topology,
    cgroups,
    cpus_of,
    host_kind,
    is_virtual,
    machine_metrics,
    read_bf16,
    read_capacities,
    read_core,
    read_cpu_model,
    read_cpus,
    read_memory,
    read_number,
    read_quota,
    read_topology,
)
from split_affinity.models.cost import (  # noqa: F401
    ModelFigures,
    check_memory,
    describe_model,
    describe_teacher,
    measure_model,
    weight_copies,
)
from split_affinity.models.freezing import (  # noqa: F401
    begin_training,
    describe_frozen,
    freeze,
    is_frozen,
    layer_groups,
    mostly_frozen,
    trained,
)
from split_affinity.models.own import (  # noqa: F401
    ChannelAttention,
    Hybrid,
    PadShortcut,
    SmallResNet,
    TokenEncoder,
    init_convolutions,
    normalised_linear,
)
from split_affinity.models.pretrained import (  # noqa: F401
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    Pretrained,
    describe_weights,
    find_timm_weights,
    find_weights,
    imagenet_classes,
    largest_size,
    load_timm,
    load_torchvision,
    timm_cache,
    timm_classes,
)
from split_affinity.models.registry import (  # noqa: F401
    OWN_MODELS,
    TIMM,
    WITH_HEADS,
    build_model,
    build_timm,
    builder_options,
    check_input_shape,
    check_model_name,
    check_timm_name,
    classifier_names,
    leave_blocks_out,
    library_model,
    meta_model,
    parameter_count,
    skipped,
    timm_package,
    timm_tags,
)
from split_affinity.models.weights import (  # noqa: F401
    DENSENET_NAMES,
    Weights,
    classifier_weights,
    listed_tensors,
    take_weights,
    versioned,
    with_tensors,
)
from split_affinity.ranks.ranks import (  # noqa: F401
    ONE_PROCESS,
    RankLost,
    Ranks,
    SeveralRanks,
    connect,
    machines_of,
    network_interface,
    rank_lines,
    rank_metrics,
)
from split_affinity.ranks.reducer import BUCKET_BYTES, Bucket, Reducer, make_buckets  # noqa: F401
from split_affinity.reports.confusion import (  # noqa: F401
    CLASSES_TO_SHOW,
    CONFUSED,
    CONFUSION,
    LARGEST_MATRIX,
    LONGEST_NAME,
    PAIRS,
    PAIRS_TO_WRITE,
    class_lines,
    confused_json,
    confusion_csv,
    confusion_matrix,
    draw_confusion,
    images_by_class,
    pairs_csv,
    worst_pairs,
    write_confusion,
)
from split_affinity.reports.log import (  # noqa: F401
    FENCE,
    LOG_HEADER,
    LogSection,
    log_heading,
    log_summary,
    picture_footer,
)
from split_affinity.reports.plots import (  # noqa: F401
    RangeTest,
    draw_curves,
    draw_gradients,
    draw_range_test,
    save_axes,
)
from split_affinity.reports.run_report import (  # noqa: F401
    RANKS_TO_DRAW,
    RANKS_WITH_CORES,
    STEPS_OF_RANKS,
    RankFigures,
    RunReport,
    rank_panels,
)
from split_affinity.reports.summary import (  # noqa: F401
    COMPANY_WINDOW_S,
    LATEST_STEPS,
    SHORTEST_LOOK_S,
    STEPS_TO_DRAW,
    PhaseSummary,
    Summary,
    Tally,
    covered_s,
    lanes_busy,
    memory_by_node,
    parse_numa_maps,
    peak_memory_bytes,
    running_alone,
)
from split_affinity.reports.tables import (  # noqa: F401
    BAR,
    COMPANY_IN_SUMMARY,
    CURVES,
    EPOCH_FIELDS,
    GRADIENTS,
    METRICS,
    PARTS,
    RANGE_PLOT,
    RAW_FIELDS,
    RECENT_STEPS,
    TENSORBOARD,
    TIMELINE,
    TRACE,
    WIDE_COLUMNS,
    bar_text,
    company_texts,
    cpu_table,
    describe_run,
    epoch_line,
    memory_lines,
    phase_table,
    rank_table,
    result_lines,
    step_figures,
    step_line,
    summary_lines,
    tables_of_ranks,
)
from split_affinity.reports.tensorboard import (  # noqa: F401
    EventFile,
    check_tensorboard,
    epoch_scalars,
    event_record,
    step_scalars,
)
from split_affinity.reports.timeline import (  # noqa: F401
    COLOURS,
    ELSE,
    EXPLANATION,
    IDLE,
    OTHERS,
    PHASES_TO_DRAW,
    ROWS_TO_DRAW,
    SHORT_PHASE_S,
    STOLEN,
    Bar,
    Panel,
    Row,
    busy_between_phases,
    busy_in_phase,
    by_start,
    cpu_bars,
    draw_bar,
    draw_panel,
    draw_timelines,
    extent_s,
    lane_bars,
    new_figure,
    number_batches,
    owned_phases,
    panel_rows,
    save_figure,
    spaced,
    stacked,
    steps_to_draw,
)
from split_affinity.reports.trace import by_one_clock, shifted, trace_events, trace_of_ranks  # noqa: F401
from split_affinity.runs.arguments import OF_A_MACHINE, check_same_options, parse_together  # noqa: F401
from split_affinity.runs.evaluation import (  # noqa: F401
    VALIDATED_AHEAD,
    evaluate,
    finish_epoch,
    load_to_test,
    test,
    validated,
    warn_of_known_images,
)
from split_affinity.runs.find_lr import (  # noqa: F401
    RANGE,
    RANGE_STEPS,
    endless_steps,
    find_lr,
    find_lr_and_report,
    judge_rates,
    quarter_decade,
)
from split_affinity.runs.measurement import (  # noqa: F401
    Elsewhere,
    choose_split,
    core_counts,
    measure_scaling,
    measured_settings,
    phase_times,
    plan_for,
    send_to_all,
    serve,
    split_bounds_s,
    time_groups,
    time_phases,
    times_on,
)
from split_affinity.runs.plan import imagined, list_models, print_model  # noqa: F401
from split_affinity.runs.predict import (  # noqa: F401
    ANSWERS,
    MANY_PICTURES,
    Answer,
    Trained,
    answered,
    answers_json,
    likeliest,
    load_pretrained,
    load_trained,
    model_to_ask,
    predict,
    probabilities,
    set_up_to_ask,
    trained_model,
)
from split_affinity.runs.setup import (  # noqa: F401
    SUBSET,
    begin_alike,
    build_work,
    check_json,
    check_same_images,
    check_subset,
    check_validation,
    check_writable,
    choose_precision,
    prepare,
    prepared,
    set_up,
    settings_in_force,
)
from split_affinity.runs.starting_weights import (  # noqa: F401
    WEIGHTS_IN,
    WRAPPERS,
    SavedWeights,
    build_teacher,
    check_teacher,
    load_safetensors,
    plain_weights,
    read_teacher,
    read_weights,
    renormalised,
    start_with_weights,
    starting_model,
    take_file,
    teacher_lines,
    teacher_name,
)
from split_affinity.terminal import (  # noqa: F401
    Lossy,
    fitted,
    lossy,
    lossy_output,
    say,
    silent,
    terminal_columns,
    warn,
)
from split_affinity.training.network import (  # noqa: F401
    Confusion,
    Network,
    NonFiniteLoss,
    Output,
    Scores,
    StepEnd,
    Teacher,
    in_turn,
    pool,
    score,
)
from split_affinity.training.optimizer import (  # noqa: F401
    BIASES,
    NORMS,
    WARMUP_START,
    Cosine,
    InProportion,
    Restarts,
    begin_momentum,
    build_lr_scheduler,
    build_optimizer,
    main_scheduler,
    optimizer_groups,
    planned_steps,
    steps_in_epoch,
    total_steps,
    warmup_epochs,
    weights_by_decay,
)
from split_affinity.training.schedules import (  # noqa: F401
    SCHEDULES,
    Steps,
    delayed,
    overlap,
    sequential,
    step_bound_s,
    submit_update,
)
from split_affinity.training.steps import (  # noqa: F401
    PHASES,
    Diverged,
    Run,
    StepResult,
    StopRequest,
    agreed_error,
    check_same_weights,
    hear_others,
    run_schedule,
    scores_of_ranks,
)
from split_affinity.training.update import (  # noqa: F401
    EXPLODING_NORM,
    STEPS_BETWEEN_NORMS,
    VANISHING_NORM,
    GradientFlow,
    MovingAverage,
    Part,
    Work,
    build_average,
    gradient_warnings,
    mean_part,
)

# ==================================================================================================
# 2  Topology and core plan
# What the machine has (read from sysfs, cgroup files and the process mask, under a root that tests
# can replace), and a pure function that decides which logical CPUs each group gets.
# ==================================================================================================


# ==================================================================================================
# 3  Lanes
# A lane is one persistent thread that owns one core group. Its OpenMP team is born inside the
# group's affinity mask and stays there: moving only the calling thread would leave the workers of
# an older team where they were [pytorch 161576]. The audit reads, at both ends of every phase, how
# much CPU time each thread of the process has used, and who was allowed to run where. The lookout
# tells what everybody else used of the same cores.
# ==================================================================================================


# ==================================================================================================
# 4  Models
# torchvision's and timm's classifiers by name, a ResNet for small images, and a hybrid of
# convolutions and a transformer; how pictures are made ready for a model; trained weights by name.
# Knows nothing of cores.
# ==================================================================================================


# ==================================================================================================
# 5  Data
# Image folders, data sets by name and synthetic images as streams of batches. What a sample looks
# like depends only on (seed, epoch, index): not on the number of loader processes, nor on where a
# run was resumed. Knows nothing of lanes; loader processes are told which CPUs to stay on.
# ==================================================================================================


# fmt: on


# ==================================================================================================
# 6  Recipe
# How weights are updated: optimizer, course of the learning rate, moving average, and a watch on
# the gradients. Knows nothing of cores.
# ==================================================================================================


# ==================================================================================================
# 7  Ranks
# Processes that train one model together, each on its own part of the micro-batches and, on one
# machine, of the cores (data parallelism). torchrun starts them; torch.distributed, with gloo,
# carries what they tell each other. Whatever depends on there being several asks the class Ranks.
# ==================================================================================================


# ==================================================================================================
# 8  Schedules
# A schedule lays optimizer steps over the two lanes. It is a generator: each `next` runs one step
# and gives the scores of each of its micro-batches, until the batches run out. All schedules share
# the same phase functions, hold no more than two micro-batches of activations, and read data only
# while no forward pass runs (see Batches.prefetch).
# ==================================================================================================


# ==================================================================================================
# 9  Checkpoints
# Everything that a run needs to go on, in files that are whole or not there at all; and weights in
# files of other programs. Knows nothing of cores.
# ==================================================================================================


# ==================================================================================================
# 10 Summary
# What the records of a run add up to. Pure, but for readings of the memory in use.
# ==================================================================================================


# ==================================================================================================
# 11 Timelines
# What every lane and core did when, as a picture, and as a trace for Perfetto or chrome://tracing.
# ==================================================================================================


# ==================================================================================================
# 12 Reports
# What a run tells: progress on the screen, the summary table, a section of logs.md, metrics.jsonl,
# TensorBoard's files, the pictures. Pure functions turn figures into text; RunReport writes.
# ==================================================================================================


# ==================================================================================================
# 13 Training
# The loop over steps and epochs, validation, and reasons to stop. Knows nothing of flags.
# ==================================================================================================


def train_epoch(run: Run, progress: Progress) -> Iterator[StepResult]:
    """The steps that are left of an epoch, and of the run; between them is looked who else is
    there, while no step is timed.
    """
    settings = run.settings
    left = total_steps(settings, progress.epoch_batches) - progress.step
    taken = batches_in_step(settings)
    whole = steps_in_epoch(settings, len(run.train)) * taken
    stop = min(whole, progress.batches + left * taken)
    if progress.batches >= stop:
        return
    if run.work.network.frozen and not is_frozen(settings, progress.epoch):
        say(f"thawed: epoch {progress.epoch + 1} trains all weights")
        run.lanes.backward.call(run.work.thaw)
    batches = run.train.batches(run.bad, progress.epoch + 1, progress.batches, stop)
    for result in run_schedule(settings, run.lanes, run.work, batches, progress.step + 1):
        counts = result.images, result.loss, result.top1, result.top5
        progress.add_step(*counts, taken)
        progress.lr = result.lr
        yield dataclasses.replace(result, company=run.lanes.lookout.look())


def epoch_done(settings: Settings, progress: Progress) -> bool:
    """Whether all steps of the running epoch have been made."""
    steps = steps_in_epoch(settings, progress.epoch_batches)
    return progress.batches >= steps * batches_in_step(settings)


def reason_to_end(settings: Settings, progress: Progress) -> str | None:
    """Why a run is over, if it is; never while a finished epoch waits for its validation."""
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


def fit(run: Run, progress: Progress, report: RunReport, checkpoints: Checkpoints) -> None:
    """Train until there is a reason to end, and save what is to be saved. However that goes, the
    report gets an end, and the latest step is saved, unless the run diverged, or a rank has gone.
    """
    settings = run.settings
    save = partial(checkpoints.save, run.work, progress)
    try:
        while not (outcome := reason_to_end(settings, progress)):
            for result in train_epoch(run, progress):
                report.step(result)
                hear_others(run)
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
            hear_others(run)
    except Exception as error:
        run.lanes.close()  # what still runs there ends first
        together = run.ranks.agreed
        if together and not isinstance(error, Diverged):
            save()
        report.finish(likely_reason(error), together)
        raise
    report.company(run.lanes.lookout.look(SHORTEST_LOOK_S))
    report.finish(outcome)


# ==================================================================================================
# 14 Runs
# How a run is set up, resumed and taken to its end; testing a checkpoint, asking it what pictures
# show, and finding a rate.
# ==================================================================================================


def train(
    settings: Settings, topology: Topology, plan: CorePlan, ranks: Ranks = ONE_PROCESS
) -> nn.Module:
    """A whole run; returns the trained model. Raises UserError before anything is written."""
    if not ranks.rank:
        check_tensorboard(settings)
    with prepared(settings, topology, plan, ranks) as run:
        data = None if run.settings.test_only else describe_images(run.data)
        with ranks.together():
            check_same_images(ranks, data and data["fingerprint"])
        asked = asked_again(settings, run.settings)
        checkpoints = Checkpoints(run.settings, warn, data, asked, ranks)
        with contextlib.closing(checkpoints):
            if run.settings.test_only:
                test(run, ranks.first(find_resumed, run.settings, checkpoints))
                return run.work.network.model
            with ranks.together():
                checkpoints.hold()  # the loaders, which would share the lock, have been started
                progress, notes = resume(run, checkpoints)
                checkpoints.hold(make=True)
                run.bad.messages = progress.bad_images  # one list: what is found is saved
                check_subset(run, bool(progress.step))
            report = RunReport(run.settings, topology, run.plan, progress, settings, ranks)
            checkpoints.warn = report.alarm
            if is_frozen(run.settings, progress.epoch):
                network = run.work.network
                notes.append(describe_frozen(run.settings, network.model, network.frozen))
            for text in (*notes, *teacher_lines(run.settings)):
                say(text)
            for text in run.notes:
                report.warn(text, text)
            if run.settings.epochs and not run.settings.output_dir:
                report.warn("unsaved", "nothing will be saved without --output-dir")
            fit(run, progress, report, checkpoints)
    return run.work.network.model


# ==================================================================================================
# 15 Measurement
# What this machine makes of the work: phase times, and the split that suits them. What is measured
# runs in processes of its own, since the allocator's settings, threads and peak memory belong to a
# process, and only one of them works at a time.
# ==================================================================================================


# ==================================================================================================
# 16 Comparison
# All ways to train, in turn and round by round: plain loops, one lane, and for each split every
# schedule, and two ranks on its groups; their figures side by side, and a verdict.
# ==================================================================================================

ROUNDS = 7
MOST_REPEATS = 3  # of disturbed rounds
TIME_LIMIT_S = 14 * 60  # for a comparison whose steps nobody has counted
# To measure of a way in a round, where steps are short.
LEAST_STEPS_S = 2.0
MOST_STEPS = 32
PRELOADED_BATCHES = 8  # at the least


@dataclass(frozen=True)
class Way:
    """One way to train: a plain PyTorch loop, or this program's own on the lanes of a plan; or in
    two ranks, one on each of the plan's groups. Phases without company are timed for it if its
    batches are not those of `sequential`, whose phases tell the same where they are.
    """

    name: str
    settings: Settings
    plan: CorePlan
    times_phases: bool = False

    @property
    def plain(self) -> bool:
        """Whether this is a plain loop, without lanes."""
        return self.name.startswith("plain")

    @property
    def ranks(self) -> int:
        """In how many processes it trains."""
        return self.settings.ranks

    @property
    def strict(self) -> bool:
        """Whether batches come strictly one after the other: then a part of a step tells all."""
        return self.settings.schedule == "sequential"

    @property
    def warmup(self) -> int:
        """Batches to leave out of a round: memory that others have had meanwhile is fetched again.
        Of two phases that are timed for themselves, the one whose memory was there is taken.
        """
        return 2 if self.times_phases else 1


@dataclass(frozen=True)
class Order:
    """What a way to train shall do in a round: steps of so many batches to measure; and whether it
    may keep its memory afterwards. Round 0 is the one to warm up.
    """

    number: int
    batches: int
    steps: int
    keep_memory: bool


Rounds = Generator["Round | None", Order, None]
ByLane = dict[str, float]  # a figure of each lane, by the lane's name
Supply = Callable[[int, int], Batches]  # of a round, by its number, so many batches
CORES_OF_GROUPS = ("forward_cores", "backward_cores", "forward_threads", "backward_threads")


@dataclass(frozen=True)
class Round:
    """What one way to train did in one round of a comparison. Lanes by name; plain has none.

    `alone` are phase times without company, `matrix_flops` the lane's rate in matrix products. The
    steps have `share` of the batches of a whole one, and an update, of `update_s`; that of ranks
    has the sum of their gradients in it, from when the last of them has its own.
    """

    steps: tuple[StepResult, ...]
    busy: ByLane
    alone: PhaseTimes | None
    matrix_flops: ByLane
    peak_memory_bytes: int
    update_s: float = 0.0
    share: float = 1.0

    @property
    def step_s(self) -> float:
        """Seconds of a whole optimizer step, from the median of those measured."""
        measured_s = statistics.median(step.step_s for step in self.steps)
        return (measured_s - self.update_s) / self.share + self.update_s

    @property
    def images_per_s(self) -> float:
        """Images a second in a whole optimizer step."""
        return self.steps[0].images / self.share / self.step_s

    def phase_s(self, phase: str) -> float:
        """Seconds of a phase in the steps measured, mean."""
        return statistics.fmean(step.total("duration_s", phase) for step in self.steps)

    @property
    def disturbance(self) -> tuple[float, str]:
        """The largest share of its cores that others took meanwhile, and who took it."""
        seen = [step.company for step in self.steps if step.company]
        shares = [(each.stolen, f"the hypervisor took {each.stolen:.0%}") for each in seen]
        for each in seen:
            for lane, share in each.others.items():
                cores = "all cores" if lane == "all" else f"the {lane} cores"
                shares.append((share, f"other processes took {share:.0%} of {cores}"))
        return max(shares, default=(0.0, ""))


def best_plain(names: Iterable[str]) -> str:
    """The plain loop with the best flags, among the names of ways."""
    return next(name for name in names if name.startswith("plain "))


def way_settings(settings: Settings) -> dict[str, Settings]:
    """The settings of the ways to train, by name; all have the same images in an optimizer step.

    If a step has one batch only, `overlap` divides it into micro-batches, four if possible. There
    are no ranks where two cannot have a step between them (see halved_step), or without gloo.
    """
    groups = dict.fromkeys(CORES_OF_GROUPS)  # they are for the lanes of a split alone
    none = dataclasses.replace(settings, split="none", schedule="sequential", **groups)
    ways = {
        "plain": dataclasses.replace(none, precision="fp32", channels_last=False),
        "plain bf16" if settings.precision == "bf16" else "plain nhwc": dataclasses.replace(
            none, channels_last=True
        ),
        "none": none,
    }
    splits, halves = settings.split.split(","), halved_step(settings)
    connected = distributed.is_available() and distributed.is_gloo_available()
    kinds = [*SCHEDULES, *(["ranks"] if halves and connected else [])]
    for split, kind in itertools.product(splits, kinds):
        name = kind if len(splits) == 1 else f"{kind} {split}"
        chosen = {"schedule": kind} if kind in SCHEDULES else {"ranks": 2, **halves}
        if kind == "overlap" and settings.accumulate == 1:
            parts = micro_batches(settings.batch_size)
            chosen |= {"batch_size": settings.batch_size // parts, "accumulate": parts}
        ways[name] = dataclasses.replace(settings, split=split, **chosen)
    return ways


def halved_step(settings: Settings) -> dict[str, int]:
    """What one of two ranks has of a step: half of its batches, or of an odd number all, of half
    the size. Nothing if that is odd too, or leaves single images, too few for BatchNorm.
    """
    if settings.accumulate % 2 == 0:
        return {"accumulate": settings.accumulate // 2}
    size, rest = divmod(settings.batch_size, 2)
    return {"batch_size": size} if size > 1 and not rest else {}


def micro_batches(batch_size: int) -> int:
    """Into how many equal parts to divide a batch: 4 of two images or more, else the fewest."""
    candidates = ([4] if batch_size >= 8 else []) + list(range(2, batch_size + 1))
    parts = next((count for count in candidates if batch_size % count == 0), None)
    if parts is None:
        raise UserError(f"--batch-size {batch_size}: overlap needs a batch that can be divided")
    return parts


def all_ways(settings: Settings, topology: Topology) -> list[Way]:
    """The ways to train, with their cores: where these are listed, each way has all of them. Ranks
    have the groups of the split beside them; there are none where these are the same core.
    """
    listed = {*(settings.forward_cores or ()), *(settings.backward_cores or ())}
    ways = []
    for name, chosen in way_settings(settings).items():
        if chosen.ranks > 1:
            plan = ways[-1].plan
            if plan.forward.cpus != plan.backward.cpus:
                ways.append(Way(name, chosen, plan_of_ranks(plan)))
            continue
        plan = plan_for(chosen, topology)
        if plan.split == "none" and (listed or name.startswith("plain")):
            # A plain loop knows nothing of a quota: it has all that are allowed.
            group = make_group(topology, "all", sorted(listed or topology.allowed), None)
            plan = CorePlan("none", group, group, chosen.loader_cores or group.cpus)
        ways.append(Way(name, chosen, plan, chosen.batch_size != settings.batch_size))
    return ways


def why_no_ranks(way: Way) -> str:
    """Why no ranks stand beside a way on two groups."""
    if way.plan.forward.cpus == way.plan.backward.cpus:
        return "both groups are the same core"
    if halved_step(way.settings):
        return "this build of torch has no gloo to connect them"
    batches = f"{way.settings.accumulate} x {way.settings.batch_size}"
    return f"the {batches} images of a step cannot be halved"


def plan_of_ranks(plan: CorePlan) -> CorePlan:
    """A rank on each group of a split. Loaders stay off the other rank's cores: they are on those
    that were listed for them beside both groups, else each rank's are on its own.
    """
    groups = [
        dataclasses.replace(group, name=f"rank {rank}") for rank, group in enumerate(plan.groups)
    ]
    used = set().union(*(group.cpus for group in groups))
    loader_cpus = tuple(sorted(set(plan.loader_cpus) - used or used))
    return dataclasses.replace(plan, forward=groups[0], backward=groups[1], loader_cpus=loader_cpus)


def of_one_rank(way: Way, rank: int) -> Way:
    """A way as one of its ranks has it, if it has several: on a lane over its own group."""
    if way.ranks == 1:
        return way
    group = way.plan.groups[rank]
    own = tuple(cpu for cpu in way.plan.loader_cpus if cpu in group.cpu_set)
    plan = CorePlan("none", group, group, own or way.plan.loader_cpus)
    return dataclasses.replace(way, plan=plan)


def is_loading(settings: Settings) -> bool:
    """Whether images are loaded while steps are timed, as in a run."""
    return bool(settings.data_path) and not settings.preload


def steps_in_round(settings: Settings) -> int:
    """The most steps that a way is measured by in one round."""
    return -(-settings.steps // ROUNDS) if settings.steps else MOST_STEPS


@contextlib.contextmanager
def supplied(settings: Settings, cpus: Sequence[int], rank: int = 0) -> Iterator[Supply]:
    """What gives the batches of a round, to one of the ranks its part: from memory; or from loader
    processes of the way's own, which begin with the round, and have nothing to do any more after
    its last batch.
    """
    loading, data = is_loading(settings), open_data(settings)
    settings = dataclasses.replace(settings, workers=settings.workers if loading else 0)
    count = max(PRELOADED_BATCHES, settings.accumulate)
    if loading:  # an epoch shall be long enough for any round
        count = settings.accumulate * steps_in_round(settings) + batches_ahead(settings) + 4
    bad = BadImages(settings.max_bad_images)
    epochs = -(-count * settings.ranks * settings.batch_size // len(data.chosen))
    data = dataclasses.replace(data, chosen=[*data.chosen] * epochs)
    with contextlib.closing(training_feed(data, settings, cpus, rank)) as feed:
        if loading:
            yield lambda number, count: feed.batches(bad, number, 0, count * settings.ranks)
            return
        kept = [Loaded(batch) for batch in feed.batches(bad, 1, 0, count * settings.ranks)]
    yield lambda number, count: Batches(kept, count)


def batches_ahead(settings: Settings) -> int:
    """Batches that a run has fetched or asked for beyond those of a step: two for each loader, the
    one that waits for the next forward phase, and the one that `delayed` has sent there.
    """
    return 2 * settings.workers + 2


class PlainLoop:
    """A textbook loop over all cores, with nothing of this program but its loaders: in PyTorch's
    own defaults (fp32, NCHW), or with the flags of the way's settings, as other trainers have them.
    """

    def __init__(self, way: Way, online: Sequence[int], stack: contextlib.ExitStack):
        settings, group = way.settings, way.plan.forward
        self._way, self._online = way, online
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # no team yet: loaders are forked, and its threads are counted
        self._supply = stack.enter_context(supplied(settings, way.plan.loader_cpus))
        if group.cpu_set < process_cpus():  # of cores that were listed
            os.sched_setaffinity(0, group.cpus)
            threads = group.threads
        torch.set_num_threads(threads)
        start_team()
        self._group = dataclasses.replace(group, threads=torch.get_num_threads())
        shape = settings.model, settings.num_classes, settings.image_size
        model = build_model(*shape, settings.stochastic_depth)
        freeze(model, settings.freeze, *shape)
        last = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._model, self._layout = model.to(memory_format=last), last
        self._optimizer = build_optimizer(model, dataclasses.replace(settings, fused=None))
        self._criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self._teacher = build_teacher(settings, ())

    def learn(self, images: torch.Tensor, targets: torch.Tensor) -> float:
        """Forward and backward pass of a batch; its loss."""
        settings, images = self._way.settings, images.contiguous(memory_format=self._layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            taught = self._teacher(images) if self._teacher else None
            logits = self._model(images)
            loss = self._criterion(logits, targets)
            if self._teacher:
                loss = self._teacher.loss(loss, logits, taught)
        (loss / settings.accumulate).backward()
        return loss.item()

    def step(self, batches: Iterable[Batch]) -> tuple[StepResult, float]:
        """An optimizer step, and the seconds of its update; the main thread's CPU time is that of
        its whole team.
        """
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        images = loss = 0
        for batch in batches:
            loss = self.learn(*batch)
            images += len(batch[0])
        learnt_s = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        end_s, cpu_s = time.perf_counter(), time.process_time() - cpu_start_s
        step = StepResult(0, loss, images, end_s - start_s, (), main_thread_s=cpu_s)
        return step, end_s - learnt_s

    def round(self, order: Order) -> Round:
        """The batches to leave out, then the steps to measure."""
        warmup = self._way.warmup
        count = warmup + order.batches * order.steps
        batches = self._supply(order.number, count + batches_ahead(self._way.settings))
        for batch in itertools.islice(batches, warmup):
            self.learn(*batch)
        lookout = Lookout(self._way.plan, self._online)
        timed = [self.step(itertools.islice(batches, order.batches)) for _ in range(order.steps)]
        steps = with_company((step for step, _ in timed), lookout)
        exhaust(batches)
        used_s = sum(step.main_thread_s for step in steps)
        return Round(
            steps,
            {"all": self._group.busy(used_s, sum(step.step_s for step in steps))},
            None,
            {},
            peak_memory_bytes(),
            statistics.median(update_s for _, update_s in timed),
            order.batches / self._way.settings.accumulate,
        )


class LaneLoop:
    """The loop of this program, on the lanes of a way's plan; `ranks` have such a loop each."""

    def __init__(
        self,
        way: Way,
        online: Sequence[int],
        stack: contextlib.ExitStack,
        ranks: Ranks = ONE_PROCESS,
    ):
        self._way, self._online = way, online
        stack.enter_context(coordinating(way.settings, way.plan))
        cpus = way.plan.loader_cpus
        self._supply = stack.enter_context(supplied(way.settings, cpus, ranks.rank))
        first = self._supply(1, 1) if way.times_phases else ()
        self._ready = list(map(Loaded, first))  # for phases without company, or loading
        self._lanes = stack.enter_context(Lanes(way.plan, online))
        self._work = build_work(way.settings, self._lanes, ranks=ranks)
        self._lanes.backward.adopt(ranks.start)
        stack.callback(ranks.close, together=False)

    def round(self, order: Order) -> Round:
        """The steps to measure, and the phases without company: those of the steps themselves if
        they have none, or others before them if that is asked for.
        """
        lanes, network = self._lanes, self._work.network
        network.accumulate, alone = 1, None
        if self._way.times_phases:
            warmup = self._way.warmup
            alone = time_phases(lanes, self._work, Batches(self._ready, warmup), warmup)
        steps = self._measure(order)
        records = [record for step in steps for record in step.records]
        rates = {
            lane.group.name: lane.call(matrix_flops, network.bf16)
            for lane in dict.fromkeys((lanes.forward, lanes.backward))
        }
        if not order.keep_memory:
            give_memory_back()
        return Round(
            steps,
            lanes_busy(lanes.plan, records, sum(step.step_s for step in steps)),
            phase_times(records) if self._way.strict else alone,
            rates,
            peak_memory_bytes(),
            statistics.median(map(end_s, steps)),
            order.batches / self._way.settings.accumulate,
        )

    def _measure(self, order: Order) -> tuple[StepResult, ...]:
        """The steps to measure, after one of a batch, which is left out: it fetches memory, and
        brings loaders and `delayed`, which work ahead, to where they are in the midst of a run.
        """
        settings, network, lead = self._way.settings, self._work.network, 1
        count = lead + order.batches * order.steps + batches_ahead(settings)
        batches = self._supply(order.number, count)
        steps = run_schedule(settings, self._lanes, self._work, batches)
        exhaust(itertools.islice(steps, lead))
        network.accumulate = order.batches
        lookout = Lookout(self._lanes.plan, self._online)
        measured = with_company(itertools.islice(steps, order.steps), lookout)
        steps.close()
        exhaust(batches)
        return measured


def with_company(steps: Iterable[StepResult], lookout: Lookout) -> tuple[StepResult, ...]:
    """The steps, once they are done, the last one with what others took of the cores in all."""
    *steps, last = steps
    return (*steps, dataclasses.replace(last, company=lookout.look()))


def exhaust(items: Iterable[Any]) -> None:
    """Go to the end: loaders, say, shall have nothing left to do when it is another way's turn."""
    deque(items, maxlen=0)


def rounds_of(way: Way, online: Sequence[int], rank: int = 0, place: str = "") -> Rounds:
    """A way to train, in its own process: None when it is ready, then a Round for each Order. Its
    ranks, of which this is one, meet in the file `place`.
    """
    if way.settings.tuned_malloc and not way.plain:
        tune_allocator()
    torch.manual_seed(way.settings.seed)
    # Nothing can diverge, at the same speed.
    settings = dataclasses.replace(way.settings, lr=0.0, lr_scheduler="constant")
    with contextlib.ExitStack() as stack:
        way = dataclasses.replace(way, settings=settings)
        if way.plain:
            loop = PlainLoop(way, online, stack)
        else:
            ranks = met_in(place, settings, rank)
            loop = LaneLoop(of_one_rank(way, rank), online, stack, ranks)
        order = yield None
        while True:
            order = yield loop.round(order)


def met_in(place: str, settings: Settings, rank: int) -> Ranks:
    """The ranks of a way, processes of this machine, which meet in a file."""
    if settings.ranks == 1:
        return ONE_PROCESS
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(place, settings.ranks)
    ranks = SeveralRanks(rank, settings.ranks, store, settings.timeout)
    ranks.hosts = ranks.exchange(this_host(read_topology()))
    return ranks


def measure(processes: Sequence[Elsewhere], order: Order) -> Round:
    """What a way does in a round, in all of its processes together."""
    return round_of_ranks(send_to_all(processes, order))


def round_of_ranks(rounds: Sequence[Round]) -> Round:
    """The rounds of a way's ranks as one. They make their steps together, each of which counts the
    images of all. A rank's phases always have company: that of the others'.
    """
    if len(rounds) == 1:
        return rounds[0]
    by_step = list(zip(*(each.steps for each in rounds), strict=True))
    return dataclasses.replace(
        rounds[0],
        steps=tuple(map(step_of_ranks, by_step)),
        busy=merged_lanes(each.busy for each in rounds),
        alone=None,
        matrix_flops=merged_lanes(each.matrix_flops for each in rounds),
        peak_memory_bytes=sum(each.peak_memory_bytes for each in rounds),
        update_s=statistics.median(min(map(end_s, steps)) for steps in by_step),
    )


def merged_lanes(by_rank: Iterable[ByLane]) -> ByLane:
    """The figures of all ranks' lanes."""
    return {lane: figure for lanes in by_rank for lane, figure in lanes.items()}


def end_s(step: StepResult) -> float:
    """Seconds of what comes but once in a step: the update, and before it the sum over ranks."""
    return step.total("duration_s", "reduce") + step.total("duration_s", "update")


def step_of_ranks(steps: Sequence[StepResult]) -> StepResult:
    """A step of several ranks, with the phases of all: processes of a machine have one clock."""
    records = by_start(record for step in steps for record in step.records)
    seen = [step.company for step in steps if step.company]
    company = None
    if seen:
        others = merged_lanes(each.others for each in seen)
        stolen = max(each.stolen for each in seen)
        company = dataclasses.replace(seen[0], others=others, stolen=stolen)
    return dataclasses.replace(steps[0], records=tuple(records), company=company)


def matrix_flops(bf16: bool) -> float:
    """Floating-point operations a second of the calling thread's team, in products of square
    matrices of 2,048: the median of five, after one to warm up.
    """
    size, times_s = 2048, []
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(6):
        start_s = time.perf_counter()
        torch.mm(left, right)
        times_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / statistics.median(times_s[1:])


@dataclass(frozen=True)
class Pace:
    """How long a way to train takes, in seconds: its turn in a round but for the steps measured,
    and a whole step, of `batches`. A part of a step tells all of it if batches are `strict`.
    """

    rest_s: float
    step_s: float
    batches: int
    strict: bool

    def turn_s(self, steps: int, batches: int) -> float:
        """A turn with so many steps of so many batches."""
        return self.rest_s + steps * self.step_s * batches / self.batches


def find_pace(way: Way, first: Round, turn_s: float) -> Pace:
    """A way's pace by a round with a step of one batch or two, and what its turn took."""
    schedule, whole = way.settings.schedule, way.settings.accumulate
    measured_s, step_s = first.steps[0].step_s, first.step_s
    if not way.strict:
        counts = round(first.share * whole), whole
        part_s, whole_s = (step_bound_s(schedule, first.alone, count) for count in counts)
        step_s = measured_s * whole_s / part_s
    return Pace(max(0.0, turn_s - measured_s), step_s, whole, way.strict)


def choose_steps(asked: int | None, paces: Iterable[Pace]) -> int:
    """Steps of a way to measure in each round: as asked in all, or enough to take a while."""
    if asked:
        return -(-asked // ROUNDS)
    shortest_s = min(pace.step_s for pace in paces)
    return max(1, min(MOST_STEPS, math.ceil(LEAST_STEPS_S / shortest_s)))


def choose_batches(paces: dict[str, Pace], steps: int, round_s: float) -> dict[str, int]:
    """Of how many batches the steps of each way are that are measured: whole steps, if a round then
    takes `round_s` at most. Else strict ways share the time that others leave, and measure as much
    of a step as their part of it allows; a batch at the least.
    """
    turns_s = (pace.turn_s(steps, 0 if pace.strict else pace.batches) for pace in paces.values())
    left_s, batches = round_s - sum(turns_s), {way: pace.batches for way, pace in paces.items()}
    strict = sorted((pace.step_s, way) for way, pace in paces.items() if pace.strict)
    for others, (step_s, way) in zip(range(len(strict), 0, -1), strict, strict=True):
        batch_s = steps * step_s / batches[way]
        batches[way] = int(max(1, min(batches[way], left_s / others / batch_s + 1e-6)))
        left_s -= batches[way] * batch_s
    return batches


def start_ways(
    stack: contextlib.ExitStack, stop: StopRequest, ways: Sequence[Way], online: Sequence[int]
) -> dict[str, list[Elsewhere]]:
    """The processes of all ways, one for each rank, ready to begin: nothing else shall run while a
    way is measured.
    """
    say(f"{len(ways)} ways to train in {ROUNDS} rounds; first a round to warm up, which tells more")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    running: dict[str, list[Elsewhere]] = {way.name: [] for way in ways}
    for way in ways:
        for rank in range(way.ranks):
            process = Elsewhere(stop.check, rounds_of, way, online, rank, f"{folder}/{way.name}")
            running[way.name].append(stack.enter_context(contextlib.closing(process)))
    for processes in running.values():
        send_to_all(processes, None)
    return running


def warm_up(
    ways: Sequence[Way], running: dict[str, list[Elsewhere]]
) -> tuple[bool, dict[str, Pace]]:
    """Whether the memory of all ways fits at once, and how long each takes, by a first round.

    If it does not fit, each has to give it back after a round, and to fetch it again in the next.
    """
    free_bytes = psutil.virtual_memory().available
    firsts: dict[str, Round] = {}
    paces = {}
    for way in ways:
        start_s = time.perf_counter()
        # Two batches where two are held at once.
        count = 1 if way.strict else min(2, way.settings.accumulate)
        first = measure(running[way.name], Order(0, count, 1, keep_memory=False))
        firsts[way.name] = first = with_phases(way, first, firsts)
        paces[way.name] = find_pace(way, first, time.perf_counter() - start_s)
    peak_bytes = sum(first.peak_memory_bytes for first in firsts.values())
    return peak_bytes < 0.9 * free_bytes, paces


def with_phases(way: Way, result: Round, others: dict[str, Round]) -> Round:
    """A round of a way with lanes that has phases without company: if none were timed, those of
    `sequential` on the same lanes, among the other ways' rounds. Ranks have none.
    """
    if result.alone or way.plain or way.ranks > 1:
        return result
    alone = others[way.name.replace(way.settings.schedule, "sequential")].alone
    own = phase_times(record for step in result.steps for record in step.records)
    return dataclasses.replace(result, alone=dataclasses.replace(alone, refresh_s=own.refresh_s))


def describe_course(
    settings: Settings, paces: dict[str, Pace], steps: int, batches: dict[str, int]
) -> str:
    """How long the rounds will take, and how much of each way is measured in one."""
    left_s = ROUNDS * sum(pace.turn_s(steps, batches[name]) for name, pace in paces.items())
    took = f"{left_s / 60:.0f} minutes" if left_s >= 90 else f"{left_s:.0f} seconds"
    images = plural(settings.batch_size * settings.accumulate, "image")
    text = f"about {took}: {ROUNDS} rounds of {len(paces)} ways, {images} a step"
    parts = {name: (batches[name], pace.batches) for name, pace in paces.items()}
    text += f", {plural(steps, 'step')} of each in a round{part_note(parts)}"
    return text + ("; --quick is shorter" if left_s > 900 and not settings.quick else "")


def part_note(parts: dict[str, tuple[int, int]]) -> str:
    """Which ways are measured by a part of their steps: by so many of so many batches."""
    texts = [f"{name} {part} of {whole}" for name, (part, whole) in parts.items() if part < whole]
    note = "; of steps whose batches come one after the other, a part is measured: "
    return f"{note}{', '.join(texts)} batches" if texts else ""


def describe_round(rounds: dict[str, list[Round]]) -> str:
    """The speeds in the latest round, and who disturbed it, if anybody did."""
    number = len(next(iter(rounds.values())))
    head = f"round {number}/{ROUNDS}" if number <= ROUNDS else f"round {number}, a repetition"
    speeds = ", ".join(f"{way} {each[-1].images_per_s:.2f}" for way, each in rounds.items())
    share, text = disturbance(rounds, number - 1)
    return f"{head}, images/s: {speeds}" + (f"; disturbed: {text}" if share else "")


def disturbance(rounds: dict[str, list[Round]], index: int) -> tuple[float, str]:
    """The largest share of a way's cores that others took in a round, and in words; 0 if nobody
    took enough to count.
    """
    found = [(*each[index].disturbance, way) for way, each in rounds.items()]
    share, who, way = max(found)
    return (share, f"{who} ({way})") if share >= COMPANY_SHARE else (0.0, "")


def clean_rounds(rounds: dict[str, list[Round]]) -> list[int]:
    """Indices of the rounds that nobody disturbed."""
    count = len(next(iter(rounds.values())))
    return [index for index in range(count) if not disturbance(rounds, index)[0]]


def rounds_used(rounds: dict[str, list[Round]]) -> list[int]:
    """Indices of the rounds that count, as many as the verdict needs: the clean ones, and if these
    are too few, those disturbed least.
    """
    count = len(next(iter(rounds.values())))
    order = sorted(range(count), key=lambda index: disturbance(rounds, index)[0])
    return sorted(order[:ROUNDS])


@dataclass(frozen=True)
class Compared:
    """One way to train in a comparison: medians over the rounds; ranges are (lowest, highest).

    Ratios are taken within a round; `to_plain` is that to the plain loop with the best flags.
    `bound_share` is the bound's share of the step's time, `gflops` of the whole machine;
    `matrix_share`, by lane, is the rate of convolutions and matrix products as a share of the
    lane's rate in large matrix products: over whole steps for a single lane, during its phases for
    a lane of two. Steps were measured by `timed_batches` of theirs, at the least. Where there are
    several `ranks`, that is what each of them had, and `batches` are ranks x batches x images.
    """

    way: str
    split: str
    schedule: str
    cores: str
    ranks: int
    batches: str
    timed_batches: int
    images_per_s: float
    images_per_s_range: tuple[float, float]
    to_none: float
    to_none_rounds: tuple[float, ...]
    to_plain: float
    bound_images_per_s: float | None
    bound_share: float | None
    busy: ByLane
    peak_memory_bytes: int
    gflops: float
    matrix_share: ByLane
    matrix_gflops: ByLane
    stray_s: float


def matrix_share(lane: str, each: Round, flops: ByLane) -> float:
    """The rate of a lane's convolutions and matrix products, relative to `matrix_flops`."""
    if lane in flops:
        achieved_flops = flops[lane] * each.steps[0].images / each.phase_s(lane)
    else:
        achieved_flops = sum(flops.values()) * each.images_per_s / len(each.matrix_flops)
    return achieved_flops / each.matrix_flops[lane]


def against_bound(rounds: Sequence[Round], settings: Settings) -> dict[str, float | None]:
    """The bound in images a second, and its share of the step's time, medians; plain loops and
    ranks have none.
    """
    if not rounds[0].alone:
        return {"bound_images_per_s": None, "bound_share": None}
    schedule, accumulate = settings.schedule, settings.accumulate
    bounds_s = [step_bound_s(schedule, each.alone, accumulate) for each in rounds]
    shares = [bound_s / each.step_s for bound_s, each in zip(bounds_s, rounds, strict=True)]
    speed = settings.batch_size * accumulate / statistics.median(bounds_s)
    return {"bound_images_per_s": speed, "bound_share": statistics.median(shares)}


def compared_way(way: Way, rounds: dict[str, list[Round]], flops: ByLane) -> Compared:
    """The figures of one way to train."""
    own, settings = rounds[way.name], way.settings
    speeds = [each.images_per_s for each in own]
    to_none, to_plain = (
        [each.images_per_s / other.images_per_s for each, other in zip(own, others, strict=True)]
        for others in (rounds["none"], rounds[best_plain(rounds)])
    )
    lanes, batches = own[0].matrix_flops, (settings.accumulate, settings.batch_size)
    return Compared(
        way=way.name,
        split=split_name(settings),
        schedule=settings.schedule,
        cores=" + ".join(format_cpu_list(group.cpus) for group in way.plan.groups),
        ranks=way.ranks,
        batches=" x ".join(map(str, batches if way.ranks == 1 else (way.ranks, *batches))),
        timed_batches=round(min(each.share for each in own) * settings.accumulate),
        images_per_s=statistics.median(speeds),
        images_per_s_range=(min(speeds), max(speeds)),
        to_none=statistics.median(to_none),
        to_none_rounds=tuple(to_none),
        to_plain=statistics.median(to_plain),
        **against_bound(own, settings),
        busy={name: statistics.median(each.busy[name] for each in own) for name in own[0].busy},
        peak_memory_bytes=max(each.peak_memory_bytes for each in own),
        gflops=sum(flops.values()) * statistics.median(speeds) / 1e9,
        matrix_share={
            lane: statistics.median(matrix_share(lane, each, flops) for each in own)
            for lane in lanes
        },
        matrix_gflops={
            lane: statistics.median(each.matrix_flops[lane] for each in own) / 1e9 for lane in lanes
        },
        stray_s=sum(step.total("stray_s") for each in own for step in each.steps),
    )


@dataclass(frozen=True)
class Comparison:
    """What has been compared, in settings as they were `asked` for, and as they are in force: all
    rounds of each way, by its name, the floating-point operations of an image, and how long
    everything took.
    """

    asked: Settings
    settings: Settings
    topology: Topology
    ways: Sequence[Way]
    rounds: dict[str, list[Round]]
    flops: ByLane
    seconds: float

    @functools.cached_property
    def rows(self) -> list[Compared]:
        """The figures of the ways, from the rounds that count."""
        used = rounds_used(self.rounds)
        counting = {way: [each[index] for index in used] for way, each in self.rounds.items()}
        return [compared_way(way, counting, self.flops) for way in self.ways]

    @property
    def plain(self) -> str:
        """The name of the plain loop with the best flags."""
        return best_plain(self.rounds)

    @property
    def verdict(self) -> str:
        """The verdict, with a word of warning if disturbed rounds count."""
        used = rounds_used(self.rounds)
        disturbed = len(set(used).difference(clean_rounds(self.rounds)))
        warning = f" But {disturbed} of the {plural(len(used), 'round')} were disturbed by others."
        return verdict(self.rows) + (warning if disturbed else "")


def comparison_notes(found: Comparison) -> list[str]:
    """What has been compared, and which rounds others disturbed, in sentences."""
    rows = found.rows
    pairs = zip(rows, found.ways, strict=True)
    parts = {row.way: (row.timed_batches, way.settings.accumulate) for row, way in pairs}
    flags = "bf16" if found.settings.precision == "bf16" else "fp32"
    images = "loaded beforehand"
    if is_loading(found.settings):
        images = f"loaded meanwhile, by {plural(found.settings.workers, 'process')} a way"
    ranks = ""
    if any(row.ranks > 1 for row in rows):
        each = ", with loaders of its own" if is_loading(found.settings) else ""
        ranks = f"; ranks: data parallelism, a process on each group of the split{each}"
    about = (
        f"{describe_run(found.settings)}; {plural(len(rows[0].to_none_rounds), 'round')}, images "
        f"{images}; plain: a PyTorch loop in its defaults, {found.plain}: with the flags of other "
        f"trainers ({flags}, channels_last){ranks}{part_note(parts)}"
    )
    return [about, *disturbance_lines(found.rounds)]


def disturbance_lines(rounds: dict[str, list[Round]]) -> Iterator[str]:
    """Which rounds others disturbed, and what has become of them."""
    used = rounds_used(rounds)
    for index in range(len(next(iter(rounds.values())))):
        share, text = disturbance(rounds, index)
        fate = "kept, for want of an undisturbed one" if index in used else "left out"
        if share:
            yield f"round {index + 1} was disturbed: {text}; {fate}"


def tables_of(found: Comparison) -> list[str]:
    """The tables of a comparison, which 80 columns hold, each after an empty line."""
    tables = speed_table(found), placement_table(found.rows), rate_table(found.rows)
    return [f"\n{table}" for table in tables]


def speed_table(found: Comparison) -> str:
    """How fast the ways are; a bound with the share of it that is reached."""
    cells = []
    for row in found.rows:
        low, high = map(speed_text, row.images_per_s_range)
        bound = ""
        if row.bound_images_per_s:
            bound = f"{speed_text(row.bound_images_per_s)} ({row.bound_share:.0%})"
        ratios = f"{row.to_none:.2f}", f"{row.to_plain:.2f}"
        cells.append((row.way, speed_text(row.images_per_s), f"{low}-{high}", *ratios, bound))
    return markdown_table(
        ("way", "img/s", "range", "to none", f"to {found.plain}", "of bound"), cells
    )


def placement_table(rows: Sequence[Compared]) -> str:
    """What the ways use of the machine; their cores are told before (see split_lines)."""
    cells = []
    for row in rows:
        memory, stray = f"{row.peak_memory_bytes / 2**30:.2f}", f"{1e3 * row.stray_s:.1f}"
        cells.append((row.way, row.batches, lanes_text(row.busy, "{:.0%}"), memory, stray))
    return markdown_table(("way", "batches", "busy", "peak GiB", "stray ms"), cells)


def rate_table(rows: Sequence[Compared]) -> str:
    """What the ways compute, beside what large matrix products reach on their cores."""
    cells = []
    for row in rows:
        rate = lanes_text(row.matrix_gflops, "{:.0f}")
        share = lanes_text(row.matrix_share, "{:.0%}")
        cells.append((row.way, f"{row.gflops:.0f}", rate, share))
    return markdown_table(("way", "GFLOP/s", "matrix GFLOP/s", "share of matrix rate"), cells)


def lanes_text(figures: ByLane, pattern: str) -> str:
    """A figure of each lane, in one cell of a table."""
    return " + ".join(map(pattern.format, figures.values())) or "-"


def judge_rounds(ratios: Iterable[float], candidates: int = 3) -> str:
    """What the speeds relative to one lane show of the fastest of some schedules."""
    words = {1: "the split pays", 0: "no difference beyond the noise", -1: "the split costs speed"}
    return words[beyond_noise(ratios, candidates)]


def beyond_noise(ratios: Iterable[float], candidates: int) -> int:
    """Whether relative speeds, each measured in a round of its own, show the fastest of some
    candidates to be faster (1) or slower (-1) than what it is compared with, or neither (0).

    All rounds have to agree, but for at most the one that is nearest to 1: in seven rounds, a
    signed-rank test at 3 in 100. The fastest of many looks better than it is: of more than those of
    three splits, all rounds have to agree.
    """
    decisive = sorted(map(math.log, ratios), key=abs)[candidates <= 9 :]
    return (min(decisive) > 0) - (max(decisive) < 0)


def verdict(compared: Sequence[Compared]) -> str:
    """What a comparison says about the split, and what to do, in some sentences."""
    candidates = [row for row in compared if row.split != "none" and row.ranks == 1]
    best = max(candidates, key=lambda row: row.to_none)
    low, high = min(best.to_none_rounds), max(best.to_none_rounds)
    judgement = judge_rounds(best.to_none_rounds, len(candidates))
    rival, ahead = rival_of(best, compared)
    listed = best.split == "lists"
    advice = "train with --split none"
    if ahead:
        advice = "train in two ranks (torchrun --nproc-per-node 2, --split none)"
    elif judgement == "the split pays":
        how = "on these cores with" if listed else f"with --split {best.split}"
        advice = f"train {how} --schedule {best.schedule}"
    elif judgement != "the split costs speed":
        advice = "either will do"
    old = " Delayed has weights one update old." if best.schedule == "delayed" else ""
    return (
        f"Verdict: {judgement}. The fastest schedule of the split, {best.way}, trains at "
        f"{best.to_none:.2f} of the speed of one lane over all {'of these ' * listed}cores "
        f"({low:.2f} to {high:.2f} in {plural(len(best.to_none_rounds), 'round')}), and at "
        f"{best.to_plain:.2f} of that of a plain PyTorch loop with the best flags, "
        f"{best_plain(row.way for row in compared)}.{rival} For speed alone, {advice}.{old}"
    )


def rival_of(best: Compared, compared: Sequence[Compared]) -> tuple[str, bool]:
    """What data parallelism on the same groups reaches, in a sentence, if it is faster than the
    split's `best` schedule or than one lane; and whether it is faster than both beyond the noise.
    """
    rivals = [row for row in compared if row.ranks > 1]
    rival = max(rivals, key=lambda row: row.to_none, default=None)
    if not rival or rival.to_none <= min(1.0, best.to_none):
        return "", False
    rounds = rival.to_none_rounds
    pairs = zip(rounds, best.to_none_rounds, strict=True)
    ahead = [own / max(1.0, other) for own, other in pairs]
    return (
        f" Data parallelism on the same groups, {rival.way}, trains at {rival.to_none:.2f} of one "
        f"lane's speed ({min(rounds):.2f} to {max(rounds):.2f}).",
        beyond_noise(ahead, len(rivals)) > 0,
    )


def comparison_section(found: Comparison) -> str:
    """A comparison's section of logs.md."""
    lines = (
        f"machine: {describe_topology(found.topology)}; {host_kind()}",
        *split_lines(found.ways),
        f"settings: `compare {as_options(found.asked)}`",
        f"versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
        *comparison_notes(found),
        f"took {found.seconds / 60:.1f} minutes",
    )
    title = f"compare, {found.settings.model}, split {split_name(found.settings)}"
    heading = f"\n## {utc_now()} {title}\n"
    items = "\n".join(f"- {line}" for line in lines)
    return "\n".join([heading, items, *tables_of(found), "", found.verdict]) + "\n"


def comparison_json(found: Comparison) -> str:
    """A comparison for programs."""
    used = rounds_used(found.rounds)
    rounds = [
        {
            "round": index + 1,
            "images_per_s": {way: each[index].images_per_s for way, each in found.rounds.items()},
            "disturbance": disturbance(found.rounds, index)[1] or None,
            "counts": index in used,
        }
        for index in range(len(found.rounds["none"]))
    ]
    figures = {
        "machine": describe_topology(found.topology),
        "versions": versions(),
        "settings": plain_settings(found.settings),
        "plans": {way.name: dataclasses.asdict(way.plan) for way in found.ways},
        "ways": [dataclasses.asdict(row) for row in found.rows],
        "rounds": rounds,
        "seconds": found.seconds,
        "verdict": found.verdict,
    }
    return json.dumps(figures, indent=1, allow_nan=False) + "\n"


def draw_comparison(path: Path, found: Comparison) -> None:
    """The timelines of one lane and of the schedules in the seventh round, over the same span of
    time, in which each has a whole step.
    """
    panels = []
    for way, row in zip(found.ways, found.rows, strict=True):
        if not way.plain:
            title = f"{row.way}: {row.images_per_s:.1f} images/s, {row.batches} images a step"
            steps = steps_to_draw(found.rounds[row.way][ROUNDS - 1].steps)
            panels += panels_of(way, Panel(title, way.plan, steps, found.topology.cores))
    footer = picture_footer(found.topology)
    draw_timelines(path, describe_run(found.settings), panels, footer)


def panels_of(way: Way, panel: Panel) -> Iterator[Panel]:
    """A panel of a way, or one for each of its ranks, whose micro-batches are counted each."""
    zero_s = panel.records[0].start_s
    for rank in range(way.ranks):
        plan = of_one_rank(way, rank).plan
        lanes = {group.name for group in plan.groups}
        steps = [
            dataclasses.replace(step, records=tuple(r for r in step.records if r.lane in lanes))
            for step in panel.steps
        ]
        title = panel.title if not rank else ""
        yield dataclasses.replace(panel, title=title, plan=plan, steps=steps, zero_s=zero_s)


def compare(settings: Settings, topology: Topology) -> list[Compared]:
    """Run all ways to train in turn, round by round; print and write how they compare.

    Each way has a process of its own, and at least `settings.steps` measured steps in all; by
    default as many, or such parts of a step, as fit into TIME_LIMIT_S.
    """
    begun_s, asked = time.perf_counter(), settings
    say(describe_topology(topology))
    check_comparison(settings)
    settings = measured_settings(settings, topology)
    images = settings.batch_size * (1 if is_loading(settings) else settings.accumulate)
    check_memory(settings, topology, images)
    check_writable(settings)
    shape = settings.model, settings.num_classes, settings.image_size
    for chosen in way_settings(settings).values():
        check_input_shape(meta_model(*shape), settings.model, chosen.batch_size, shape[2])
    ways = all_ways(settings, topology)
    say("\n".join(split_lines(ways)))
    rounds = run_rounds(ways, topology.online, begun_s, bool(settings.output_dir))
    seconds = time.perf_counter() - begun_s
    found = Comparison(asked, settings, topology, ways, rounds, image_flops(settings), seconds)
    say("\n".join(["", *comparison_notes(found), *tables_of(found), "", found.verdict]))
    append_text(settings.log_file, comparison_section(found), LOG_HEADER)
    if settings.json:
        write_whole(settings.json, comparison_json(found))
    if settings.output_dir:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        draw_comparison(settings.output_dir / TIMELINE, found)
    return found.rows


def image_flops(settings: Settings) -> ByLane:
    """The floating-point operations of an image, by phase, those of a teacher included."""
    shape = settings.num_classes, settings.image_size
    flops = measure_model(settings.model, *shape, settings.freeze).flops
    if settings.teacher:
        flops["forward"] += measure_model(settings.teacher, *shape).flops["forward"]
    return flops


def check_comparison(settings: Settings) -> None:
    """Raise UserError for options that leave nothing to compare."""
    if "none" in settings.split.split(",") or settings.schedule != "sequential":
        split = "none" in settings.split.split(",")
        asked = f"--split {settings.split}" if split else f"--schedule {settings.schedule}"
        raise UserError(f"{asked}: compare runs every schedule beside --split none by itself")
    if settings.epochs and not settings.recipe:
        raise UserError(f"--epochs {settings.epochs}: compare takes --steps, for each way to train")
    check_model_name(settings.model)


def split_lines(ways: Sequence[Way]) -> Iterator[str]:
    """The cores of each split, and what the user should know about them."""
    ranked = {way.settings.split for way in ways if way.ranks > 1} | {"none"}
    on_lanes = [way for way in ways if not way.plain and way.ranks == 1]
    for split, way in {way.settings.split: way for way in on_lanes}.items():
        groups = "; ".join(f"{group.name} {group}" for group in way.plan.groups)
        yield f"split {way.plan.split}: {groups}"
        if split not in ranked:
            yield f"note: no ranks beside split {way.plan.split}: {why_no_ranks(way)}"
    for note in dict.fromkeys(note for way in ways for note in way.plan.notes):
        yield f"note: {note}"


def run_rounds(
    ways: Sequence[Way], online: Sequence[int], begun_s: float, drawn: bool
) -> dict[str, list[Round]]:
    """The rounds of each way, in turn: A B C, A B C; at the end others for those disturbed.

    The round that warms the ways up is left out. In the seventh, whose steps are `drawn`, these are
    whole ones.
    """
    rounds: dict[str, list[Round]] = {way.name: [] for way in ways}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        running = start_ways(stack, stop, ways, online)
        keep, paces = warm_up(ways, running)
        asked = ways[0].settings.steps
        steps = choose_steps(asked, paces.values())
        wholes_s = [
            paces[way.name].step_s for way in ways if drawn and way.strict and not way.plain
        ]
        left_s = TIME_LIMIT_S - (time.perf_counter() - begun_s) - sum(wholes_s)
        limit_s = math.inf if asked else left_s
        batches = choose_batches(paces, steps, limit_s / ROUNDS)
        say(describe_course(ways[0].settings, paces, steps, batches))
        for number in range(1, ROUNDS + MOST_REPEATS + 1):
            if number > ROUNDS and len(clean_rounds(rounds)) >= ROUNDS:
                break
            latest: dict[str, Round] = {}
            for way in ways:
                whole = drawn and number == ROUNDS and not way.plain
                count = way.settings.accumulate if whole else batches[way.name]
                result = measure(running[way.name], Order(number, count, steps, keep))
                latest[way.name] = with_phases(way, result, latest)
                rounds[way.name].append(latest[way.name])
            say(describe_round(rounds))
    return rounds


# ==================================================================================================
# 17 Commands
# What each command does, and which exit code an error has. Their options stand in section 1.
# ==================================================================================================


def print_plan(settings: Settings, topology: Topology, ranks: Ranks = ONE_PROCESS) -> CorePlan:
    """What `plan` shows of the cores, and the head of every run: with those of all ranks, or of as
    many as it is asked to draw.
    """
    precision, reason = choose_precision(settings, topology)
    if settings.ranks > ranks.size:
        ranks = imagined(settings, topology)
        plan = ranks.plans[0]
    else:
        with ranks.together():
            plan = plan_for(settings, topology)
        ranks.introduce(plan)
    lines = [describe_topology(topology), draw_plan(topology, plan), *describe_plan(plan, settings)]
    if ranks.hosts:
        drawn = (
            (text, draw_plan(machine, *(ranks.plans[rank] for rank in there), first=there[0]))
            for text, machine, there in machines_of(ranks)
        )
        lines = [*itertools.chain(*drawn), *rank_lines(ranks)]
    say("\n".join([*lines, f"precision {precision}: {reason}"]))
    return plan


def with_plan(run: Callable[[Settings, Topology, CorePlan, Ranks], Any]) -> Callable[..., Any]:
    """What a command does after it has shown the cores and how they are divided."""

    def planned(settings: Settings, topology: Topology, ranks: Ranks) -> Any:
        return run(settings, topology, print_plan(settings, topology, ranks), ranks)

    return planned


RUNS: dict[str, Callable[[Settings, Topology, Ranks], Any]] = {
    "train": with_plan(train),
    "plan": with_plan(print_model),
    "find-lr": with_plan(find_lr_and_report),
    "compare": lambda settings, topology, ranks: compare(settings, topology),
    "predict": lambda settings, topology, ranks: predict(settings, topology),
    "list-models": list_models,
}


@lossy_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Everything a user can cause ends in one line, on each
    machine if there are several ranks.
    """
    launch, argv = launched(), sys.argv[1:] if argv is None else argv
    with silent() if launch.rank else contextlib.nullcontext():
        for name, value in DROPPED_VARIABLES.items() if not launch.rank else ():
            warn(f"{name}={value} is ignored: lanes have their own threads")
        return run_together(argv, launch)


def run_together(argv: Sequence[str], launch: Launch) -> int:
    """Run a command on all ranks; the exit code."""
    ranks, folder, error = ONE_PROCESS, None, None
    try:
        ranks = connect(launch, parse_arguments(argv, ranks=launch.ranks)[1].timeout)
        command, settings = parse_together(argv, ranks)
        folder = settings.output_dir
        machine = read_machine(settings.machine) if settings.machine else read_topology()
        RUNS[command](settings, ranks.meet(machine), ranks)
    except (Exception, KeyboardInterrupt) as raised:
        error = raised
    foreseen = isinstance(error, (UserError, RunError, Stopped))
    if error and not (launch.local_rank and ranks.agreed and foreseen):
        say(f"{PROGRAM}: {last_words(error, folder)}", sys.stderr)
    ranks.close(not error or ranks.agreed)
    return exit_code(error)


def last_words(error: BaseException, folder: Path | None) -> str:
    """What is said of an error that ends the program; of one that nobody foresaw, where its
    traceback is.
    """
    if isinstance(error, KeyboardInterrupt):  # before the run looked after signals itself
        return str(Stopped(signal.SIGINT))
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, (UserError, RunError)):
        return f"error: {error}"
    return f"error: {likely_reason(error)}; {write_traceback(folder, error)}"


def exit_code(error: BaseException | None) -> int:
    """The exit code of a program that ends by an error, or by none."""
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT).exit_code
    return getattr(error, "exit_code", RunError.exit_code) if error else 0


if __name__ == "__main__":
    sys.exit(main())
