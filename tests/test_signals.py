"""Ctrl-C and the like, before a run and in it. Run: python -m pytest tests/test_signals.py"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from patching import set_everywhere
from places import SCRIPT
from small import TINY, read_metrics

from split_affinity.checkpoints.state import read_checkpoint
from split_affinity.errors import Stopped
from split_affinity.options.commands import how_to_go_on, parse_arguments
from split_affinity.options.settings import Settings
from split_affinity.signals import Interrupted, StopRequest, ending_at_once
from split_affinity.training.network import Network
from train_split_affinity import main

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
NAME = "train_split_affinity.py"


def signal_self(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_while_pytorch_is_loaded(in_tmp, tmp_path, signum, code):
    """Which takes for ever here."""
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout.readline().endswith("loading PyTorch, which takes some seconds\n")
    process.send_signal(signum)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert error == f"{NAME}: stopped by {signum.name}\n"
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_while_the_data_are_fetched(in_tmp, capsys, monkeypatch, signum, code):
    def slow(settings):
        signal_self(signum)
        time.sleep(60)

    set_everywhere(monkeypatch, "open_data", slow)
    handlers = [signal.getsignal(each) for each, _ in CODES]
    assert main(TINY) == code
    assert capsys.readouterr().err == f"{NAME}: stopped by {signum.name}\n"
    assert not list(in_tmp.iterdir())
    assert [signal.getsignal(each) for each, _ in CODES] == handlers


def test_while_weights_are_fetched(in_tmp, capsys, monkeypatch):
    """On a lane's thread; what is half there is removed, as by torch.hub."""

    def slow(*args):
        part = Path("weights.partial")
        part.touch()
        try:
            threading.Timer(0.1, signal_self).start()
            for _ in range(6000):
                time.sleep(0.01)
        finally:
            part.unlink()

    set_everywhere(monkeypatch, "starting_model", slow)
    before_s = time.monotonic()
    assert main([*TINY, "-j", "1"]) == 143
    assert time.monotonic() - before_s < 30
    assert capsys.readouterr().err == f"{NAME}: stopped by SIGTERM\n"
    assert not list(in_tmp.iterdir())


def test_what_cannot_be_cleared_up_does_not_hold_the_process():
    code = "import os, signal, time\nfrom split_affinity.signals import ending_at_once\n"
    code += "with ending_at_once():\n try:\n  os.kill(os.getpid(), signal.SIGINT)\n"
    code += " finally:\n  time.sleep(60)\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, f"{NAME}: stopped by SIGINT\n")


def test_a_hangup_stays_ignored_under_nohup_before_the_run_too():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_at_once():
            signal_self(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_leaves_signals_to_its_parent():
    with StopRequest() as stop, ending_at_once():
        if not (child := os.fork()):
            signal_self()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        stop.check()
        with pytest.raises(Interrupted):
            signal_self()


def test_the_answer_says_how_long_it_may_take(capsys):
    with StopRequest(work="this step") as stop:
        stop.saves = True
        stop.begin("this step", 24.9)
        signal_self(signal.SIGINT)
        assert capsys.readouterr().err in [
            f"{NAME}: SIGINT: finishing this step, about {left}s, then saving; once more: end "
            "without saving\n"
            for left in (24, 25)
        ]
        with pytest.raises(Stopped):
            stop.check()


def test_the_answer_of_several_ranks(capsys):
    """The second signal is ignored, and what was ignored once stays so while ranks part."""
    before = [signal.getsignal(each) for each, _ in CODES]
    try:
        with StopRequest(2, "this step") as stop:
            stop.begin("this batch", 0.5)
            signal_self()
        assert capsys.readouterr().err == f"{NAME}: SIGTERM: finishing this batch\n"
        signal_self()
    finally:
        for (each, _), handler in zip(CODES, before, strict=True):
            signal.signal(each, handler)


def test_a_second_signal_ends_the_process_without_saving(in_tmp):
    code = "import sys, time; from split_affinity.training.network import Network\n"
    code += "Network.backward = lambda *args: print('in the step', flush=True) or time.sleep(60)\n"
    code += "from train_split_affinity import main; main(sys.argv[1:])\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *TINY, "--output-dir", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},
    )
    assert any("in the step" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    line = process.stderr.readline()
    answer = "finishing this step, then saving; once more: end without saving"
    assert line == f"{NAME}: SIGINT: {answer}\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    process.communicate()
    assert not list(Path("out").glob("*.pt"))


@pytest.fixture
def signalled(monkeypatch):
    """A signal in each backward phase; returns the phase without it."""
    real = Network.backward

    def backward(self, output):
        signal_self()
        return real(self, output)

    monkeypatch.setattr(Network, "backward", backward)
    return real


def test_the_command_that_goes_on(in_tmp, capsys, monkeypatch, signalled):
    options = [*TINY, "--output-dir", "my out", "--steps", "4", "--log-file", "my log.md"]
    assert main(options) == 143
    captured = capsys.readouterr()
    answer, last = captured.err.splitlines()
    assert answer == (
        f"{NAME}: SIGTERM: finishing this step, then saving; once more: end without saving"
    )
    assert last == f"{NAME}: stopped by SIGTERM"
    start, _, command = captured.out.splitlines()[-1].partition(": ")
    assert start == "to go on"
    python, program, *again = shlex.split(command)
    assert (python, program) == ("python", NAME)
    assert parse_arguments(again)[1] == parse_arguments([*options, "--resume", "auto"])[1]
    monkeypatch.setattr(Network, "backward", signalled)
    assert main(again) == 0
    assert read_checkpoint(Path("my out/last.pt"))["progress"]["step"] == 4
    assert [line["step"] for line in read_metrics(Path("my out"), "step")] == [1, 2, 3, 4]


def test_no_command_goes_on_with_what_was_not_saved(in_tmp, capsys, signalled):
    assert main(TINY) == 143
    captured = capsys.readouterr()
    assert f"{NAME}: SIGTERM: finishing this step; once more: end at once\n" in captured.err
    assert "to go on" not in captured.out


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        (["python3", "./train_split_affinity.py"], "python3 ./train_split_affinity.py"),
        (["python", "-m", "split_affinity"], "python -m split_affinity"),
        (["python", "/a b/bin/train-split-affinity"], "python '/a b/bin/train-split-affinity'"),
        (["python", "-m", "pytest"], f"python {NAME}"),
    ],
)
def test_the_command_begins_as_it_was_typed(monkeypatch, started, typed):
    names = {"split_affinity": "/x/split_affinity/__main__.py", "pytest": "/x/pytest/__main__.py"}
    monkeypatch.setattr(sys, "argv", [names.get(started[-1], started[-1]), "-j", "1"])
    monkeypatch.setattr(sys, "orig_argv", [*started, "-j", "1"])
    settings = Settings(output_dir=Path("out"), workers=1, resume=Path("out/last.pt"))
    options = "--workers 1 --resume auto --output-dir out"
    assert how_to_go_on(settings) == f"to go on: {typed} {options}"
    more = Settings(output_dir=Path("out"), mirror="ftp://me:secret@host/x", ranks=2)
    assert how_to_go_on(more) == (
        f"to go on, with torchrun as before: {NAME} --resume auto --mirror ftp://host/x "
        "--output-dir out (--mirror with its login)"
    )
