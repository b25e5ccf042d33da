"""What the programs of deploy/ share. Run: python -m pytest tests/deploy/test_checkpoint.py"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoint as cp
import pytest
import torch

from split_affinity.errors import RunError, UserError
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.models.pretrained import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from split_affinity.options.settings import Settings, as_options
from train_split_affinity import main as train


def test_a_checkpoints_images_are_those_of_its_validation(best, digits):
    checkpoint = cp.read_checkpoint(best)
    data = cp.open_images(checkpoint)
    targets = torch.tensor(cp.true_classes(data.val))
    right = seen = 0
    for images, numbers in cp.batches(checkpoint, data.val, range(len(data.val)), 50):
        with torch.inference_mode():
            right += int((checkpoint.model(images).argmax(1) == targets[numbers]).sum())
        seen += len(images)
    row = checkpoint.state["progress"]["history"][-1]
    assert seen == len(data.val) == 360
    assert abs(100 * right / seen - row["val_top1"]) < 1  # in bf16 there


def test_images_that_were_kept_apart_are_found_again(trained, digits, tmp_path):
    shutil.copytree(digits / "train", tmp_path / "train")
    best = trained("resnet20", "--val-share", "0.25", "--data-path", str(tmp_path))
    data = cp.open_images(cp.read_checkpoint(best))
    everywhere = cp.true_classes(data.train)
    assert abs(len(data.val) - 0.25 * len(data.train)) <= 10  # rounded in each class
    assert cp.true_classes(data.val) == [everywhere[index] for index in data.val.indices]


def test_broken_images_are_left_out_and_named(best, digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "data")
    victim = sorted((tmp_path / "data/val/3").iterdir())[0]
    victim.write_bytes(b"no picture")
    checkpoint = cp.read_checkpoint(best)
    data = cp.open_images(checkpoint, tmp_path / "data")
    found = [n for _, numbers in cp.batches(checkpoint, data.val, range(360), 64) for n in numbers]
    assert len(found) == 359
    assert victim.name in capsys.readouterr().err
    index = next(i for i, (path, _) in enumerate(data.val.samples) if Path(path) == victim)
    with pytest.raises(RunError, match="none of the images can be read"):
        list(cp.batches(checkpoint, data.val, [index], 8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: shutil.rmtree(path), "does not exist"),
        (lambda path: (path / "train/new").mkdir(), "in class new"),
        (lambda path: shutil.rmtree(path / "val"), "has no images to validate with"),
        (lambda path: shutil.rmtree(path / "train/4") or shutil.rmtree(path / "val/4"), "class 4"),
    ],
    ids=["gone", "empty class", "no validation images", "another class"],
)
def test_data_that_do_not_fit(best, digits, tmp_path, change, said):
    shutil.copytree(digits, tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises(UserError, match=said) as caught:
        cp.open_images(cp.read_checkpoint(best), tmp_path / "data")
    assert "--data-path" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_asked_for_is_told_as_it_was_typed(best):
    state = cp.read_checkpoint(best).state
    native = Preprocessing(32, 37)
    given = as_options(cp.settings_as_given(state, native))
    assert "--model resnet20 " in given and "--subset 0.1" in given and "--val-resize" not in given
    del state["asked"]  # as in files of earlier versions
    assert "--model resnet20 " in as_options(cp.settings_as_given(state, native))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Path("/home/alice/photos"), Path("photos")),
        (Path("photos/new"), Path("photos/new")),
        ("/home/alice/weights.csv", "weights.csv"),
        ("../alice/weights.csv", "weights.csv"),
        ("~alice/weights.csv", "weights.csv"),
        ("balanced", "balanced"),
        ("s3://bucket/run", "s3://bucket/run"),
        (Path("/"), Path()),
        (0.1, 0.1),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_of_a_path_of_the_machine_the_last_part_is_public(value, shown):
    assert cp.public(value) == shown and type(cp.public(value)) is type(value)


def test_a_run_on_synthetic_images_has_none_to_show(tmp_path):
    arguments = "--model resnet20 --image-size 32 --num-classes 3 -b 2 -j 0 --steps 1".split()
    folder = str(tmp_path / "out")
    assert train([*arguments, "--output-dir", folder, "--log-file", str(tmp_path / "log")]) == 0
    with pytest.raises(UserError, match="trained on synthetic images; --data-path DIR"):
        cp.open_images(cp.read_checkpoint(tmp_path / "out/last.pt"))


def test_a_description_is_text_that_says_all(best):
    checkpoint = cp.read_checkpoint(best)
    facts = {name: json.loads(text) for name, text in cp.describe(checkpoint).items()}
    assert facts["model"] == "resnet20"
    assert facts["classes"] == [str(digit) for digit in range(10)]
    assert Preprocessing(**facts["preprocessing"]) == Preprocessing(
        32, 37, "bilinear", list(IMAGENET_MEAN), list(IMAGENET_STD)
    )
    assert facts["full_decode"] is False


def test_threads_are_those_of_the_allowed_cores():
    before = torch.get_num_threads()
    plan = plan_cores(read_topology(), Settings(split="none"))
    try:
        assert cp.use_allowed_cores() == torch.get_num_threads() == plan.forward.threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("--x 1: no"), 2, "error: --x 1: no"),
        (RunError("it broke"), 1, "error: it broke"),
        (RuntimeError("what?"), 1, "not foreseen: RuntimeError: what?; traceback in"),
        (MemoryError("DefaultCPUAllocator: 3 GiB"), 2, "not enough memory: 3 GiB"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGINT, 130, "stopped by SIGINT"),
        (None, 0, ""),
    ],
)
def test_errors_end_in_one_line(error, code, said, capsys):
    @cp.program
    def main(argv):
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        elif error:
            raise error

    assert main([]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert err.count("\n") == bool(said)


def started(program: str, before: str = "pass", limit_bytes: int | None = None, **environment: str):
    """What a program of deploy/ prints, and its exit code, if it begins in another Python."""
    path = cp.HERE / program
    code = (
        f"import runpy, sys; {before}; sys.path.insert(0, {str(path.parent)!r})\n"
        f"sys.argv = [{program!r}, 'x.pt', *sys.argv[1:]]\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    limit = (limit_bytes, limit_bytes) if limit_bytes else None
    return subprocess.run(
        [sys.executable, "-c", code, *(["--output-dir", "y"] if program == "export.py" else [])],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_AS, limit)),
    )


@pytest.mark.parametrize(
    ("program", "package"),
    [("report.py", "jinja2"), ("report.py", "torch"), ("export.py", "onnx"), ("export.py", "PIL")],
)
def test_a_missing_package_is_named_with_its_remedy(program, package):
    done = started(program, f"sys.modules[{package!r}] = None")
    assert done.returncode == 2
    name, all_of_them = package.replace("PIL", "pillow"), f"{cp.HERE}/requirements.txt"
    assert done.stderr == (
        f"{program}: error: cannot load {name}, which is not installed: pip install {name}; "
        f"all that deploy/ needs: pip install -r {all_of_them}\n"
    )


@pytest.mark.parametrize(
    ("package", "text", "said"),
    [
        ("torchvision", "RuntimeError('operator nms does not exist')", "torchvision made for it"),
        ("scipy", "ImportError('numpy is too old')", "pip install --force-reinstall scipy"),
        ("scipy", "OSError('x.so: cannot open shared object')", "install it again"),
        ("scipy", "MemoryError()", "too little memory or address space: raise `ulimit -v`"),
        ("scipy", "SystemError('lost')", "too little memory or address space: raise `ulimit -v`"),
    ],
)
def test_a_package_that_does_not_fit_is_named_with_its_remedy(tmp_path, package, text, said):
    (tmp_path / f"{package}.py").write_text(f"raise {text}")
    done = started("report.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("report.py: error: cannot load ") and said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("limit_bytes", [2**29, 3 * 2**30])
def test_too_little_address_space_is_said_in_a_line(limit_bytes):
    done = started("report.py", limit_bytes=limit_bytes)
    assert done.returncode == 2
    assert "address space: raise `ulimit -v`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_page_without_gradio_ends_in_a_line():
    done = started("space/app.py", "sys.modules['gradio'] = None")
    assert done.returncode == 2
    assert done.stderr.startswith("app.py: error: ") and done.stderr.count("\n") == 1
    own = cp.HERE / "space" / ".venv"  # packages of its own, not beside those of the trainer
    assert f"python3 -m venv {own} && {own}/bin/pip install -r " in done.stderr
