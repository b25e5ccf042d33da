"""Whether loading held training up. Run: python -m pytest tests/reports/test_held_up.py"""

import dataclasses

import pytest
from records import PLAN, record, step

from split_affinity.data.samples import LoadRecord
from split_affinity.reports.loading import loading_lines, summarise_loading
from split_affinity.reports.summary import RunStatistics
from split_affinity.reports.tables import summary_lines
from split_affinity.training.steps import StepResult


def waiting_steps(count=4, wait_s=0.6, loaders=1, load_s=0.9):
    """Steps of a batch each, of 0.4 s and a wait behind backward for the batch of the next one."""
    steps = []
    for number in range(count):
        start_s = number * (0.4 + wait_s)
        update_s = start_s + 0.3 + wait_s
        records = (
            record("forward", start_s, 0.1),
            record("backward", start_s + 0.1, 0.2),
            record("update", update_s, 0.1),
        )
        loader = number % loaders if loaders else -1
        ready_s = start_s - 0.1  # as the update of the step before begins
        load = LoadRecord(loader, ready_s - load_s, ready_s)
        step_s = 0.4 + wait_s
        result = StepResult(number + 1, 1.0, 8, step_s, records, (load,))
        steps.append(dataclasses.replace(result, synced_s=start_s + step_s))
    return steps


def test_loaders_that_hold_training_up():
    loading = summarise_loading(waiting_steps(), [0])
    # Behind the last backward of what is looked at, nobody knows which batch was waited for.
    assert loading.held_up == pytest.approx(3 * 0.6 / 4)
    assert loading.load_s == loading.longest_load_s == pytest.approx(0.9)
    assert loading.train_s == pytest.approx((4 - 1.8) / 4)
    assert (loading.loaders, loading.enough_loaders) == (1, 2)
    assert loading_lines(loading) == [
        "loaders held training up for 45 % of the time: a batch takes 0.9 s to load and 0.55 s to "
        "train with; -j 2 would keep up, if each had a core to itself; loaders have cores 0 "
        "(--loader-cores)"
    ]


def test_the_main_thread_that_loads_and_loaders_that_are_uneven():
    (line,) = loading_lines(summarise_loading(waiting_steps(loaders=0), [0]))
    assert line.startswith("loading in the main thread (-j 0) held training up for 45 % of")
    (line,) = loading_lines(summarise_loading(waiting_steps(loaders=3), [0]))
    assert line.endswith("; -j 3 keeps up in the mean, but the longest load took 0.9 s")


def test_only_a_batch_that_is_still_being_loaded_counts():
    """Not hand-over, not a batch that had not been begun, as between epochs; nor without images."""
    in_time = waiting_steps(wait_s=0.0)
    assert summarise_loading(in_time, [0]).held_up == pytest.approx(0)
    assert loading_lines(summarise_loading(in_time, [0])) == []
    later = waiting_steps(load_s=0.05)  # begun when most of the wait was over
    assert summarise_loading(later, [0]).held_up == pytest.approx(3 * 0.05 / 4)
    assert summarise_loading([step(1), step(2)], [0]) is None
    assert loading_lines(None) == []


@pytest.mark.parametrize("loads_images", [True, False])
def test_the_summary_tells_of_it(loads_images):
    run = RunStatistics(PLAN, loads_images)
    for result in waiting_steps(5):
        run.add(result)
    told = [line for line in summary_lines(run.summary()) if "held training up" in line]
    assert len(told) == (run.summary().loading is not None) == loads_images
