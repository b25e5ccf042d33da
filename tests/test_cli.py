"""The command line, inside this process and outside. Run: python -m pytest tests/test_cli.py"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torchvision
from patching import set_everywhere
from PIL import Image
from places import SCRIPT
from processes import run_script
from small import TINY, TWO_CPUS, needs_two_cpus, read_metrics, scalars_in

from split_affinity import ALLOWED_CPUS, __version__
from split_affinity.checkpoints.state import read_checkpoint
from split_affinity.checkpoints.state import versions as all_versions
from split_affinity.data.classes import wordnet_ids
from split_affinity.errors import UserError
from split_affinity.machine.plan import usable_cores
from split_affinity.machine.topology import read_topology
from split_affinity.models.registry import build_model, classifier_names, parameter_count
from split_affinity.options.commands import installed_version
from split_affinity.options.settings import Settings
from split_affinity.reports.confusion import CONFUSED, PAIRS
from split_affinity.reports.plots import RangeTest
from split_affinity.reports.tables import epoch_line
from split_affinity.reports.tensorboard import check_tensorboard
from split_affinity.runs.starting_weights import starting_model
from split_affinity.text import format_cpu_list
from split_affinity.training.network import Network
from train_split_affinity import main


@pytest.mark.slow
def test_the_smallest_run(in_tmp):
    done = run_script(*TINY, "--steps", "3", "--output-dir", "out", "--print-freq", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in (
        "forward ",
        "cpu ",
        "step 3/3: loss ",
        "finished after 3 of 3 steps",
        "| backward",
    ):
        assert text in done.stdout
    assert sorted(path.name for path in in_tmp.iterdir()) == ["logs.md", "out"]
    lines = read_metrics(Path("out"))
    assert [line["type"] for line in lines] == ["run", "step", "step", "step", "summary"]
    assert lines[-1]["stray_s"] == 0


def test_a_run_with_loaders_leaves_nothing_among_temporary_files(in_tmp, tmp_path_factory):
    """The sockets of loaders that are killed at the end, for example."""
    temporary = tmp_path_factory.mktemp("t")
    options = [*TINY, "--steps", "4", "-j", "2"]
    done = run_script(*options, TMPDIR=str(temporary), TORCHINDUCTOR_CACHE_DIR=str(in_tmp / "c"))
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []


@needs_two_cpus
def test_a_launcher_s_number_of_threads_is_not_the_lanes(in_tmp):
    """torchrun sets OMP_NUM_THREADS=1."""
    done = run_script(*TINY, "--steps", "1", "--split", "none", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert f"all       cores {format_cpu_list(ALLOWED_CPUS)}, 2 threads" in done.stdout


def run_in_shell(redirection, *arguments, **environment):
    """The script behind a shell's redirection; fails with the script in spite of a pipe."""
    command = ["bash", "-o", "pipefail", "-c", f'"$@" {redirection}', "bash", sys.executable]
    return subprocess.run(
        [*command, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


NOWHERE = ["| head -n 3", ">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full 2>&1"]


@pytest.mark.slow
@pytest.mark.parametrize("redirection", NOWHERE)
def test_output_that_cannot_be_written_does_not_end_a_run(in_tmp, redirection):
    """Nor does it get into files that have the number of a closed descriptor."""
    options = ["--steps", "3", "--print-freq", "1", "--save-steps", "1", "--output-dir", "out"]
    done = run_in_shell(redirection, *TINY, *options)
    assert (done.returncode, done.stderr) == (0, "")
    log = Path("logs.md").read_text()
    assert "- outcome: finished after 3 of 3 steps\n" in log
    assert "| threads seen on |" in log
    assert re.search(r"^\| update .*\n(?:.*\n)*</details>\n\Z", log, re.MULTILINE)
    lines = read_metrics(Path("out"))
    assert [line["type"] for line in lines] == ["run", "step", "step", "step", "summary"]
    for name, step in (("last.pt", 3), ("previous.pt", 2)):
        assert read_checkpoint(Path("out", name))["progress"]["step"] == step
    names = {"last.pt", "previous.pt", "metrics.jsonl", "timeline.png", "trace.json"}
    assert {path.name for path in Path("out").iterdir()} == names


@pytest.mark.slow
def test_a_plan_that_nobody_takes(in_tmp):
    done = run_in_shell("| true", "plan", "--model", "resnet56", "--num-classes", "3")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_over_epochs(in_tmp, photos_with_val, capsys):
    place = ["--data-path", str(photos_with_val), "--output-dir", "out"]
    assert main([*TINY, *place, "--epochs", "2", "--print-freq", "1"]) == 0
    captured = capsys.readouterr()
    for epoch, row in enumerate(read_metrics(Path("out"), "epoch"), start=1):
        line = epoch_line(row)
        assert line.startswith(f"epoch: {epoch}  train_loss: ")
        assert f"\n{line}\n" in captured.out
        assert f"\n{line}\n" in Path("logs.md").read_text()
    assert "step 1/12: loss " in captured.out
    assert re.search(r"^step 1/12: .* left \(epoch 1/2: \d+s\)$", captured.out, re.MULTILINE)
    assert "finished after 12 of 12 steps" in captured.out


@pytest.mark.slow
def test_a_run_for_tensorboard_says_no_more_than_others(in_tmp, photos_with_val):
    """Nor has it another thread, of which the audit could warn."""
    pytest.importorskip("tensorboard")
    place = ["--data-path", str(photos_with_val), "--output-dir", "out", "--split", "even"]
    done = run_script(*TINY, *place, "--epochs", "2", "--tensorboard")
    assert (done.returncode, done.stderr) == (0, "")
    assert "metrics.jsonl, tensorboard\n" in done.stdout
    scalars = scalars_in(Path("out/tensorboard"))
    losses = [(line["step"], line["loss"]) for line in read_metrics(Path("out"), "step")]
    assert scalars["step/loss"] == [(step, pytest.approx(loss)) for step, loss in losses]
    rows = read_metrics(Path("out"), "epoch")
    expected = [(6 * row["epoch"], pytest.approx(row["val_top1"])) for row in rows]
    assert scalars["epoch/val_top1"] == expected


@pytest.mark.slow
def test_tensorboard_that_is_not_installed(in_tmp, tmp_path):
    fake = tmp_path / "fake/tensorboard"
    fake.mkdir(parents=True)
    fake.joinpath("__init__.py").write_text("raise ImportError('not there')")
    options = ["--output-dir", "out", "--tensorboard", "--steps", "1"]
    done = run_script(*TINY, *options, PYTHONPATH=str(fake.parent))
    assert (done.returncode, done.stderr) == (
        2,
        "train_split_affinity.py: error: --tensorboard needs the package tensorboard: pip install "
        "tensorboard (not there)\n",
    )
    assert not list(in_tmp.iterdir())


def test_tensorboard_is_needed_to_train_alone(monkeypatch):
    def fail():
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from ...")

    set_everywhere(monkeypatch, "event_record", fail)
    check_tensorboard(Settings())
    check_tensorboard(Settings(tensorboard=True, test_only=True))
    with pytest.raises(UserError, match=r"tensorboard \(Descriptors cannot be .* directly.\)$"):
        check_tensorboard(Settings(tensorboard=True))


@pytest.fixture
def odd_names(photos_with_val, tmp_path):
    """Photographs in folders with names in Latin-1 and in UTF-8, one of them broken."""
    data = tmp_path / os.fsdecode(b"Blumen f\xfcr \xc3\xbcben")
    for part in ("train", "val"):
        for name, new in (("temple", b"\xc3\xbc \xe4\xb8\xad"), ("flower", b"caf\xe9")):
            shutil.copytree(photos_with_val / part / name, data / part / os.fsdecode(new))
    next((data / "val").glob("caf*/0001.jpg")).write_bytes(b"no picture")
    return data


ODD_RUNS = [], ["--resume", "auto", "--epochs", "2"], ["--test-only", "--resume", "auto"]


def odd_arguments(data):
    """Of a run with that data, and an output folder of such a name; half as many epochs as it can
    be resumed to.
    """
    out = os.fsdecode(b"caf\xe9 \xc3\xbc")
    options = ["--data-path", str(data), "--output-dir", out, "--max-bad-images", "1"]
    return [*TINY, "-j", "1", "--epochs", "1", *options]


def assert_odd_files(folder):
    """What the runs of ODD_RUNS have to leave: text in UTF-8, JSON in ASCII."""
    log = Path("logs.md").read_text(encoding="utf-8")
    assert log.count("- outcome: finished after ") == 2
    assert log.count(r", data_path ") == log.count(r"Blumen f\xfcr üben,") == 3
    assert log.count(r", output_dir caf\xe9 ü,") == 3
    assert re.search(r"- warning: broken image .*/Blumen f\\xfcr üben/val/caf\\xe9/0001.jpg: ", log)
    lines = read_metrics(folder)
    assert [line["type"] for line in lines if line["type"] != "step"] == 2 * [
        "run",
        "epoch",
        "summary",
    ]
    assert lines[0]["settings"]["output_dir"] == r"caf\xe9 ü"
    table = (folder / "confusion.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == r"true class,caf\xe9,ü 中,class 2"
    assert Image.open(folder / "confusion.png").width > 300


@pytest.mark.filterwarnings("ignore:Glyph 20013")
def test_names_that_are_not_utf_8(in_tmp, odd_names, capsys):
    for more in ODD_RUNS:
        assert main([*odd_arguments(odd_names), *more]) == 0
    captured = capsys.readouterr()
    assert "resumed from caf\\xe9 ü/last.pt, after step " in captured.out
    assert "| caf\\xe9 |" in captured.out
    assert "/Blumen f\\xfcr üben/val/caf\\xe9/0001.jpg: " in captured.err
    (folder,) = Path().glob("caf*")
    assert_odd_files(folder)


@pytest.mark.slow
def test_a_locale_that_has_only_ascii(in_tmp, odd_names):
    code = "import json, sys; from train_split_affinity import main; "
    code += "sys.exit(any(main(sys.argv[2:] + more) for more in json.loads(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(ODD_RUNS), *odd_arguments(odd_names)],
        capture_output=True,
        encoding="ascii",
        timeout=120,
        env=os.environ
        | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        | {"PYTHONPATH": str(SCRIPT.parent), "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from caf\\xe9 \\xfc/last.pt, after step " in done.stdout
    assert "/Blumen f\\xfcr \\xfcben/val/caf\\xe9/0001.jpg: " in done.stderr
    (folder,) = Path().glob("caf*")
    assert_odd_files(folder)


def test_a_run_over_epochs_says_that_nothing_is_saved(in_tmp, photos_with_val, capsys):
    assert main([*TINY, "--data-path", str(photos_with_val), "--epochs", "1"]) == 0
    assert "warning: nothing will be saved without --output-dir\n" in capsys.readouterr().err
    assert "- warning: nothing will be saved without" in Path("logs.md").read_text()
    assert [path.name for path in in_tmp.iterdir()] == ["logs.md"]


def test_find_lr(in_tmp, photos, capsys, monkeypatch):
    set_everywhere(
        monkeypatch,
        "judge_rates",
        lambda rates, losses: RangeTest(tuple(rates), tuple(losses), 0.0123),
    )
    arguments = [*TINY, "--data-path", str(photos), "--steps", "12"]
    assert main(["find-lr", *arguments, "--output-dir", "out"]) == 0
    printed = capsys.readouterr().out
    assert "F forward, B backward" in printed
    assert re.search(r"^lr 1\.00e-06: loss \d\.\d{4}, smoothed \d\.\d{4}$", printed, re.MULTILINE)
    *_, last, following = printed.splitlines()
    assert last == "suggestion: --lr 0.012, a tenth of the rate up to which the loss stays low"
    assert following.startswith("next: ") and "--lr 0.012" in following
    assert sorted(path.name for path in in_tmp.rglob("*")) == ["lr.png", "out"]
    assert Image.open("out/lr.png").width > 500


def test_find_lr_suggests_nothing_rather_than_guess(in_tmp, photos, capsys):
    arguments = ["find-lr", *TINY, "--data-path", str(photos), "--steps", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "suggestion: --lr " not in printed
    *_, last, _ = printed.splitlines()
    assert last == ("no suggestion: the loss did not fall clearly before it rose; try more --steps")
    assert not list(in_tmp.iterdir()), "nor is anything written without a folder"
    assert main([*arguments, "--output-dir", "out"]) == 0
    assert Image.open("out/lr.png").width > 500


WEIGHTS = [*TINY[:2], "--weights", "DEFAULT", "--precision", "fp32"]


def test_a_run_that_starts_with_weights_by_name(in_tmp, photos_with_val, torch_cache, capsys):
    """With a rate of 0 they stay as they are, but for the classifier, which is new."""
    saved = torch.load(torch_cache("squeezenet1_1"))
    options = ["--data-path", str(photos_with_val), "-b", "4", "-j", "0", "--image-size", "32"]
    options += ["--output-dir", "out", "--epochs", "1", "--lr", "0"]
    assert main([*WEIGHTS, *options]) == 0
    captured = capsys.readouterr()
    assert (
        "SqueezeNet1_1_Weights.IMAGENET1K_V1: 50 of 52 tensors; new: classifier.1." in captured.out
    )
    state = torch.load("out/last.pt", weights_only=True)
    for name, value in state["model"].items():
        if not name.startswith("classifier"):
            assert torch.equal(value, saved[name]), name
    assert state["settings"]["weights"] == "DEFAULT"
    # The run goes on where it stands, not from its weights.
    options += ["--weights", "DEFAULT", "--resume", "auto", "--epochs", "2"]
    assert main([*TINY[:2], "--precision", "fp32", *options]) == 0
    captured = capsys.readouterr()
    assert "resumed from out/last.pt, after step 3" in captured.out
    assert "tensors; new" not in captured.out


def test_weights_by_name_decide_how_pictures_are_made_ready(in_tmp, photos, torch_cache):
    """What an option says otherwise holds."""
    torch_cache("mobilenet_v3_small")
    options = ["--model", "mobilenet_v3_small", "--weights", "DEFAULT", "--data-path", str(photos)]
    options += ["-b", "2", "-j", "0", "--steps", "1", "--output-dir", "out"]
    assert main([*options, "--image-size", "112", "--std", "0.5,0.5,0.5"]) == 0
    settings = torch.load("out/last.pt", weights_only=True)["settings"]
    assert [settings[name] for name in ("image_size", "val_resize", "mean", "std")] == [
        *(112, 128, (0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
    ]


def test_a_folder_of_all_classes_keeps_the_classifier(torch_cache):
    saved = torch.load(torch_cache("squeezenet1_1"))
    settings = Settings(model="squeezenet1_1", weights="DEFAULT", num_classes=1000, image_size=64)
    model, note = starting_model(settings, wordnet_ids())
    assert note == "weights from SqueezeNet1_1_Weights.IMAGENET1K_V1: all 52 tensors"
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    for classes in (tuple(reversed(wordnet_ids())), tuple(map(str, range(1000)))):
        model, note = starting_model(settings, classes)
        assert note.startswith(
            "weights from SqueezeNet1_1_Weights.IMAGENET1K_V1: 50 of 52 tensors; new: "
        )
        assert not torch.equal(model.classifier[1].weight, saved["classifier.1.weight"])


def test_weights_by_name_are_tested_without_any_training(
    in_tmp, imagenet_photos, torch_cache, capsys, monkeypatch
):
    """Their figures are those of torchvision's model and preprocessing."""
    set_everywhere(monkeypatch, "LARGEST_MATRIX", 100)  # a picture of more takes seconds
    torch_cache("squeezenet1_1")
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    model = torchvision.models.squeezenet1_1(weights=weights).eval()
    logits, targets = [], []
    for wordnet_id, target in (("n15075141", 999), ("tench", 0)):
        for path in sorted((imagenet_photos / "val" / wordnet_id).iterdir()):
            with torch.inference_mode():
                logits.append(model(weights.transforms()(Image.open(path)).unsqueeze(0)))
            targets.append(target)
    logits, targets = torch.cat(logits), torch.tensor(targets)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    (top1, top5) = (
        (logits.topk(count).indices == targets[:, None]).any(1).float().mean().item() * 100
        for count in (1, 5)
    )
    options = ["--test-only", "--data-path", str(imagenet_photos), "-b", "4", "-j", "0"]
    assert main([*WEIGHTS, *options, "--output-dir", "out"]) == 0
    printed = capsys.readouterr().out
    assert "SqueezeNet1_1_Weights.IMAGENET1K_V1: all 52 tensors\n" in printed
    assert (
        f"12 images: loss {loss:.4f}, top-1 {top1:.2f} %, top-5 {top5:.2f} %, computed in "
        in printed
    )
    for name in ("toilet tissue", "tench"):
        assert re.search(rf"^\| {name} +\| .*\| +6 \|$", printed, re.MULTILINE)
    assert sorted(path.name for path in Path("out").iterdir()) == [CONFUSED, PAIRS]


def test_a_run_that_goes_on_needs_no_more_the_weights_that_it_began_with(
    in_tmp, torch_cache, capsys
):
    path = torch_cache("squeezenet1_1")
    options = [*TINY, "--weights", "DEFAULT", "--output-dir", "out", "--resume", "auto"]
    assert main([*options, "--steps", "1"]) == 0
    assert "weights from SqueezeNet1_1_Weights" in capsys.readouterr().out
    path.unlink()
    assert main([*options, "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "resumed from out/last.pt, after step 1" in printed
    assert "weights from" not in printed


def test_plan_says_what_weights_are_for_and_fetches_nothing(in_tmp, torch_cache, capsys):
    assert main(["plan", "--model", "efficientnet_b1", "--weights", "DEFAULT"]) == 0
    printed = capsys.readouterr().out
    assert (
        "\nweights   EfficientNet_B1_Weights.IMAGENET1K_V2: 1000 classes, 240 px of pictures "
        "resized to 255 (bilinear); fetched when a run needs them\n"
    ) in printed
    assert "an image of 240 px takes" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_to_the_whole_process_group(in_tmp, photos, signum, code):
    """As from a terminal or a batch system: the loader processes get the signal too."""
    arguments = [*TINY, "-j", "1", "--data-path", str(photos), "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments, "--print-freq", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    os.killpg(process.pid, signum)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code
    answer, last = error.replace("train_split_affinity.py: ", "").splitlines()
    assert answer == f"{signum.name}: finishing this step; once more: end at once"
    assert last == f"stopped by {signum.name}"
    assert f"stopped by {signum.name} after " in out
    assert "| backward" in out
    assert f"- outcome: stopped by {signum.name} after " in Path("logs.md").read_text()
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no loader process is left


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory\nException raised from alloc"),
            "out of memory: try a smaller --batch-size (with more --accumulate), or fewer loaders "
            "(-j) (RuntimeError: DefaultCPUAllocator: can't allocate memory)",
        ),
        (KeyError("surprise"), "an error that was not foreseen: KeyError: 'surprise'"),
    ],
)
def test_an_error_that_nobody_foresaw(in_tmp, tmp_path, monkeypatch, capsys, error, reason, folder):
    """One line, the summary, and the traceback in a file."""

    def fail(self, output):
        if next(calls) == 3:
            raise error
        return backward(self, output)

    backward, calls = Network.backward, itertools.count(1)
    monkeypatch.setattr(Network, "backward", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = ["--output-dir", "out"] if folder else []
    assert main([*TINY, "--steps", "5", *options]) == 1
    captured = capsys.readouterr()
    file = Path("out/traceback.txt") if folder else next(tmp_path.glob("traceback-*.txt"))
    assert captured.err == (f"train_split_affinity.py: error: {reason}; traceback in {file}\n")
    assert f"\n{reason} after 2 of 5 steps\n" in captured.out
    assert "| backward" in captured.out
    assert f"- outcome: {reason} after 2 of 5 steps\n" in Path("logs.md").read_text()
    text = file.read_text()
    assert text.startswith("Traceback (most recent call last):\n")
    assert "in fail\n" in text
    assert (in_tmp / "out/last.pt").exists() == folder


def test_a_traceback_that_cannot_be_written_is_shown(in_tmp, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    set_everywhere(monkeypatch, "read_topology", lambda: [][0])
    assert main(TINY) == 1
    error = capsys.readouterr().err
    assert "error: an error that was not foreseen: IndexError: list index out of range" in error
    assert "Traceback (most recent call last):\n" in error


def test_an_interrupt_before_the_run_has_begun(in_tmp, capsys, monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt

    set_everywhere(monkeypatch, "open_data", interrupted)
    assert main(TINY) == 130
    assert capsys.readouterr().err == "train_split_affinity.py: stopped by SIGINT\n"


@pytest.mark.slow
@needs_two_cpus
def test_openmp_binding_variables_are_dropped(in_tmp):
    environment = {"OMP_PROC_BIND": "true", "GOMP_CPU_AFFINITY": "0", "OMP_DYNAMIC": "true"}
    environment["OMP_PLACES"] = "cores"
    threads = ["--forward-threads", "2", "--backward-threads", "2"]  # so that there are teams
    done = run_script(*TINY, *threads, "--steps", "2", "--output-dir", "out", **environment)
    assert done.returncode == 0, done.stderr
    assert "strayed" not in done.stderr
    for name, value in environment.items():
        assert f"warning: {name}={value} is ignored" in done.stderr
    run, *_, summary = read_metrics(Path("out"))
    cpus = run["plan"]["forward"]["cpus"] + run["plan"]["backward"]["cpus"]
    assert sorted(cpus) == sorted(ALLOWED_CPUS)
    assert summary["stray_s"] == 0


@pytest.mark.slow
@needs_two_cpus
def test_a_lane_uses_the_threads_that_openmp_gives(in_tmp):
    """Kernels that counted on more would wait for them forever."""
    threads = ["--forward-threads", "2", "--backward-threads", "2"]
    options = [*threads, "--steps", "2", "--output-dir", "out"]
    done = run_script(*TINY, *options, OMP_THREAD_LIMIT="1")
    assert done.returncode == 0, done.stderr
    (run, *_), log = read_metrics(Path("out")), Path("logs.md").read_text()
    for lane in ("forward", "backward"):
        assert f"warning: {lane} lane: OpenMP started 1 thread, not 2 (is OMP_" in done.stderr
        assert run["plan"][lane]["threads"] == run["settings"][f"{lane}_threads"] == 1
        assert re.search(rf"^- {lane} +cores [\d,-]+, 1 thread: ", log, re.MULTILINE)
        assert re.search(rf"^\| {lane} +\| +1 \|", done.stdout, re.MULTILINE)
        assert re.search(rf"^\| {lane} +\|[^|]+\| +1 \|", log, re.MULTILINE)


@pytest.mark.slow
def test_torchrun_s_thread_count_is_overruled(in_tmp):
    done = run_script(*TINY, "--steps", "1", "--split", "none", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    threads = len(usable_cores(read_topology()))
    assert f"{threads} thread" in done.stdout
    assert "warning" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not TWO_CPUS, reason="needs two logical CPUs to take one away")
def test_one_allowed_cpu(in_tmp):
    cpu = min(ALLOWED_CPUS)
    done = subprocess.run(
        [sys.executable, SCRIPT, *TINY, "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    assert done.returncode == 0, done.stderr
    assert "note: one core: both groups share it, nothing is separated" in done.stdout


@pytest.mark.parametrize("package", ["torchvision", "torch"])
def test_packages_that_do_not_fit_together(in_tmp, tmp_path, package):
    fake = tmp_path / "fake" / package
    fake.mkdir(parents=True)
    fake.joinpath("__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    done = run_script("--steps", "1", PYTHONPATH=str(fake.parent))
    assert (done.returncode, done.stdout) == (
        2,
        "train --steps 1; loading PyTorch, which takes some seconds\n",
    )
    assert done.stderr.count("\n") == 1
    assert "operator torchvision::nms does not exist" in done.stderr
    assert "a torch release needs the torchvision made for it" in done.stderr
    assert not list(in_tmp.iterdir())


@pytest.fixture
def without_torch(tmp_path):
    """Where to look for packages first: there is a torch that cannot be imported."""
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    fake.joinpath("__init__.py").write_text('raise RuntimeError("nobody needs me")')
    return {"PYTHONPATH": str(fake.parent)}


@pytest.mark.parametrize(
    ("arguments", "begin", "end"),
    [
        (
            "--help",
            "usage: train_split_affinity.py [COMMAND] [options]\n",
            "too.\n",
        ),
        (
            "train -h",
            "usage: train_split_affinity.py [COMMAND] [options]\n",
            "too.\n",
        ),
        (
            "plan --help",
            "usage: train_split_affinity.py plan [options]\n",
            "plan --ranks 4\n",
        ),
        ("find-lr --help", "usage: train_split_affinity.py find-lr [options]", "--steps 200\n"),
        ("compare --steps 3 -h", "usage: train_split_affinity.py compare ", " compare.json\n"),
        ("--version", f"train_split_affinity.py {__version__}, Python 3.", "\n"),
        ("plan --list-data-sets", "image folder\n  what     your own pictures", "--num-classes\n"),
    ],
)
def test_help_does_not_wait_for_torch(in_tmp, without_torch, arguments, begin, end):
    done = run_script(*arguments.split(), **without_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(begin)
    assert done.stdout.endswith(end)
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("command", ["train", "predict"])
def test_help_is_the_same_without_docstrings(in_tmp, command):
    texts = [
        subprocess.run([sys.executable, *flags, SCRIPT, command, "--help"], capture_output=True)
        for flags in ([], ["-OO"])
    ]
    assert texts[0].stdout == texts[1].stdout
    assert b"\nmodel and data:\n" in texts[1].stdout
    assert b"__init__" not in texts[1].stdout


@pytest.mark.slow
def test_a_run_without_docstrings_and_assertions(in_tmp):
    command = [sys.executable, "-OO", SCRIPT, *TINY, "-j", "1", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "finished after 2 of 2 steps" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--split 0:1", "argument --split: '0:1' leaves a group without cores: both parts must"),
        ("plan --batchsize 3", "unrecognized arguments: --batchsize 3; did you mean --batch-size?"),
        ("plan --resume a.pt", "--resume a.pt is for train and predict, not for plan"),
        ("--min-res 128", "--min-res and --end-ramp belong together: give both"),
        (
            "trian",
            "unknown command 'trian' (choose from train, data, plan, find-lr, compare, predict)",
        ),
    ],
)
def test_nor_do_errors_in_arguments(in_tmp, without_torch, arguments, message):
    done = run_script(*arguments.split(), **without_torch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"train_split_affinity.py: error: {message}")
    assert done.stderr.count("\n") == 1
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("redirection", NOWHERE)
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--version", 0), ("--hlep", 2)])
def test_help_that_nobody_reads(in_tmp, argument, code, redirection):
    done = run_in_shell(redirection, argument)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_version_names_what_is_installed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--version"])
    assert ended.value.code == 0
    versions = all_versions()
    printed = capsys.readouterr().out
    assert f"Python {versions['python']}, " in printed
    for name in ("torch", "torchvision"):
        assert f"{name} {versions[name].partition('+')[0]}" in printed


def test_the_list_of_models(in_tmp, capsys):
    assert main(["--list-models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model                       parameters"
    assert [line.split()[0] for line in lines[1:]] == [*classifier_names(), "timm/NAME"]
    assert lines[-1].endswith(f" those of timm {installed_version('timm')}")
    for line in (
        "resnet56                       917,368",
        "resnet50                    25,557,032",
        "inception_v3                23,834,568",  # without its auxiliary head
        "regnet_y_400mf               4,344,144",
    ):
        assert line in lines
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("name", ["alexnet", "googlenet", "inception_v3", "vit_b_16", "resnet56"])
def test_the_list_of_models_has_the_parameters_that_are_built(name):
    with torch.device("meta"):
        model = build_model(name, 1000, 224)
    assert parameter_count(name) == sum(weight.numel() for weight in model.parameters())
