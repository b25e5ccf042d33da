"""Which precision a machine computes in, unless one is asked for: bf16 or fp32. Pure."""

from __future__ import annotations

from split_affinity.machine.topology import Topology
from split_affinity.options.settings import SpeedSettings


def choose_precision(settings: SpeedSettings, topology: Topology) -> tuple[str, str]:
    """The precision in force, fp32 or bf16, and the reason for it."""
    cpu = f"the CPU of {topology.name}" if topology.recorded_in else "the CPU"
    native = f"{cpu} computes bfloat16 natively ({topology.bf16})"
    if not topology.bf16:
        native = f"{cpu} shows no native bfloat16 arithmetic (AMX, AVX512-BF16 or Arm BF16)"
    if settings.precision != "auto":
        return settings.precision, f"as asked; {native}"
    return ("bf16" if topology.bf16 else "fp32"), native
