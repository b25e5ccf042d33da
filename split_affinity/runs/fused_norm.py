"""Whether batch norm is fused with what follows it in training, as `--fused-norm` asks."""

from __future__ import annotations

from split_affinity.kernels.compiler import CannotCompile
from split_affinity.kernels.fused_norm import LEAST_GAIN, measure_gain
from split_affinity.models.fusion import has_norms
from split_affinity.models.tracing import CannotTrace
from split_affinity.options.settings import Settings
from split_affinity.text import plural
from split_affinity.training.network import Network


def fuse_where_it_pays(network: Network, settings: Settings) -> str:
    """Fuse the norms of a network; returns in one line what is in force, and why.

    Call this on the lane that runs the forward pass. Without a compiler, or for a model that cannot
    be traced, everything stays as it is.
    """
    if settings.test_only:
        return ""
    try:
        reason = reason_against(network, settings)
        if not reason:
            gain = measure_gain(settings.batch_size, settings.image_size, network.bf16)
            slow = settings.fused_norm == "auto" and gain < LEAST_GAIN
            reason = f"that would be {gain:.2f} times as fast here" if slow else ""
        network.fused = not reason
        count = network.build_view()
    except (CannotCompile, CannotTrace) as error:
        network.fused, reason = False, str(error)
    if reason:
        return f"batch norm is not fused: {reason}"
    return f"batch norm is fused: {plural(count, 'norm')} now, {gain:.1f} times as fast here"


def reason_against(network: Network, settings: Settings) -> str:
    """What speaks against fusing, without a look at the machine; nothing if nothing does."""
    if settings.fused_norm == "off":
        return "as asked"
    if not network.channels_last:
        return "the operator is made for channels_last"
    return "" if has_norms(network.model) else f"{settings.model} has none of 16 channels or more"
