"""A sweep over all ratios of cores. Run: python -m pytest tests/compare/test_sweep.py"""

import csv
import dataclasses
import io
import itertools
import json

import machines
import pytest
from patching import set_everywhere
from rounds_made_up import disturbed
from small import TINY, needs_two_cpus
from sweeps_made_up import SETTINGS, made_up_sweep, make_machine

from split_affinity.compare.curve import swept_ways
from split_affinity.compare.ratios import (
    BY_AMDAHL,
    BY_POWER,
    Bound,
    Ratio,
    even_ratio,
    is_ruled_out,
    thinned_ratios,
)
from split_affinity.compare.sweep import timing_phases, way_kind, ways_at
from split_affinity.compare.sweep_picture import draw_sweep
from split_affinity.compare.sweep_report import sweep_csv, sweep_json, sweep_section, sweep_text
from split_affinity.machine.description import machine_text
from split_affinity.machine.plan import divide_cores, usable_cores
from train_split_affinity import main


@pytest.mark.parametrize(
    ("cores", "forward"),
    [
        (2, [1]),
        (3, [1, 2]),
        (9, list(range(1, 9))),
        (16, [1, 3, 6, 8, 10, 13, 15]),
        (17, [1, 3, 6, 8, 11, 13, 16]),
        (128, [1, 22, 43, 64, 85, 106, 127]),
    ],
)
def test_ratios_are_thinned_above_eight(tmp_path, cores, forward):
    ratios = thinned_ratios(cores)
    assert [ratio.forward for ratio in ratios] == forward
    assert {ratio.forward + ratio.backward for ratio in ratios} == {cores}
    assert even_ratio(cores) in ratios
    machine = make_machine(tmp_path, [(cpu, 0, 0, 0, cpu) for cpu in range(cores)])
    even = divide_cores(usable_cores(machine), "even")
    assert len(even[0]) == even_ratio(cores).forward


def test_a_bound_rules_out_what_it_keeps_below_all_rounds_of_the_best():
    bound = Bound((9.0, 9.5), (0.8, 0.85))
    assert is_ruled_out(bound, (9.6, 11.0), (0.86, 0.9))
    assert not is_ruled_out(bound, (9.4, 11.0), (0.86, 0.9))
    assert not is_ruled_out(bound, (9.6, 11.0), (0.84, 0.9)), "none was slow, by loading say"


@pytest.fixture
def sixteen(tmp_path):
    return make_machine(tmp_path / "sixteen", machines.SIXTEEN_CORES)


def test_the_best_bound_comes_first_and_rules_out_others(sixteen, monkeypatch, capsys):
    found, ran = made_up_sweep(monkeypatch, sixteen)
    said = capsys.readouterr().out
    assert [[name for name in ways if " " in name] for ways in ran] == [
        ["plain bf16", "sequential 8:8", "overlap 8:8", "delayed 8:8", "ranks 8:8"],
        ["plain bf16", "sequential 6:10", "overlap 6:10", "delayed 6:10"],
    ]
    assert all("none" in ways for ways in ran)
    assert said.index("about ") < said.index("ratio 8:8, 1 of 7")
    assert "; less where a bound rules ways out\n" in said
    assert "\nruled out by their bounds at 6:10: ranks at most 0.90 of none; others reach " in said
    points = {(point.way, point.ratio): point for point in found.points}
    assert len(points) == 2 + 4 * 7
    for (way, ratio), point in points.items():
        run = ratio is None or any(f"{way} {ratio}" in ways for ways in ran)
        assert (point.images_per_s is not None) == run == (point.kind == "measured")
        assert (point.bound_images_per_s is not None) == (ratio is not None)
        if ratio and not run:
            best = max(each.to_none or 0.0 for each in found.points if each.way == way)
            assert point.bound_to_none < best
    assert points["none", None].to_none == 1.0
    fastest = points["delayed", Ratio(6, 10)]
    assert fastest.to_none == pytest.approx(0.9 * fastest.bound_to_none, rel=0.03)
    text = sweep_text(found)
    assert "The fastest schedule of the split, delayed 6:10, trains at 0.94 of" in text
    assert "Data parallelism on groups of 8:8, ranks 8:8, trains at 1.04 of one" in text
    assert found.advised.ranks == 2, "in the end all 7 rounds say so"
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 80
    assert {each.cores for each in found.law_checks} == {3, 6, 8, 10, 13, 15, 16}


def test_what_a_sweep_writes(sixteen, monkeypatch, tmp_path):
    found, _ = made_up_sweep(monkeypatch, sixteen)
    draw_sweep(tmp_path / "out", found)
    assert (tmp_path / "out/sweep.png").stat().st_size > 20_000
    rows = list(csv.DictReader(io.StringIO(sweep_csv(found))))
    figures = json.loads(sweep_json(found))
    assert len(rows) == len(figures["points"]) == 30
    assert figures["simulated"] is None
    assert figures["law_checks"][0]["error"] == pytest.approx(0.0, abs=0.2)
    assert len(figures["phases_alone"]) == 9 * 7
    assert [each["ratio"] for each in figures["ratios"]] == ["8:8", "6:10"]
    out = next(row for row in rows if (row["way"], row["forward_cores"]) == ("overlap", "1"))
    assert (out["kind"], out["backward_cores"]) == ("ruled out by its bound", "15")
    assert out["forward_share"] == "0.0625"
    assert not out["images_per_s"]
    assert 0 < float(out["bound_to_none"]) < 1
    assert float(out["forward_s"]) > float(out["backward_s"]) > 0
    section = sweep_section(found)
    assert "compare, resnet18, split sweep\n" in section
    assert found.verdict in section


def test_a_sweep_that_others_disturbed_has_no_verdict(sixteen, monkeypatch):
    found, _ = made_up_sweep(monkeypatch, sixteen)
    block = found.blocks[Ratio(6, 10)]
    name = "overlap 6:10"
    rounds = [
        each | {name: disturbed(each[name], 0.5 * (number < 4))}
        for number, each in enumerate(block.rounds)
    ]
    block = dataclasses.replace(block, rounds=rounds)
    found = dataclasses.replace(found, blocks=found.blocks | {Ratio(6, 10): block})
    assert found.verdict.startswith(
        "No verdict, and no advice: others disturbed most rounds of 6:10"
    )
    assert found.advised is None


def test_phases_are_timed_by_ways_that_sequential_does_not_serve(sixteen):
    ways = ways_at(SETTINGS, sixteen, Ratio(6, 10))
    assert timing_phases(ways) == ways
    left = timing_phases([way for way in ways if not way.name.startswith("sequential")])
    timed = {way.name for way in left if way.times_phases}
    assert timed == {"overlap 6:10", "delayed 6:10"}


@pytest.mark.parametrize("rows", [machines.SIXTEEN_CORES, machines.TWO_SOCKETS_128])
def test_a_simulation_is_marked_wherever_it_is_seen(tmp_path, monkeypatch, rows):
    two = make_machine(tmp_path / "two", machines.TWO)
    machine = make_machine(tmp_path / "other", rows)
    found, ran = made_up_sweep(monkeypatch, two, machine)
    assert len(ran) == 1
    texts = []
    set_everywhere(monkeypatch, "save_figure", lambda figure, path: texts.extend(seen(figure)))
    draw_sweep(tmp_path / "out", found)
    drawn = " ".join(texts)
    assert drawn.count("SIMULATED") == 3  # the title, and across both diagrams
    assert "Assumed: each core is as fast as one of the machine that was measured" in drawn
    assert "sequential 6.61 (6.71 measured)" in " ".join(drawn.split())
    kinds = {row["kind"] for row in csv.DictReader(io.StringIO(sweep_csv(found)))}
    assert kinds == {"measured", BY_AMDAHL, BY_POWER}
    assert "\nSIMULATED, not measured: Example CPU" in sweep_text(found)
    assert "split sweep, SIMULATED, not measured\n" in sweep_section(found)
    figures = json.loads(sweep_json(found))
    assert len(figures["simulated"]["assumptions"]) == 4


def seen(figure):
    """All texts of a picture."""
    return [
        text.get_text() for text in figure.figure.findobj(lambda part: hasattr(part, "get_text"))
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("train --split sweep", "--split sweep is for compare, not for train"),
        ("compare --split even,sweep", "'even,sweep': sweep has all ratios, give it alone"),
        ("compare --simulate one.json --split 1:2", "one.json is for --split sweep, not for 1:2"),
        ("compare --simulate one.json", "--simulate one.json: one core, which has no ratio of"),
        ("compare --simulate none.json", "--simulate none.json: cannot be read: No such file"),
        ("compare --simulate odd.json", "--simulate odd.json: not a machine's description"),
        ("compare --simulate mac.json", "mac.json: its system cannot keep threads on cores"),
        ("compare --csv a.csv", "--csv a.csv: of compare only --split sweep makes such a table"),
        ("plan --simulate one.json", "--simulate one.json is for compare, not for plan"),
        ("compare --split sweep --forward-cores 0 --backward-cores 1", "contradicts --forward-co"),
        ("compare --split sweep --forward-threads 2", "--split sweep chooses the thread counts"),
        ("compare --split sweep --csv no/a.csv", "--csv no/a.csv: cannot be written: No such "),
    ],
)
@needs_two_cpus
def test_what_cannot_be_swept_is_one_line(in_tmp, capsys, arguments, reason):
    one = make_machine(in_tmp / "files", machines.ONE)
    two = dataclasses.replace(make_machine(in_tmp / "more", machines.TWO), has_affinity=False)
    (in_tmp / "one.json").write_text(machine_text(one))
    (in_tmp / "mac.json").write_text(machine_text(two))
    (in_tmp / "odd.json").write_text("{}")
    there = set(in_tmp.iterdir())
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert set(in_tmp.iterdir()) == there


def test_one_core_has_no_ratio(in_tmp, capsys, monkeypatch):
    one = make_machine(in_tmp / "files", machines.ONE_CORE_TWO_THREADS)
    set_everywhere(monkeypatch, "read_topology", lambda *args: one)
    assert main(["compare", "--split", "sweep", *TINY]) == 2
    assert "--split sweep: one core has no ratio of whole cores" in capsys.readouterr().err


@needs_two_cpus
@pytest.mark.alone
def test_a_real_sweep(in_tmp, capsys, monkeypatch):
    """On halves of the cores, for another machine; delayed has to time its phases itself."""
    set_everywhere(monkeypatch, "ROUNDS", 2)
    set_everywhere(monkeypatch, "MOST_REPEATS", 0)
    set_everywhere(monkeypatch, "PHASE_ROUNDS", 2)
    set_everywhere(monkeypatch, "even_ratio", lambda cores: Ratio(1, 1))
    set_everywhere(monkeypatch, "thinned_ratios", lambda cores: [Ratio(1, 1)])
    kept = "plain", "none", "delayed"  # to start fewer processes

    def fewer_ways(*args):
        return [way for way in ways_at(*args) if way_kind(way) in kept]

    def fewer_settings(settings):
        return {name: way for name, way in swept_ways(settings).items() if name in kept}

    set_everywhere(monkeypatch, "ways_at", fewer_ways)
    set_everywhere(monkeypatch, "swept_ways", fewer_settings)
    hybrid = make_machine(in_tmp / "files", machines.HYBRID, machines.HYBRID_FILES)
    (in_tmp / "hybrid.json").write_text(machine_text(hybrid))
    options = ["--accumulate", "2", "--steps", "1", "--csv", "s.csv", "--json", "s.json"]
    options += ["--output-dir", "out", "--simulate", "hybrid.json"]
    assert main(["compare", *TINY, *options]) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader((in_tmp / "s.csv").open()))
    measured = [row["way"] for row in rows if row["kind"] == "measured"]
    assert measured[2:] == ["delayed"]
    for row, column in itertools.product(rows, ("images_per_s", "to_none", "images_per_s_low")):
        assert float(row[column]) > 0
    assert sum(row["kind"] == BY_AMDAHL for row in rows) == 1 + 7
    assert "SIMULATED, not measured: Example CPU" in said
    assert (in_tmp / "out/sweep-simulated.png").stat().st_size > 20_000
    assert (in_tmp / "logs.md").read_text().count("\n## ") == 1
    assert json.loads((in_tmp / "s.json").read_text())["verdict"] in said
