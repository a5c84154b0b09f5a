"""Copies alone of plans over two links, prepared again and again in turn, beside large copies of memory of their own: is it the preparation,
the plan, or the moment?"""
import copy, json, statistics, sys, time
import torch
from hwexec.core import steady
from hwexec.limit import together_rate, pinned_rates
from hwexec.preparing import open_device, prepare
from hwexec.timing import time_ns
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search
med = statistics.median
out, root, N, rounds, *names = sys.argv[1:]
cpu = "cpu" in names; names = [n for n in names if n != "cpu"]
D = open_device("cpu" if cpu else "cuda"); host = read_host(f"{root}/hosts/{N}.yaml"); record = {}
ready = []
for name in names:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"{root}/profiles/{N}/{file}.yaml"); built = build(m, dtype=d)
    ready.append((m, d, p, built, search(p, host, Options()).best.plan))
for r in range(int(rounds)):
    for m, d, p, built, plan in ready:
        with prepare(built.module, plan, built.inputs, network=p.network, host=host, device=D) as cold, torch.no_grad():
            lanes = {}; 
            for c in plan.chunks: lanes[c.path[0]] = lanes.get(c.path[0], 0) + c.stop_bytes - c.start_bytes
            big = max(lanes.values())
            a = cold.copies_alone(8); b = cold.copies_alone(8)
            # each lane by itself, and the same bytes of both lanes as one copy each: lower half and upper half of the arena
            moves = [(op, mv) for op, mv in cold._stage.copies() if op.source is None]
            one = {}
            for g in (0, 1):
                mine = [mv for op, mv in moves if op.destination == g]
                s = cold._stage.streams[f"h2d:{g}"]
                one[g] = time_ns(lambda: [mv.issue() for mv in mine], D, [s], repeats=5, warmup=1)
            H, half = cold._stage.host.tensor, cold._stage.host.size_bytes // 2 // 4096 * 4096
            size = min(half, big)
            to = [D.allocate(size, 0), D.allocate(size, 1)]
            S = [cold._stage.streams["h2d:0"], cold._stage.streams["h2d:1"]]
            calls = [D.ready_copy(S[0], to[0], H[:size]), D.ready_copy(S[1], to[1], H[half:half+size])]
            halves = time_ns(lambda: [c() for c in calls], D, S, repeats=8, warmup=1)
            rate = lambda n, t: n / t.median_ns
            row = {"alone": [list(a.raw), list(b.raw)], "lanes": lanes, "one": {g: list(t.raw) for g, t in one.items()}, "halves": list(halves.raw), "size": size, "address": H.data_ptr()}
            record.setdefault(f"{m} {d}", []).append(row)
            print(f"{m:14} {d} lanes {[round(x/2**20) for x in lanes.values()]} MiB, {len(plan.chunks)} chunks: larger lane {rate(big,a):.2f} {rate(big,b):.2f} GB/s; by itself {rate(lanes[0],one[0]):.2f}, {rate(lanes[1],one[1]):.2f}; halves {rate(size,halves):.2f}; at {H.data_ptr():x}", flush=True)
            del calls, to
    if not cpu: print("   large copies, own memory:", [round(x/1e9, 2) for x in pinned_rates(D, (0, 1))], "together", round((together_rate(D, (0, 1)) or 0)/1e9, 2), flush=True)
json.dump(record, open(out, "w"))
