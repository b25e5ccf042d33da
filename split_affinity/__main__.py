"""The program as `python -m split_affinity`, as an installed command, and as a .pyz file."""

import sys

from split_affinity.start import begin


def main() -> None:
    """Run the program and exit with its code."""
    begin()
    from train_split_affinity import main as run  # imports PyTorch

    sys.exit(run())


if __name__ == "__main__":
    main()
