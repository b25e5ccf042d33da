"""Laws through one and two cores, and what they say of other machines. Pure.

Run: python -m pytest tests/compare/test_simulation.py
"""

import math

import machines
import pytest
from sweeps_made_up import SETTINGS, make_machine, times_on

from split_affinity.compare.curve import swept_ways
from split_affinity.compare.ratios import BY_AMDAHL, BY_POWER, Ratio
from split_affinity.compare.simulation import (
    LAWS,
    Scaling,
    amdahl,
    capacity_of,
    check_laws,
    group_capacities,
    limited_phases,
    middle_half,
    power,
    simulate,
)
from split_affinity.machine.plan import PhaseTimes
from split_affinity.training.schedules import step_bound_s


@pytest.mark.parametrize(
    ("law", "two_s", "eight_s"),
    [
        (amdahl, 6.0, 3.0),  # 2 + 8 / n
        (amdahl, 5.0, 1.25),
        (amdahl, 10.0, 10.0),
        (power, 10 / math.sqrt(2), 10 / math.sqrt(8)),
        (power, 5.0, 1.25),
    ],
)
def test_a_law_goes_through_both_times(law, two_s, eight_s):
    seconds = law(1, 10.0, 2, two_s)
    found = [seconds(cores) for cores in (1, 2, 8)]
    assert found == pytest.approx([10.0, two_s, eight_s])


@pytest.mark.parametrize("law", LAWS.values())
def test_a_phase_that_no_law_fits_lies_between_its_times(law):
    """More than twice as fast on two cores it counts as parallel, slower as serial."""
    seconds = law(1, 10.0, 2, 4.0)
    assert seconds(2) == pytest.approx(seconds(1) / 2) == pytest.approx(math.sqrt(4 * 5))
    seconds = law(1, 10.0, 2, 14.4)
    assert seconds(1) == seconds(64) == pytest.approx(12.0)


def test_slow_cores_count_by_their_capacity(tmp_path):
    machine = make_machine(tmp_path, machines.HYBRID, machines.HYBRID_FILES)
    assert capacity_of(machine, range(12)) == 4 + 4 / 2
    assert capacity_of(machine, (0, 1)) == 1  # two threads of one core
    assert group_capacities(machine, [Ratio(2, 6)]) == {Ratio(2, 6): (1.5, 4.5)}
    seconds = amdahl(0.5, 20.0, 1.5, 20 / 3)
    assert seconds(2) == pytest.approx(5.0)


def test_a_machine_is_simulated(tmp_path):
    """Phases that follow Amdahl's law are foretold by it, and by the other law too fast ones."""
    machine = make_machine(tmp_path, machines.SIXTEEN_CORES)
    rounds = tuple(times_on(1) for _ in range(3)), tuple(times_on(2) for _ in range(3))
    scaling, ways = {8: Scaling(1, 2, *rounds)}, swept_ways(SETTINGS)
    both = list(simulate(machine, ways, scaling))
    points = [point for point in both if point.kind == BY_AMDAHL]
    assert len(points) == 1 + 4 * 15
    assert len(both) == 2 * len(points)
    none = points[0]
    assert none.images_per_s == pytest.approx(32 / step_bound_s("sequential", times_on(16), 4))
    assert (none.ratio, none.to_none, none.to_none_range) == (None, 1.0, (1.0, 1.0))
    own = {(point.way, point.ratio): point for point in points}
    at = Ratio(5, 11)
    times = PhaseTimes(
        times_on(5).forward_s, times_on(11).backward_s, times_on(11).update_s, times_on(5).refresh_s
    )
    for way in ("sequential", "overlap", "delayed"):
        point = own[way, at]
        assert point.images_per_s == pytest.approx(32 / step_bound_s(way, times, 4))
        assert point.to_none == pytest.approx(point.images_per_s / none.images_per_s)
        assert point.images_per_s_range == pytest.approx((point.images_per_s,) * 2)
    # Each rank has half of the batches; the one with fewer cores sets the pace.
    slower = own["ranks", at]
    assert slower.images_per_s == pytest.approx(32 / step_bound_s("sequential", times_on(5), 2))
    assert slower.images_per_s == pytest.approx(own["ranks", Ratio(11, 5)].images_per_s)
    by_power = next(point for point in both if point.kind == BY_POWER)
    assert by_power.images_per_s > none.images_per_s


def test_a_band_is_the_middle_half_of_the_rounds():
    assert middle_half([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == (2.0, 5.0)


def test_the_law_is_held_against_larger_groups():
    nothing = PhaseTimes(0.0, 0.0, 0.0, 0.0)
    scaling = {8: Scaling(1, 2, (times_on(1),) * 3, (times_on(2),) * 3)}
    slower = PhaseTimes(2 * times_on(4).forward_s, times_on(4).backward_s, 0.0, 0.0)
    timed = {8: {1: (nothing,), 2: (nothing,), 4: (slower,)}}
    checks = list(check_laws(scaling, timed, {1: 1.0, 2: 2.0, 4: 4.0}))
    assert [(each.cores, each.phase) for each in checks] == [(4, "forward"), (4, "backward")]
    assert [each.error for each in checks] == pytest.approx([-0.5, 0.0])


def test_phases_that_no_law_can_follow_are_named():
    """Others on the second core look like work that cannot be divided."""
    on_one = PhaseTimes(forward_s=1.0, backward_s=2.0, update_s=0.1, refresh_s=0.0)
    on_two = PhaseTimes(forward_s=1.25, backward_s=0.9, update_s=0.06, refresh_s=0.0)
    assert list(limited_phases({16: Scaling(1, 2, 3 * (on_one,), 3 * (on_two,))})) == [
        "forward of 16 images took 1.0000 s on one core, 1.2500 s on two: counted as wholly serial "
        "(did others use the cores?)",
        "backward of 16 images took 2.0000 s on one core, 0.9000 s on two, less than half: counted "
        "as wholly parallel",
    ]
    assert not list(limited_phases({16: Scaling(1, 2, (times_on(1),), (times_on(2),))}))
