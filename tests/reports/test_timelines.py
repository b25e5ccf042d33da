"""Timelines. Run: python -m pytest tests/reports/test_timelines.py"""

import dataclasses
import json

import machines
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from patching import set_everywhere
from PIL import Image
from records import PLAN, record, step

from split_affinity.data.samples import LoadRecord
from split_affinity.errors import RunError
from split_affinity.lanes.contention import Contention
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.reports.timeline import (
    COLOURS,
    OTHERS,
    STOLEN,
    Panel,
    Row,
    busy_in_phase,
    core_bars,
    draw_panel,
    draw_timelines,
    lane_bars,
    number_batches,
    panel_rows,
    readings_apart,
    steps_to_draw,
)
from split_affinity.reports.trace import trace_of_ranks
from split_affinity.training.steps import PHASES, StepResult


def phases(*triples):
    return [record(phase, start_s, duration_s) for phase, start_s, duration_s in triples]


@pytest.mark.parametrize(
    ("records", "numbers"),
    [
        ([], []),
        (  # sequential, two micro-batches
            phases(
                ("forward", 0, 1),
                ("backward", 1, 2),
                ("forward", 3, 1),
                ("backward", 4, 2),
                ("update", 6, 1),
            ),
            [1, 1, 2, 2, None],
        ),
        (  # overlap, two micro-batches
            phases(("forward", 0, 1), ("backward", 1, 2), ("forward", 1.1, 1), ("backward", 3, 2)),
            [1, 1, 2, 2],
        ),
        (  # delayed, in mid-run: the first backward's forward lies before
            phases(
                ("backward", 0, 2),
                ("refresh", 0, 0.1),
                ("forward", 0.1, 1),
                ("update", 2, 0.5),
                ("backward", 2.5, 2),
                ("forward", 2.6, 1),
            ),
            [1, None, 2, None, 2, 3],
        ),
    ],
)
def test_micro_batches_are_numbered(records, numbers):
    assert number_batches(records) == numbers


@pytest.mark.parametrize(("steps", "shown"), [(1, [1]), (2, [1, 2]), (9, [7, 8, 9])])
def test_the_latest_steps_are_drawn(steps, shown):
    results = [step(number) for number in range(1, steps + 1)]
    assert [result.step for result in steps_to_draw(results)] == shown


def test_no_more_than_can_be_read_is_drawn(monkeypatch):
    set_everywhere(monkeypatch, "PHASES_TO_DRAW", 10)
    assert len(steps_to_draw([step(number) for number in range(1, 9)])) == 2
    set_everywhere(monkeypatch, "PHASES_TO_DRAW", 1)
    assert len(steps_to_draw([step(number) for number in range(1, 9)])) == 1


def drawn(panel, span_s):
    """The labels of a panel's rows, and of each bar its row's label, key, left and right end, and
    how high it begins and ends, as a share of a core's time.
    """
    ax = Figure().subplots()
    draw_panel(ax, panel, span_s)
    names = [label.get_text() for label in ax.get_yticklabels()]
    bars = set()
    for collection in ax.collections:
        (path,) = collection.get_paths()
        (left, top), (right, bottom) = path.get_extents().get_points()
        row, key = round((top + bottom) / 2), collection.get_label()
        assert to_hex(collection.get_facecolor()[0]) == COLOURS[key]
        heights = ((row + 0.35 - y) / 0.7 for y in (bottom, top))
        bars.add((names[row], key, *(round(float(value), 6) for value in (left, right, *heights))))
    return ax, names, bars


def test_the_bars_of_a_panel():
    """Core 2 has something else to do in the forward phase, and a quarter of the backward one."""
    records = (
        record("forward", 10.0, 1.0, cpu_busy_s={0: 1.0, 1: 0.0, 2: 0.4}, used_on_s={0: 1.0}),
        record(
            "backward",
            11.0,
            2.0,
            cpu_busy_s={0: 0.5, 1: 2.0, 2: 0.5},
            used_on_s={1: 2.0},
            cpu_s=2.0,
        ),
        record("update", 13.0, 1.0, cpu_busy_s={}),
    )
    before_s = ({0: 5.0, 1: 7.0, 2: 9.0}, {0: 6.0, 1: 7.0, 2: 9.4}, {})
    looks = zip(records, before_s, strict=True)
    records = tuple(dataclasses.replace(each, cpu_before_s=before) for each, before in looks)
    result = StepResult(1, 1.0, 8, 4.0, records)
    ax, names, bars = drawn(Panel("title", PLAN, [result]), 4.0)
    assert names == ["forward lane", "core 0", "backward lane", "core 1", "core 2"]
    assert {bar[:4] for bar in bars if "lane" in bar[0]} == {
        ("forward lane", "forward", 0.0, 1.0),
        ("backward lane", "backward", 1.0, 3.0),
        ("backward lane", "update", 3.0, 4.0),
    }, "what is grey is idle cores alone"
    other, idle = "busy with something else", "core idle"
    assert {bar for bar in bars if bar[0] == "core 0"} == {
        ("core 0", idle, 0.0, 1.0, 0.0, 1.0),
        ("core 0", "forward", 0.0, 1.0, 0.0, 1.0),
        ("core 0", idle, 1.0, 3.0, 0.0, 1.0),
        ("core 0", other, 1.0, 3.0, 0.0, 0.25),
    }, "nobody looked during the update"
    assert {bar for bar in bars if bar[0] == "core 1"} == {
        ("core 1", idle, 0.0, 1.0, 0.0, 1.0),
        ("core 1", idle, 1.0, 3.0, 0.0, 1.0),
        ("core 1", "backward", 1.0, 3.0, 0.0, 1.0),
        ("core 1", "update", 3.0, 4.0, 0.0, 1.0),
    }
    assert {bar for bar in bars if bar[0] == "core 2"} == {
        ("core 2", idle, 0.0, 1.0, 0.0, 1.0),
        ("core 2", other, 0.0, 1.0, 0.0, 0.4),
        ("core 2", idle, 1.0, 3.0, 0.0, 1.0),
        ("core 2", other, 1.0, 3.0, 0.0, 0.25),
        ("core 2", "update", 3.0, 4.0, 0.0, 1.0),
    }
    pale = {bar.get_label() for bar in ax.collections if bar.get_alpha() < 1}
    assert pale == {"update"}, "without a closer look, two cores have their mean"
    assert [text.get_text() for text in ax.texts] == ["1", "1"]
    assert ax.get_title(loc="left") == "title"


@pytest.mark.parametrize(
    ("duration_s", "cpu_s", "used_on_s", "cpu_busy_s", "own_s", "others_s"),
    [
        # The kernel's count, of which the threads had all, or a part.
        (1.0, 1.0, {1: 0.75, 2: 0.25}, {1: 0.75, 2: 0.25}, {1: 0.75, 2: 0.25}, {1: 0.0, 2: 0.0}),
        (1.0, 0.5, {1: 0.5}, {1: 0.75, 2: 0.5}, {1: 0.5, 2: 0.0}, {1: 0.25, 2: 0.5}),
        # A thread was on CPU 1 before it was seen on CPU 2; nothing, or half of the rest, was else.
        (1.0, 1.0, {2: 1.0}, {1: 0.75, 2: 0.25}, {1: 0.75, 2: 0.25}, {1: 0.0, 2: 0.0}),
        (1.0, 0.5, {2: 0.5}, {1: 0.5, 2: 0.25}, {1: 0.25, 2: 0.25}, {1: 0.25, 2: 0.0}),
        # More by the threads' clocks than by the kernel's ticks.
        (1.0, 0.8, {1: 0.4, 2: 0.4}, {1: 0.25, 2: 0.25}, {1: 0.25, 2: 0.25}, {1: 0.0, 2: 0.0}),
        # Too short for the kernel's count: the threads' own time where each was seen, if it was.
        (0.04, 0.03, {1: 0.02, 2: 0.01}, {1: 0.05, 2: 0.0}, {1: 0.02, 2: 0.01}, None),
        (0.04, 0.03, {1: 0.03}, {1: 0.0, 2: 0.05}, {1: 0.03}, None),
        (0.04, 0.06, {}, {}, {1: 0.03, 2: 0.03}, None),
        # Both threads were last seen on CPU 1, which cannot have worked longer than the phase.
        (0.04, 0.06, {1: 0.06}, {1: 0.05, 2: 0.05}, {1: 0.04, 2: 0.02}, None),
        (0.04, 0.08, {2: 0.08}, {}, {1: 0.04, 2: 0.04}, None),
        (0.04, 0.09, {2: 0.09}, {}, {1: 0.04, 2: 0.04}, None),
        (1.0, 1.5, {1: 1.5}, {1: 1.0, 2: 1.0}, {1: 1.0, 2: 0.5}, {1: 0.0, 2: 0.5}),
        # The system hides the kernel's count.
        (1.0, 1.5, {1: 1.0, 2: 0.5}, {}, {1: 1.0, 2: 0.5}, None),
    ],
)
def test_what_a_core_was_busy_with(duration_s, cpu_s, used_on_s, cpu_busy_s, own_s, others_s):
    made = record(
        "backward", 0.0, duration_s, cpu_s=cpu_s, used_on_s=used_on_s, cpu_busy_s=cpu_busy_s
    )
    own, others = busy_in_phase(made, (1, 2))
    assert own == pytest.approx(own_s)
    assert others == (others_s and pytest.approx(others_s))


def test_time_beyond_a_phase_s_duration_goes_where_there_was_room():
    """Of three CPUs, one was last seen by three threads, another by one."""
    made = record("backward", 0.0, 0.04, cpu_s=0.09, used_on_s={1: 0.07, 2: 0.02}, cpu_busy_s={})
    own, _ = busy_in_phase(made, (1, 2, 3))
    assert own == pytest.approx({1: 0.04, 2: 0.03, 3: 0.02})
    assert own.keys() == {1, 2, 3}


def test_a_single_core_s_short_phases_are_exact_without_a_closer_look():
    made = record("forward", 0.0, 0.04, cpu_s=0.01, cpu_busy_s={}, seen_on=frozenset())
    (bar,) = core_bars(Row("core 0", PLAN.forward, (0,)), [made])
    assert bar.height == pytest.approx(0.7 * 0.25)
    assert bar.alpha == 1, "and whether the rest was idle is unknown"


@pytest.mark.parametrize(
    ("times_s", "kept"),
    [
        ([], []),
        ([1.0], [1.0]),
        ([1.0, 1.04], [1.0]),
        ([1.0, 1.05, 1.06], [1.0, 1.06]),
        ([1.0, 1.02, 1.04, 1.2, 1.21, 1.3], [1.0, 1.2, 1.3]),
    ],
)
def test_readings_too_close_for_the_kernel_s_ticks_are_passed_over(times_s, kept):
    assert [time_s for time_s, _ in readings_apart([(time_s, {}) for time_s in times_s])] == kept


def rows_on(tmp_path, machine, knows_cores=True, **asked):
    """The rows of a panel on a machine."""
    cpus = frozenset(row[0] for row in machine)
    topology = read_topology(machines.write_machine(tmp_path, machine), cpus)
    plan = plan_cores(topology, Settings(**asked))
    return panel_rows(Panel("", plan, [], topology.cores if knows_cores else ()))


# Two sockets, each a node, of eight L3 domains of eight cores each.
SERVER = [(cpu, cpu // 64, cpu // 64, cpu // 8, cpu % 64) for cpu in range(128)]
# The same with two hardware threads a core.
SMT_SERVER = [*SERVER, *((cpu + 128, *place) for cpu, *place in SERVER)]
# Eight nodes of four small L3 domains each.
MANY_CACHES = [(cpu, 0, cpu // 16, cpu // 4, cpu) for cpu in range(128)]


@pytest.mark.parametrize(
    ("machine", "asked", "labels"),
    [
        (machines.TWO, {}, ["forward lane", "core 0", "backward lane", "core 1"]),
        (machines.TWO, {"split": "none"}, ["all lane", "core 0", "core 1"]),
        (
            SERVER[:16],
            {},
            [
                "forward lane",
                *(f"core {cpu}" for cpu in range(8)),
                "backward lane",
                *(f"core {cpu}" for cpu in range(8, 16)),
            ],
        ),
        (
            SERVER[:24],
            {},
            [
                "forward lane",
                "L3 of CPU 0: cores 0-7",
                "L3 of CPU 8: cores 8-11",
                "backward lane",
                "L3 of CPU 8: cores 12-15",
                "L3 of CPU 16: cores 16-23",
            ],
        ),
        (
            SMT_SERVER,
            {},
            [
                "forward lane",
                *(
                    f"L3 of CPU {cpu}: cores {cpu}-{cpu + 7},{cpu + 128}-{cpu + 135}"
                    for cpu in range(0, 64, 8)
                ),
                "backward lane",
                *(
                    f"L3 of CPU {cpu}: cores {cpu}-{cpu + 7},{cpu + 128}-{cpu + 135}"
                    for cpu in range(64, 128, 8)
                ),
            ],
        ),
        (
            MANY_CACHES,
            {"split": "1:3"},
            [
                "forward lane",
                "node 0: cores 0-15",
                "node 1: cores 16-31",
                "backward lane",
                *(f"node {node}: cores {16 * node}-{16 * node + 15}" for node in range(2, 8)),
            ],
        ),
        (
            SERVER,
            {"knows_cores": False},
            ["forward lane", "all: cores 0-63", "backward lane", "all: cores 64-127"],
        ),
    ],
    ids=["2", "2 none", "16", "24", "256", "128 nodes", "128 unknown"],
)
def test_many_cores_share_rows(tmp_path, machine, asked, labels):
    assert [row.label for row in rows_on(tmp_path, machine, **asked)] == labels


def test_the_label_of_a_row_stays_short(tmp_path):
    odd_and_even = [(cpu, cpu % 2, cpu % 2, cpu % 2, cpu) for cpu in range(128)]
    labels = [row.label for row in rows_on(tmp_path, odd_and_even)]
    assert labels == [
        "forward lane",
        "L3 of CPU 0: 64 CPUs",
        "backward lane",
        "L3 of CPU 1: 64 CPUs",
    ]


def test_the_share_of_a_row_is_the_mean_over_its_cores(tmp_path):
    lane, *rows = rows_on(tmp_path, SERVER)[:9]
    assert not lane.cpus
    assert rows[1].share({8: 1.0, 9: 1.0, 15: 0.4, 16: 1.0}, 1.0) == pytest.approx(2.4 / 8)
    assert rows[1].share(dict.fromkeys(range(8, 16), 1.1), 1.0) == 1


def test_one_thread_a_core_fills_a_row_of_two_hardware_threads(tmp_path):
    row = rows_on(tmp_path, SMT_SERVER)[1]
    assert len(row.cpus) == 16
    assert row.share(dict.fromkeys(range(8), 1.0), 1.0) == 1
    alone = Row("core 0", row.group, (0,))
    assert alone.share({0: 0.5, 128: 0.5}, 1.0) == 0.5


def test_contention_is_marked_above_the_lane_that_it_disturbed():
    contentions = [
        None,
        Contention(2.0, 3.0, {"forward": 0.09, "backward": 0.1}, 0.05),
        Contention(3.0, 4.0, {"forward": 0.0, "backward": 0.02}, 0.1),
    ]
    steps = [dataclasses.replace(step(1), contention=contention) for contention in contentions]
    assert Panel("of steps", PLAN, steps).contentions == contentions[1:]
    panel = Panel("of a whole run", PLAN, [step(1)], looks=contentions[1:])
    marks = {
        lane: [
            (bar.key, bar.start_s, bar.end_s)
            for bar in lane_bars(lane, panel.contentions, [])
            if bar.key not in PHASES
        ]
        for lane in ("forward", "backward")
    }
    stolen = ("the hypervisor took 10 % or more", 3.0, 4.0)
    assert marks == {
        "forward": [stolen],
        "backward": [("other processes took 10 % or more", 2.0, 3.0), stolen],
    }


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    saved = []
    set_everywhere(monkeypatch, "save_figure", lambda figure, path: saved.append(figure))
    return saved


def test_the_legend_has_what_is_in_the_picture(tmp_path, figures):
    panel = Panel("one", PLAN, [step(1)])
    draw_timelines(tmp_path / "t.png", "title", [panel], "the machine; versions")
    contention = Contention(0.0, 1.0, {"backward": 0.5}, 0.5)
    disturbed = Panel("one", PLAN, [dataclasses.replace(step(1), contention=contention)])
    draw_timelines(tmp_path / "t.png", "title", [disturbed])
    before = dataclasses.replace(contention, start_s=-2.0, end_s=-1.0)
    draw_timelines(tmp_path / "t.png", "title", [dataclasses.replace(panel, looks=[before])])
    keys = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    assert keys[0] == ["forward", "backward", "update", "core idle"]
    assert keys[1] == [*keys[0], OTHERS, STOLEN]
    assert keys[2] == keys[0], "what others took before"
    explanation = figures[0].legends[0].get_title().get_text()
    assert explanation.startswith(
        "height in a core's row: share of the time that the core was busy"
    )
    footers = [
        [
            text.get_text()
            for part in figure.figure.subfigs
            for text in part.texts
            if text.get_text()
        ]
        for figure in figures
    ]
    assert footers[0][-1] == "the machine; versions"
    assert "the machine; versions" not in footers[1]


def lasting(*durations_s):
    """Steps one after the other, each of a single phase."""
    steps, start_s = [], 0.0
    for number, duration_s in enumerate(durations_s, start=1):
        records = (record("backward", start_s, duration_s),)
        steps.append(StepResult(number, 1.0, 8, duration_s, records))
        start_s += duration_s
    return steps


@pytest.mark.parametrize(
    ("panels", "span_s"),
    [
        ([(1.0, 1.0, 1.0)], 3.0),
        ([(1.0, 1.0, 1.0), (0.5, 0.5, 0.5)], 1.5),
        ([(1.0, 1.0, 4.0), (0.5, 0.5, 0.5)], 4.0),  # a whole step of each, at the least
        ([(1.0,), (2.0, 2.0)], 2.0),
    ],
)
def test_the_span_holds_a_whole_step_of_each_panel(tmp_path, figures, panels, span_s):
    panels = [Panel("", PLAN, lasting(*durations_s)) for durations_s in panels]
    draw_timelines(tmp_path / "t.png", "title", panels)
    assert [ax.get_xlim() for ax in figures[0].axes] == [(0.0, span_s)] * len(panels)


def test_steps_of_eight_micro_batches_have_all_their_numbers(tmp_path, figures):
    """As strictly alternating as it gets, where bars are the narrowest."""
    steps = []
    for number in range(1, 5):
        start_s, records = 8.3 * number, []
        for part in range(8):
            records.append(record("forward", start_s + part, 0.3))
            records.append(record("backward", start_s + part + 0.3, 0.7))
        records.append(record("update", start_s + 8.0, 0.3))
        steps.append(StepResult(number, 1.0, 8, 8.3, tuple(records)))
    shown = steps_to_draw(steps)
    assert [result.step for result in shown] == [3, 4]
    draw_timelines(tmp_path / "t.png", "", [Panel("", PLAN, shown)])
    (ax,) = figures[0].axes
    figures[0].figure.draw_without_rendering()
    assert sorted(int(text.get_text()) for text in ax.texts) == sorted([*range(1, 17)] * 2)
    (left, _), (right, _) = ax.transData.transform([(0, 0), (0.3, 0)])
    assert max(text.get_window_extent().width for text in ax.texts) < right - left


def test_a_picture_with_several_panels(tmp_path):
    panels = [Panel(name, PLAN, [step(1)]) for name in ("one", "two")]
    draw_timelines(tmp_path / "one.png", "title", panels[:1])
    draw_timelines(tmp_path / "two.png", "title", panels)
    first, second = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert first.width == second.width > 1000
    assert second.height > first.height
    assert len(second.convert("RGB").getcolors(2**24)) > 10, "not blank"


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(RunError, match="taken.png: cannot be written"):
        draw_timelines(tmp_path / "taken.png", "title", [Panel("one", PLAN, [step(1)])])


def test_the_trace():
    loads = (LoadRecord(1, -0.5, -0.25), LoadRecord(0, 0.0, 1.0), LoadRecord(-1, 1, 2))
    result = StepResult(1, 1.0, 8, 5.0, step(1).records, loads)
    trace = json.loads(json.dumps(trace_of_ranks([PLAN], [[result]], "resnet18")))
    events = trace["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(names.values()) == [
        "resnet18",
        "forward lane",
        "backward lane",
        "main thread",
        "loader 0",
        "loader 1",
    ]
    spans = [
        (names[event["tid"]], event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X"
    ]
    assert ("loader 1", "load", 0.0, 250_000.0) in spans
    assert ("main thread", "load", 1_500_000.0, 1_000_000.0) in spans
    assert ("backward lane", "backward 1", 1_500_000.0, pytest.approx(100_000)) in spans
    assert len(spans) == 8
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0
    (update,) = (event for event in events if event["name"] == "update")
    assert update["cat"] == "update"
    assert update["args"] == {"step": 1, "cpu_s": 0.1, "stray_s": 0.0, "cores": "1-2"}


def test_the_trace_of_ranks_begins_with_the_batch_that_was_loaded_first():
    """On any of them: it can have been loaded long before the first phase that is shown."""
    loads = [LoadRecord(1, -0.5, -0.25)], [LoadRecord(-1, -2.0, -1.5), LoadRecord(0, 0.5, 1.0)], []
    steps = [[StepResult(1, 1.0, 8, 5.0, step(1).records, tuple(each))] for each in loads]
    events = trace_of_ranks([PLAN] * 3, steps, "resnet18")["traceEvents"]
    begins = [[e["ts"] for e in events if e["ph"] == "X" and e["pid"] == rank] for rank in range(3)]
    assert [min(each) for each in begins] == [1_500_000.0, 0.0, 2_000_000.0]


def test_the_trace_has_curves_of_what_was_measured():
    """A core's load is that between the two ends of closer looks, in spans of 50 ms or more."""
    counts = {"clock_mhz": {0: 2000.0}, "resident_bytes": 2**20, "package_j": 5.0}
    looks = [(0.0, 0.1, 1.0, 0.1), (0.1, 0.02, 1.1, 0.0), (0.2, 0.1, 1.1, 0.05)]
    records = tuple(
        record(
            "backward", start_s, span_s, cpu_before_s={0: before_s}, cpu_busy_s={0: busy_s}, **more
        )
        for (start_s, span_s, before_s, busy_s), more in zip(
            looks, ({"counts": counts}, {}, {}), strict=True
        )
    )
    result = StepResult(1, 1.0, 8, 5.0, records)
    events = trace_of_ranks([PLAN], [[result]], "resnet18")["traceEvents"]
    curves = {}
    for event in events:
        if event["ph"] == "C":
            ((unit, value),) = event["args"].items()
            point = pytest.approx((event["ts"] / 1e6, value))
            curves.setdefault(f"{event['name']} {unit}", []).append(point)
    assert curves == {
        "CPU 0 busy %": [(0.0, 100.0), (0.1, 0.0), (0.2, 50.0)],
        "CPU 0 MHz": [(0.1, 2000.0)],
        "memory MiB": [(0.1, 1.0)],
        "all processors W": [(0.0, 50.0)],
    }


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (  # sequential, one micro-batch a step
            [
                [("forward", 0, 1), ("backward", 1, 2), ("update", 3, 1)],
                [("forward", 4, 1), ("backward", 5, 2), ("update", 7, 1)],
            ],
            "forward 5.1, backward 5.1, update 5, forward 6.1, backward 6.1, update 6",
        ),
        (  # overlap, two micro-batches a step
            [
                [
                    ("forward", 0, 1),
                    ("backward", 1, 2),
                    ("forward", 1.1, 1),
                    ("backward", 3, 2),
                    ("update", 5, 1),
                ],
                [
                    ("forward", 6, 1),
                    ("backward", 7, 2),
                    ("forward", 7.1, 1),
                    ("backward", 9, 2),
                    ("update", 11, 1),
                ],
            ],
            "forward 5.1, backward 5.1, forward 5.2, backward 5.2, update 5, "
            "forward 6.1, backward 6.1, forward 6.2, backward 6.2, update 6",
        ),
        (  # delayed, from the start of a run: the first forward phase is of its own step
            [
                [
                    ("forward", 0, 1),
                    ("backward", 1, 2),
                    ("forward", 1.1, 1),
                    ("backward", 3, 2),
                    ("refresh", 3.1, 0.2),
                    ("forward", 3.4, 1),
                    ("update", 5, 1),
                ],
                [
                    ("backward", 6, 2),
                    ("forward", 6.1, 1),
                    ("backward", 8, 2),
                    ("refresh", 8.1, 0.2),
                    ("forward", 8.4, 1),
                    ("update", 10, 1),
                ],
            ],
            "forward 5.1, backward 5.1, forward 5.2, backward 5.2, refresh 6, forward 6.1, "
            "update 5, backward 6.1, forward 6.2, backward 6.2, refresh 7, forward 7.1, update 6",
        ),
        (  # delayed in mid-run, one micro-batch a step; then the last step of an epoch
            [
                [("refresh", 0, 0.2), ("backward", 0, 2), ("forward", 0.3, 1), ("update", 2, 1)],
                [("backward", 3, 2), ("update", 5, 1)],
                [
                    ("forward", 6, 1),
                    ("refresh", 7, 0.2),
                    ("backward", 7, 2),
                    ("forward", 7.3, 1),
                    ("update", 9, 1),
                ],
            ],
            "refresh 6, backward 5.1, forward 6.1, update 5, backward 6.1, update 6, "
            "forward 7.1, refresh 8, backward 7.1, forward 8.1, update 7",
        ),
    ],
    ids=["sequential", "overlap", "delayed", "delayed in mid-run"],
)
def test_the_trace_tells_step_and_micro_batch(steps, expected):
    results = [
        StepResult(number, 1.0, 8, 1.0, tuple(phases(*triples)))
        for number, triples in enumerate(steps, start=5)
    ]
    events = trace_of_ranks([PLAN], [results], "resnet18")["traceEvents"]
    spans = [event for event in events if "cat" in event]
    found = [
        f"{event['cat']} {event['args']['step']}"
        + (f".{event['args']['micro_batch']}" if "micro_batch" in event["args"] else "")
        for event in spans
    ]
    assert ", ".join(found) == expected
    for event in spans:
        number = event["args"].get("micro_batch")
        assert event["name"] == (f"{event['cat']} {number}" if number else event["cat"])
