"""Tables and picture of a comparison. Run: python -m pytest tests/compare/test_report.py"""

import dataclasses
import json
from pathlib import Path

import pytest
from matplotlib.text import Text
from patching import set_everywhere
from records import PLAN
from rendered import lines_of_page, page_of
from rounds_made_up import by_round, disturbed, make_round

from split_affinity.compare.report import (
    comparison_json,
    comparison_section,
    comparison_tables,
    draw_comparison,
)
from split_affinity.compare.rounds import combine_ranks
from split_affinity.compare.verdict import Comparison
from split_affinity.compare.ways import Way, plan_of_ranks, way_settings
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.text import speed_text


def make_round_of_ranks(step_s):
    """Steps in which rank 1 takes twice as long."""
    rounds = []
    for rank in range(2):
        each = make_round(step_s, 0.25 * (1 + rank), 0.5 * (1 + rank), rates={f"rank {rank}": 1e9})
        steps = [
            dataclasses.replace(
                step,
                records=tuple(dataclasses.replace(r, lane=f"rank {rank}") for r in step.records),
            )
            for step in each.steps
        ]
        rounds.append(dataclasses.replace(each, steps=tuple(steps), busy={f"rank {rank}": 0.5}))
    return combine_ranks(rounds)


def make_comparison(split="even", **options):
    settings = Settings(
        batch_size=32, accumulate=8, num_classes=1000, image_size=224, precision="bf16", split=split
    )
    ways = [
        Way(name, each, PLAN if each.ranks == 1 else plan_of_ranks(PLAN))
        for name, each in way_settings(settings).items()
    ]
    rounds = {
        way.name: [make_round(1.0) if way.ranks == 1 else make_round_of_ranks(1.0)] * 7
        for way in ways
    }
    flops = {"forward": 1.0, "backward": 1.0}
    topology = read_topology()
    return Comparison(settings, settings, topology, ways, by_round(rounds | options), flops, 90.0)


@pytest.mark.parametrize("split", ["even", "even,auto,12:20"])
def test_tables_fit_eighty_columns(split):
    found = make_comparison(split)
    for table in comparison_tables(found):
        widths = {len(line) for line in table.splitlines()[1:]}
        assert len(widths) == 1
        assert max(widths) <= 80
    assert all(way.name in comparison_tables(found)[0] for way in found.ways)


@pytest.mark.parametrize(
    ("images_per_s", "text"),
    [
        (0.5, "0.50"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1234, "1234"),
    ],
)
def test_speeds_have_three_digits(images_per_s, text):
    assert speed_text(images_per_s) == text


def test_a_verdict_from_disturbed_rounds_says_so():
    rounds = [*[make_round(1.0)] * 5, *[disturbed(make_round(1.0), 0.5)] * 2]
    quiet, loud = make_comparison(), make_comparison(none=rounds)
    assert "disturbed" not in quiet.verdict
    assert loud.verdict.endswith(" But 2 of the 7 rounds were disturbed by others.")
    assert [each["counts"] for each in json.loads(comparison_json(loud))["rounds"]] == [True] * 7


@pytest.mark.parametrize("disturbed_rounds", [4, 7])
def test_mostly_disturbed_rounds_allow_no_verdict_and_no_advice(disturbed_rounds):
    """However clear their figures seem to be: those of one lane are disturbed, all in one way."""
    slow = disturbed(make_round(4.0), 0.5)
    rounds = [*[make_round(1.0)] * (7 - disturbed_rounds), *[slow] * disturbed_rounds]
    found = make_comparison(none=rounds)
    assert found.verdict == (
        f"No verdict, and no advice: others disturbed {disturbed_rounds} of the 7 rounds, so the "
        "figures may be their doing; 4 undisturbed ones are needed. Compare once more while "
        "nothing else runs on this machine."
    )
    written = json.loads(comparison_json(found))["verdict"], comparison_section(found)
    assert all(found.verdict in text for text in written)
    assert not any("Verdict: " in text or "For speed alone" in text for text in written)


def test_three_disturbed_rounds_cannot_move_a_median_beyond_undisturbed_ones():
    slow = disturbed(make_round(4.0), 0.5)
    found = make_comparison(none=[*[make_round(1.0)] * 4, *[slow] * 3])
    assert found.verdict.startswith("Verdict: no difference beyond the noise. ")
    assert found.verdict.endswith(" But 3 of the 7 rounds were disturbed by others.")
    assert {row.to_none for row in found.rows} == {1.0}


@pytest.mark.parametrize("split", ["even", "even,auto,12:20"])
def test_the_section_of_a_comparison_is_read_at_a_glance(split):
    """The speeds and the verdict are seen; no figure is missing in what is folded."""
    loud = [*[make_round(1.0)] * 6, disturbed(make_round(1.0), 0.5)]
    found = make_comparison(split, none=loud)
    settings = dataclasses.replace(found.settings, output_dir=Path("out"))
    section = comparison_section(dataclasses.replace(found, settings=settings))
    assert lines_of_page(section) < 40
    assert "\n- output folder: [`out`](out)\n" in section
    tables = [table.strip() for table in comparison_tables(found)]
    assert all(f"\n\n{table}\n\n" in section for table in tables)
    seen = section.partition("<details>")[0]
    assert seen.endswith(f"\n\n{tables[0]}\n\n{found.verdict}\n\n")


def test_foreign_text_makes_no_structure_in_a_comparison_s_section():
    name = "a\n# heading\n![x](http:h)<img>|`\x1b"
    found = make_comparison()
    asked = dataclasses.replace(found.asked, data_path=Path(name), model=name)
    settings = dataclasses.replace(found.settings, data_path=Path(name), model=name)
    machine = dataclasses.replace(found.topology, cpu_model=name)
    section = comparison_section(
        dataclasses.replace(found, asked=asked, settings=settings, topology=machine)
    )
    tags = page_of(section).tags
    assert tags.count("h2") == 1
    assert tags.count("li") == section.count("\n- ")
    assert not {"h1", "img", "a"} & {*tags}
    assert "\x1b" not in section


def test_a_picture_has_a_whole_step_of_each_way_with_lanes(monkeypatch, tmp_path):
    figures = []
    set_everywhere(monkeypatch, "save_figure", lambda figure, path: figures.append(figure))
    long = make_round(9.0, forward_s=2.0, backward_s=6.0)
    draw_comparison(tmp_path / "x.png", make_comparison(delayed=[long] * 7))
    axes = figures[0].axes
    titles = [ax.get_title(loc="left").partition(":")[0] for ax in axes]
    assert titles == ["none", "sequential", "overlap", "delayed", "ranks", ""]
    assert [ax.get_xlim()[1] for ax in axes] == [pytest.approx(axes[0].get_xlim()[1])] * 6
    rows = [[label.get_text() for label in ax.get_yticklabels()] for ax in axes[-2:]]
    assert rows == [["rank 0 lane", "core 0"], ["rank 1 lane", "core 1", "core 2"]]
    assert axes[0].get_xlim()[1] >= 7.0, "delayed goes back from 1.0 s to 7.0 s"
    assert any("torch" in text.get_text() for text in figures[0].figure.findobj(Text))
