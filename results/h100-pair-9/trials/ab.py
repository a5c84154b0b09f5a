"""Whole starts and issue by the code on PYTHONPATH: python ab.py LABEL OUT PARTNERS MODEL/DTYPE/FILE..."""
import json, os, statistics, sys, time
from functools import partial
import torch, hwexec
from hwexec.core import once_at_full_pace, steady
from hwexec.devices import open_device
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search
label, out, partners, *wanted = sys.argv[1:]
device, host, med = open_device("cuda"), read_host("scenarios/hosts/h100-pair.yaml"), statistics.median
over = () if partners == "-" else tuple(map(int, partners.split(",")))
rec = {}
for w in wanted:
    m, d, f = w.split("/")
    b = build(m, dtype=d); p = read_profile(f"scenarios/profiles/h100-pair/{f}.yaml")
    plan = search(p, host, Options(0, over)).best.plan
    x = b.inputs_on(torch.device("cuda", 0))
    with hwexec.prepare(b.module, plan, b.inputs, network=p.network, host=host, device=device) as cold, steady(device), torch.no_grad():
        ref = kept(cold.resident(*x)); wake(cold, x)
        def one():
            cold.evict(); device.synchronize()
            a = time.perf_counter_ns(); y = cold(*x); i = time.perf_counter_ns(); device.wait_for_caller(0); t = time.perf_counter_ns(); device.synchronize()
            return t - a, i - a, likeness(y, ref).bit_equal
        got = [once_at_full_pace(one, device) for _ in range(63)][2:]
    rec[w] = got
    print(f"{label} {len(over)+1} link(s) {m} {d}: {med(g[0] for g in got)/1e3:.1f} us (least {min(g[0] for g in got)/1e3:.1f}), issued {med(g[1] for g in got)/1e3:.1f}, right {all(g[2] for g in got)}", flush=True)
json.dump(rec, open(out, "w"))
