"""Best plans over two links as searched, the same not joined, and the best that waits for each lane, in turn."""
import copy, json, statistics, sys, time
from dataclasses import replace
from functools import partial
import torch
import sim.search as search_module
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.ops import Wait
from sim.program import lower
from sim.search import Options, search
from sim.simulate import simulate
med = statistics.median
out, root, N, *names = sys.argv[1:]
cpu = "cpu" in names; names = [n for n in names if n != "cpu"]
D = open_device("cpu" if cpu else "cuda"); host = read_host(f"{root}/hosts/{N}.yaml"); record = {}
own = search_module.joins
for name in names:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"{root}/profiles/{N}/{file}.yaml"); built = build(m, dtype=d); given = built.inputs_on(D.torch_device(0))
    best = search(p, host, Options()).best.plan
    search_module.joins = lambda draft: (); apart = search(p, host, Options()).best.plan; search_module.joins = own
    plans = {"best": best, "each lane": apart}
    if best.joined: plans["best, not joined"] = replace(best, joined=False)
    elif not apart.joined and apart.head > 1: plans["each lane, joined"] = replace(apart, joined=True)
    colds = {k: prepare(copy.deepcopy(built.module), q, built.inputs, network=p.network, host=host, device=D) for k, q in plans.items()}
    try:
        with steady(D), torch.no_grad():
            first = colds["best"]; ref = kept(first.resident(*given)); wake(first, given)
            print(f"{m:14} {d} waits {p.own_waits_ns[0]/1e3:.2f} {p.own_waits_ns[1]/1e3:.2f} us", flush=True)
            rows = {k: [] for k in colds}
            def timed(c):
                c.evict(); D.synchronize(); a = time.perf_counter_ns()
                y = c(*given); i = time.perf_counter_ns(); D.wait_for_caller(0); t = time.perf_counter_ns(); D.synchronize()
                return t - a, i - a, likeness(y, ref).bit_equal
            for r in range(3 if cpu else 17):
                for k, c in colds.items():
                    got = once_at_full_pace(partial(timed, c), D)
                    if r > 1: rows[k].append(got)
            for k, v in rows.items():
                prog = lower(plans[k], p.network, host); t = simulate(prog, p)
                waits = sum(isinstance(o, Wait) and o.stream == "compute:0" for o in prog.ops)
                record[f"{m} {d} {k}"] = v
                print(f"  {k:18} joined {plans[k].joined!s:5} {len(plans[k].chunks):3} chunks head {plans[k].head} opening {plans[k].opening} {waits:2} waits: predicted {t.makespan_ns/1e3:8.1f} us, {med(x[0] for x in v)/1e3:8.1f} ({min(x[0] for x in v)/1e3:.1f}); issued {t.issued_ns/1e3:.0f}, {med(x[1] for x in v)/1e3:.0f}, right {all(x[2] for x in v)}", flush=True)
    finally:
        for c in colds.values(): c.close()
json.dump(record, open(out, "w"))
