"""What several tests of options use."""

from pathlib import Path

from split_affinity.options.commands import parse_arguments
from split_affinity.options.recipes import FROM_CHECKPOINT

OUT = Path("out")


def with_recipe(name, *options):
    """The settings of a recipe, with what it needs and further options."""
    needs = ["--init-from", "w.pt"] if name in FROM_CHECKPOINT else []
    needs += ["--dataset", "digits"] if name == "digits" else []  # which a path leaves out
    return parse_arguments(["--recipe", name, "--data-path", "data", *needs, *options])[1]
