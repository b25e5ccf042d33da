"""Whether batch norm is fused with what follows it in training, as `--fused-norm` asks."""

from __future__ import annotations

import platform

from split_affinity.kernels.compiler import CannotCompile
from split_affinity.kernels.fused_norm import kernels
from split_affinity.models.fusion import has_norms
from split_affinity.models.tracing import CannotTrace
from split_affinity.options.settings import Settings
from split_affinity.text import plural
from split_affinity.training.network import Network

# Where it was measured to be faster, in bfloat16 and float32: with AVX-512, with AVX2, with neither
# (docs/performance.md). A measurement here would decide otherwise on a busy day.
MEASURED = ("x86_64",)


def fuse_where_it_pays(network: Network, settings: Settings) -> str:
    """Fuse the norms of a network; returns in one line what is in force, and why.

    Without a compiler, or for a model that cannot be traced, everything stays as it is.
    """
    if settings.test_only:
        return ""
    reason = reason_against(network, settings)
    try:
        if not reason:
            kernels()
        network.fused = not reason
        count = network.build_view()
    except (CannotCompile, CannotTrace) as error:
        network.fused, reason = False, str(error)
    if reason:
        return f"batch norm is not fused: {reason}"
    return f"batch norm is fused with what follows it, {plural(count, 'time')} in {settings.model}"


def reason_against(network: Network, settings: Settings) -> str:
    """What speaks against fusing before anything is tried; nothing if nothing does."""
    if settings.fused_norm == "off":
        return "as asked"
    if not network.channels_last:
        return "the operator is made for channels_last"
    if not has_norms(network.model):
        return f"{settings.model} has none of 16 channels or more"
    machine = platform.machine()
    if settings.fused_norm == "auto" and machine not in MEASURED:
        return f"not measured on {machine}; --fused-norm on tries it"
    return ""
