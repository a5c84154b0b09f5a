"""Warm runs one after the other, behind an eviction, behind others' memory, behind a pause, and in turn with starts: python warm.py OUT MODEL/DTYPE/FILE..."""
import json, statistics, sys, time
import torch, hwexec
from hwexec.core import once_at_full_pace, steady
from hwexec.devices import open_device
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search
out, *wanted = sys.argv[1:]
name = "h200-pair" if "H200" in torch.cuda.get_device_name(0) else "h100-pair"
device, host, med = open_device("cuda"), read_host(f"scenarios/hosts/{name}.yaml"), statistics.median
scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda:0")
rec = {}
for w in wanted:
    m, d, f = w.split("/")
    b = build(m, dtype=d); p = read_profile(f"scenarios/profiles/{name}/{f}.yaml")
    plan = search(p, host, Options(0, ())).best.plan
    x = b.inputs_on(torch.device("cuda", 0))
    got = {}
    with hwexec.prepare(b.module, plan, b.inputs, network=p.network, host=host, device=device) as cold, steady(device), torch.no_grad():
        ref = kept(cold.resident(*x)); wake(cold, x)
        def timed(call):
            a = time.perf_counter_ns(); y = call(*x); device.wait_for_caller(0); t = time.perf_counter_ns(); device.synchronize()
            assert likeness(y, ref).bit_equal
            return t - a
        def warm(before):
            def one():
                before(); device.synchronize(); return timed(cold.resident)
            return one
        def filled(): cold.evict(); cold.resident(*x)
        def brought():
            cold.evict(); cold(*x); device.synchronize(); cold.settle()
        def start():
            cold.evict(); device.synchronize(); return timed(cold)
        ways = {"one after another": warm(lambda: None), "behind others' memory": warm(lambda: scratch.fill_(1)),
                "2 ms later": warm(lambda: time.sleep(0.002)), "behind a resident run that filled": warm(filled), "behind a start, settled": warm(brought)}
        for turn in range(2):
            for way, one in ways.items():
                got.setdefault(way, []).append([once_at_full_pace(one, device) for _ in range(16)][1:])
            both = [(once_at_full_pace(start, device), once_at_full_pace(ways["behind a start, settled"], device), once_at_full_pace(ways["one after another"], device)) for _ in range(16)][1:]
            for k, label in enumerate(("start, in turn", "warm behind a start, in turn", "warm once more, in turn")):
                got.setdefault(label, []).append([r[k] for r in both])
    rec[w] = got
    print(f"{m} {d}", flush=True)
    for way, runs in got.items():
        print(f"   {way:36}" + "  ".join(f"{med(r)/1e3:8.1f} ({min(r)/1e3:.1f} to {max(r)/1e3:.1f})" for r in runs), flush=True)
json.dump(rec, open(out, "w"))
