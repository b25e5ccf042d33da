"""Where things are, for tests at any depth."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_split_affinity.py"
