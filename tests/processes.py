"""The program as a process."""

import os
import subprocess
import sys

from places import SCRIPT


def run_script(*arguments, **environment):
    """The script as a user runs it, in the current directory."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
