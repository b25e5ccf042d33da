"""Epochs and reports that are made up."""

from records import PLAN

from split_affinity.checkpoints.state import Progress
from split_affinity.machine.topology import read_topology
from split_affinity.reports.run_report import RunReport

LISTS = "0,2,4,6,8,10,12,14,16,18,20", "1,3,5,7,9,11,13,15,17,19,21"


# Epochs


def epoch_row(epoch=1, **values):
    """The figures of a finished epoch."""
    row = {
        "epoch": epoch,
        "train_loss": 4.512,
        "train_top1": 1.2,
        "train_top5": 5.8,
        "val_loss": 4.389,
        "val_top1": 1.5,
        "val_top5": 6.2,
        "lr": 0.1,
        "gradient_norms": {"stem": 0.5, "fc": 2.0},
        "timestamp": "2025-10-11T14:02:13Z",
    }
    return row | values


NO_VALIDATION = {"val_loss": None, "val_top1": None, "val_top5": None}
LINE = (
    "epoch: 1  train_loss: 4.512  train_top1: 1.2%  train_top5: 5.8%  val_loss: 4.389  "
    "val_top1: 1.5%  val_top5: 6.2%  timestamp: 2025-10-11T14:02:13Z"
)


def report_on(settings, **progress):
    """A report at its beginning; an epoch has ten steps."""
    topology = read_topology()
    return RunReport(settings, topology, PLAN, Progress(**{"epoch_batches": 20} | progress))


RAW = {"val_raw_loss": 4.1, "val_raw_top1": 2.5, "val_raw_top5": None}
