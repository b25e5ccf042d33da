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
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    from torch import nn
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
from split_affinity.compare.command import check_comparison, compare, image_flops  # noqa: F401
from split_affinity.compare.loops import (  # noqa: F401
    PRELOADED_BATCHES,
    ByLane,
    LaneLoop,
    Order,
    PlainLoop,
    Round,
    Rounds,
    Supply,
    batches_ahead,
    end_s,
    exhaust,
    matrix_flops,
    met_in,
    rounds_of,
    supplied,
    with_company,
)
from split_affinity.compare.report import (  # noqa: F401
    comparison_json,
    comparison_notes,
    comparison_section,
    disturbance_lines,
    draw_comparison,
    lanes_text,
    panels_of,
    placement_table,
    rate_table,
    speed_table,
    split_lines,
    tables_of,
)
from split_affinity.compare.rounds import (  # noqa: F401
    LEAST_STEPS_S,
    MOST_REPEATS,
    TIME_LIMIT_S,
    Pace,
    choose_batches,
    choose_steps,
    clean_rounds,
    describe_course,
    describe_round,
    disturbance,
    find_pace,
    measure,
    merged_lanes,
    part_note,
    round_of_ranks,
    rounds_used,
    run_rounds,
    start_ways,
    step_of_ranks,
    warm_up,
    with_phases,
)
from split_affinity.compare.verdict import (  # noqa: F401
    Compared,
    Comparison,
    against_bound,
    beyond_noise,
    compared_way,
    judge_rounds,
    matrix_share,
    rival_of,
    verdict,
)
from split_affinity.compare.ways import (  # noqa: F401
    CORES_OF_GROUPS,
    MOST_STEPS,
    ROUNDS,
    Way,
    all_ways,
    best_plain,
    halved_step,
    is_loading,
    micro_batches,
    of_one_rank,
    plan_of_ranks,
    steps_in_round,
    way_settings,
    why_no_ranks,
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
