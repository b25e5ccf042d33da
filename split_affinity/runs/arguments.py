"""The command line of several ranks: one command and the same settings for all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from split_affinity.checkpoints.resume import saved_defaults
from split_affinity.errors import UserError
from split_affinity.options.commands import parse_arguments, split_arguments, typed_options
from split_affinity.options.existence import missing_places
from split_affinity.options.settings import Settings
from split_affinity.ranks.ranks import Ranks
from split_affinity.text import as_option, option_text

# These may differ from machine to machine.
OF_A_MACHINE = """
    data_path augment_confused teacher_weights class_weights workers forward_cores backward_cores
    loader_cores forward_threads backward_threads tuned_malloc""".split()


def check_same_options(given: Sequence[dict[str, str]]) -> None:
    """Raise UserError for the first option that differs between ranks and may not."""
    for rank, name in itertools.product(range(len(given)), sorted(set().union(*given))):
        here, there = given[rank].get(name), given[0].get(name)
        if here != there and name not in OF_A_MACHINE:
            texts = (
                as_option(name, text) if text else f"no {as_option(name, True)}"
                for text in (here, there)
            )
            raise UserError("rank {} was given {}, rank 0 {}".format(rank, *texts))


def parse_on_all_ranks(argv: Sequence[str], ranks: Ranks) -> tuple[str, Settings]:
    """The command and the settings.

    Rank 0 decides, since it alone may have the checkpoint to go on from; what belongs to a machine
    is taken as you typed it there. Raises UserError if another rank was given other options.
    """
    command, settings = ranks.on_rank_0(parse_arguments, argv, saved_defaults, ranks.size)
    typed = typed_options(*split_arguments(argv))
    given = ranks.gather_objects({name: option_text(value) for name, value in typed.items()})
    with ranks.together():
        check_same_options(given)
    own = {name: typed[name] for name in OF_A_MACHINE if name in typed}
    settings = dataclasses.replace(settings, **own)
    with ranks.together():
        for message in missing_places(command, settings, ranks.rank):
            raise UserError(message)
    return command, settings
