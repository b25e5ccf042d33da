"""What is said where a package cannot be loaded. Run: python -m pytest tests/test_loading.py"""

import os
import resource
import subprocess
import sys

import pytest
from places import SCRIPT
from processes import run_script

from split_affinity.start import explain_import_error

MISMATCH = "a torch release needs the torchvision made for it"


@pytest.mark.parametrize(
    ("error", "package", "said"),
    [
        (ModuleNotFoundError("No module named 'nobody'", name="nobody"), "nobody", "nobody, which"),
        (ModuleNotFoundError("No module named 'n.a'", name="n.a"), "torch", "pip install n"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "torch", "-v"),
        (OSError("libgomp.so.1: cannot allocate memory"), "torchvision", "ulimit -v` (here "),
        (OSError(12, "Cannot allocate memory"), "PIL", "ulimit -v` (here "),
        (MemoryError(), "torch", "cannot load torch: MemoryError; too little memory"),
        (RuntimeError("can't start new thread"), "torch", "more threads are needed: raise `ulimit"),
        (ImportError("undefined symbol: _ZN3c10"), "torchvision", MISMATCH),
        (
            ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
            "torch",
            MISMATCH,
        ),
        (ImportError("No module named 'torch._C'", name="torch._C"), "torch", MISMATCH),
        (ImportError("libjpeg.so: no such file"), "PIL", "--force-reinstall pillow"),
        (AttributeError("_ARRAY_API\nnot found"), "psutil", ": _ARRAY_API; install it again: pip"),
    ],
)
def test_why_a_package_cannot_be_loaded(error, package, said):
    text = explain_import_error(error, package)
    assert text.startswith("cannot load ")
    assert said in text
    assert "\n" not in text
    assert (MISMATCH in text) == (said == MISMATCH), "no other's remedy"


WITHOUT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: find(name, *rest) if name != {name!r} else None
"""


@pytest.mark.parametrize(
    ("package", "name"), [("psutil", "psutil"), ("tqdm", "tqdm"), ("PIL", "pillow")]
)
def test_a_package_that_is_not_installed(in_tmp, tmp_path, package, name):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(name=package))
    # torchvision needs Pillow, and is imported before it
    for other in ("torch", "torchvision") if package != "PIL" else ():
        (tmp_path / f"{other}.py").touch()
    done = run_script("--steps", "1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        f"train_split_affinity.py: error: cannot load {name}, which is not installed: "
        f"pip install {name}\n"
    )
    assert not list(in_tmp.iterdir())


# As C++ and OpenBLAS end a process.
ABORTS = r"import os; os.write(2, b'terminate\n  what():  std::bad_alloc\n\n'); os.abort()"
EXITS = "import os; os.write(2, b'OpenBLAS error: alas'); os._exit(1)"


@pytest.mark.parametrize(
    ("torch", "limit_bytes", "reason"),
    [
        (None, 2**30, "failed to map segment from shared object"),
        (ABORTS, 7 * 2**30, "cannot load torch: what():  std::bad_alloc"),
        (EXITS, 7 * 2**30, "cannot load torch: OpenBLAS error: alas"),
    ],
)
def test_too_little_address_space(in_tmp, tmp_path, torch, limit_bytes, reason):
    if torch:
        (tmp_path / "torch.py").write_text(torch)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"{reason}; too little memory or address space: raise `ulimit -v` (here" in done.stderr
    assert f"(here {limit_bytes // 1024})" in done.stderr
    assert not list(in_tmp.iterdir())
