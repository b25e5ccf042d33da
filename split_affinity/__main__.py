"""The program where only the package is at hand: `python -m split_affinity`, the installed command
`train-split-affinity`, and train_split_affinity.pyz. The story itself is train_split_affinity.py.
"""

import sys

from split_affinity.start import begin


def main() -> None:
    """Run the program, and end with its exit code."""
    begin()
    from train_split_affinity import main as run  # which imports PyTorch

    sys.exit(run())


if __name__ == "__main__":
    main()
