"""Timelines. Run: python -m pytest tests/test_timelines.py"""

import json

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from records import PLAN, record, step

import train_split_affinity as tsa


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
    assert tsa.number_batches(records) == numbers


@pytest.mark.parametrize(("steps", "shown"), [(1, [1]), (2, [1, 2]), (9, [7, 8, 9])])
def test_the_latest_steps_are_drawn(steps, shown):
    results = [step(number) for number in range(1, steps + 1)]
    assert [result.step for result in tsa.steps_to_draw(results)] == shown


def test_no_more_than_can_be_read_is_drawn(monkeypatch):
    monkeypatch.setattr(tsa, "PHASES_TO_DRAW", 10)
    assert len(tsa.steps_to_draw([step(number) for number in range(1, 9)])) == 2
    monkeypatch.setattr(tsa, "PHASES_TO_DRAW", 1)
    assert len(tsa.steps_to_draw([step(number) for number in range(1, 9)])) == 1


def test_the_bars_of_a_panel():
    records = (
        record("forward", 10.0, 1.0),
        record("backward", 11.0, 2.0, cpu_busy_s={0: 0.0, 1: 2.0, 2: 0.5}),
        record("update", 13.0, 1.0),
    )
    result = tsa.StepResult(1, 1.0, 8, 4.0, records)
    ax = Figure().subplots()
    tsa.draw_panel(ax, tsa.Panel("title", PLAN, [result]), 4.0)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["forward lane", "core 0", "backward lane", "core 1", "core 2"]
    bars = set()
    for collection in ax.collections:
        for path in collection.get_paths():
            (left, top), (right, bottom) = path.get_extents().get_points()
            row = round((top + bottom) / 2)
            bars.add((names[row], to_hex(collection.get_facecolor()[0]), left, right))
            if names[row] == "core 2" and left == 1:
                assert bottom - top == pytest.approx(0.7 * 0.25), "a quarter of the time busy"
    idle, colours = tsa.IDLE_COLOUR, tsa.COLOURS
    rows = {name: "forward" if name in names[:2] else "backward" for name in names}
    expected = {(name, idle, 0.0, 4.0) for name in names}
    expected |= {(name, colours["forward"], 0.0, 1.0) for name in names if rows[name] == "forward"}
    for phase, left, right in (("backward", 1.0, 3.0), ("update", 3.0, 4.0)):
        busy = [name for name in names if rows[name] == "backward"]
        expected |= {(name, colours[phase], left, right) for name in busy}
    expected = {bar for bar in expected if bar[0] != "core 2" or bar[1] == idle}
    assert expected <= {(name, colour, round(a, 6), round(b, 6)) for name, colour, a, b in bars}
    assert [text.get_text() for text in ax.texts] == ["1", "1"]
    assert ax.get_title(loc="left") == "title"


@pytest.mark.parametrize(
    ("duration_s", "cpu_s", "shares"),
    [
        (1.0, 1.2, [0.75, 0.0]),  # as the kernel counted each CPU
        (0.04, 0.06, [0.75, 0.75]),  # too short for it: the threads' own time
        (0.04, 0.09, [1.0, 1.0]),
    ],
)
def test_short_phases_are_measured_by_their_threads(duration_s, cpu_s, shares):
    made = record(
        "backward", 0.0, duration_s, cpu_s=cpu_s, cpu_busy_s={1: 0.75 * duration_s, 2: 0.0}
    )
    found = [tsa.busy_share(made, PLAN.backward, cpu) for cpu in (1, 2)]
    assert found == pytest.approx(shares)


def test_a_picture_with_several_panels(tmp_path):
    panels = [tsa.Panel(name, PLAN, [step(1)]) for name in ("one", "two")]
    tsa.draw_timelines(tmp_path / "one.png", "title", panels[:1])
    tsa.draw_timelines(tmp_path / "two.png", "title", panels, span_s=2.0)
    first, second = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert first.width == second.width > 1000
    assert second.height > first.height
    assert len(second.convert("RGB").getcolors(2**24)) > 10, "not blank"


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(tsa.RunError, match="taken.png: cannot be written"):
        tsa.draw_timelines(tmp_path / "taken.png", "title", [tsa.Panel("one", PLAN, [step(1)])])


def test_the_trace():
    loads = (tsa.LoadRecord(1, -0.5, -0.25), tsa.LoadRecord(0, 0.0, 1.0), tsa.LoadRecord(-1, 1, 2))
    result = tsa.StepResult(1, 1.0, 8, 5.0, step(1).records, loads)
    trace = json.loads(json.dumps(tsa.trace_events(PLAN, [result])))
    events = trace["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(names.values()) == [
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
    assert ("backward lane", "backward", 1_500_000.0, pytest.approx(100_000)) in spans
    assert len(spans) == 8
    (update,) = (event for event in events if event["name"] == "update")
    assert update["args"] == {"cpu_s": 0.1, "stray_s": 0.0, "cores": "1-2"}
