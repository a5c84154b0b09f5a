"""A profile from host constants and a traced network, where nobody could measure.

Every formula is one line of a roofline (Williams, Waterman & Patterson, CACM 52(4), 2009) with the corrections that small
batches need. With m rows, n columns, depth k of a matrix product or an implicit-GEMM convolution:

    flop rate = peak * efficiency * (m n / (m n + half_outputs)) * (k / (k + half_depth))
    time      = gemm_floor + max(flops / flop rate, bytes / memory rate)        (other kernels: kernel_floor + bytes / rate)

A kernel that reads its weights in place reads them once per pass, and PCIe is not cached between passes:

    matrix product, convolution      ceil(m / tile_rows) passes, at the streaming rate
    3x3 convolution, stride 1        1 pass: Winograd's transform reads the weights once, its product reads the transform
    matrix-vector product (m = 1)    1 pass, at the aligned rate
    embedding                        the rows looked up, once
    BatchNorm                        one 32-byte request a channel, at the strided rate: its threads serve one channel
    LayerNorm, broadcast operands    once per row of activations

    added time = max(passes * bytes / rate + direct_floor - time, direct_floor)

since a kernel's arithmetic overlaps its own reads. The pass counts agree with what DeepPlan's published V100 plans decide
and with layers measured on an H200 (LayerNorm of 384 rows: 48 us predicted, 47 us measured).
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from sim.errors import InputError
from sim.host import Host, Roofline
from sim.network import Layer, Network
from sim.profile import LayerTiming, Profile, Provenance, Timing

if TYPE_CHECKING:  # both import torch, which an estimate does not need
    from sim.operators import Op
    from sim.trace import Trace

REQUEST_BYTES = 32
"""The smallest read that crosses PCIe: one sector of an NVIDIA GPU's L2."""
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def estimate(trace: Trace, host: Host, provenance: Provenance) -> Profile:
    """Raises InputError where the host file has no roofline section."""
    roofline = host.roofline
    if roofline is None:
        raise InputError(
            f"host {host.name!r} has no roofline figures, so nothing can be estimated for it; measure a profile there "
            "with `calibrate run` and pass --profile"
        )
    model = _Model(host, roofline, trace.network)
    layers = tuple(
        model.layer(layer, ops) for layer, ops in zip(trace.network.layers, trace.work, strict=True)
    )
    return Profile("estimated", trace.network, host.digest, layers, provenance)


class _Model:
    def __init__(self, host: Host, roofline: Roofline, network: Network) -> None:
        self.roofline = roofline
        self.network = network
        self.item_bytes = _ITEM_BYTES[network.dtype]
        peak = roofline.peak_fp32_flops_per_s if network.dtype == "fp32" else roofline.peak_fp16_flops_per_s
        self.peak = peak.value
        self.issue_ns = host.costs.issue_kernel_ns.value
        costs = host.costs
        self.peer_ratio = max(1.0, costs.peer_read_bytes_per_s.value / costs.direct_bytes_per_s.value)
        self.peers = bool(host.peers)

    def layer(self, layer: Layer, ops: tuple[Op, ...]) -> LayerTiming:
        resident = 0.0
        direct = dict.fromkeys((r.storage for r in layer.reads), 0.0)
        touched = {r.storage: r.touched_bytes for r in layer.reads}
        for op in ops:
            time_ns = self.kernel_ns(op)
            resident += time_ns
            for storage in op.reads:
                flow_ns = self.read_bytes(op, storage, touched[storage]) / self.direct_rate(op) * 1e9
                floor_ns = self.roofline.direct_floor_ns.value
                share = len(op.reads)
                direct[storage] += max(flow_ns + (floor_ns - time_ns) / share, floor_ns / share)
        extras = tuple(Timing(direct[r.storage]) for r in layer.reads)
        peer = tuple(Timing(t.median_ns / self.peer_ratio) for t in extras) if self.peers else ()
        return LayerTiming(Timing(resident), Timing(self.issue_ns * max(1, len(ops))), extras, peer)

    def kernel_ns(self, op: Op) -> float:
        roof = self.roofline
        weight_bytes = sum(self.network.storages[s].size_bytes for s in op.reads if op.kind != "gather")
        memory_ns = (op.moved_bytes + weight_bytes) / roof.memory_bytes_per_s.value * 1e9
        if op.m <= 0 or op.flops <= 0:
            return roof.kernel_floor_ns.value + max(memory_ns, op.flops / self.peak * 1e9)
        outputs = op.m * op.n * max(1, op.groups)
        rate = (
            self.peak
            * roof.gemm_efficiency.value
            * outputs
            / (outputs + roof.gemm_half_outputs.value)
            * op.k
            / (op.k + roof.gemm_half_depth.value)
        )
        return roof.gemm_floor_ns.value + max(op.flops / rate * 1e9, memory_ns)

    def read_bytes(self, op: Op, storage: int, touched_bytes: int) -> float:
        """Bytes that a kernel brings over PCIe to read one storage in place, each pass counted."""
        if _per_channel(op):
            return touched_bytes / self.item_bytes * REQUEST_BYTES
        if op.kind == "conv" and op.window == 9 and op.stride == 1 and op.groups == 1:
            return touched_bytes
        if op.kind in ("conv", "gemm"):
            return touched_bytes * ceil(op.m / self.roofline.tile_rows.value)
        if op.kind == "gather":
            return touched_bytes
        rows = op.moved_bytes / 2 / self.network.storages[storage].size_bytes
        return touched_bytes * max(1.0, rows)

    def direct_rate(self, op: Op) -> float:
        """Bytes per second of in-place reads by this kind of kernel."""
        roof = self.roofline
        if _per_channel(op):
            return roof.direct_strided_bytes_per_s.value
        whole_rows = (op.kind == "gemm" and op.m == 1) or op.kind == "gather"
        return (roof.direct_aligned_bytes_per_s if whole_rows else roof.direct_stream_bytes_per_s).value


def _per_channel(op: Op) -> bool:
    return "batch_norm" in op.name
