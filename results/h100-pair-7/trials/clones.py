"""Swin-V2's starts and warm runs with the copies of its layers (a bias is cloned ahead of each attention) left to the copy engine, and done
by kernels, all in turn; and RegNet's plan that search picked beside one that reads less in place."""
import copy, json, statistics, sys, time
from pathlib import Path
import torch
import hwexec.cuda_graph as G
import hwexec.nodes as nodes
import sim.files as F
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from hwexec.sweep import SWEEP
from sim.models import build
from sim.program import lower
from sim.simulate import simulate
out, root, N, sweep = sys.argv[1:5]; cpu = "cpu" in sys.argv
med = statistics.median; D = open_device("cpu" if cpu else "cuda"); record = {}
host = F.read_host(f"{root}/hosts/{N}.yaml"); points = F.read_record(Path(sweep), SWEEP).points
own = G.to_kernels
def series(what, colds, given, rounds, warm=True):
    took = {}; ok = []
    with steady(D), torch.no_grad():
        first = next(iter(colds.values())); ref = kept(first.resident(*given)); wake(first, given)
        for r in range(rounds + 1):
            for k, c in colds.items():
                def cold(c=c):
                    c.evict(); D.synchronize(); a = time.perf_counter_ns(); y = c(*given); D.wait_for_caller(0); t = time.perf_counter_ns() - a
                    D.synchronize(); ok.append(likeness(y, ref).bit_equal); return t
                def res(c=c):
                    c.resident(*given); D.synchronize(); a = time.perf_counter_ns(); y = c.resident(*given); D.wait_for_caller(0); return time.perf_counter_ns() - a
                x = once_at_full_pace(cold, D)
                if r: took.setdefault(k, []).append(x)
                if warm:
                    x = once_at_full_pace(res, D)
                    if r: took.setdefault(k + " warm", []).append(x)
    for k, v in took.items(): print(f"{what:10} {k:34} {med(v)/1e3:8.1f} us ({min(v)/1e3:.1f} to {max(v)/1e3:.1f})", flush=True)
    for k, c in colds.items():
        s = c.copies_alone(); print(f"{what:10} {k:34} copies alone {med(s.raw)/1e3:.0f} us, {c.plan.copied_bytes/med(s.raw):.1f} GB/s", flush=True)
    print(what, "right", all(ok), flush=True); record[what] = took
def plan_of(net, m, strategy, number, links):
    return next(x for x in points if (x.model, x.strategy, x.number, x.links) == (m, strategy, number, links)).plan.plan(net)
m = "swin_v2_s"; p = F.read_profile(f"{root}/profiles/{N}/{m}.fp32.b1.yaml"); built = build(m); given = built.inputs_on(D.torch_device(0)); colds = {}
for which in (("best", 0, 1), ("best", 0, 2), ("random", 6, 2), ("random", 8, 1)):
    for way in ("engine", "kernels"):
        G.to_kernels = own if way == "kernels" else (lambda graph, gpu, arenas=None: own(graph, gpu, None))
        colds[f"{which[0]} {which[1]} of {which[2]}, {way}"] = prepare(copy.deepcopy(built.module), plan_of(p.network, m, *which), built.inputs, network=p.network, host=host, device=D)
G.to_kernels = own
series(m, colds, given, 2 if cpu else 10)
for c in colds.values(): c.close()
m = "regnet_y_16gf"; p = F.read_profile(f"{root}/profiles/{N}/{m}.fp32.b1.yaml"); built = build(m); given = built.inputs_on(D.torch_device(0)); colds = {}
for which in (("best", 0, 1), ("random", 18, 1)):
    for again in (1, 2):
        c = colds[f"{which[0]} {which[1]} of {which[2]}, prepared {again}"] = prepare(copy.deepcopy(built.module), plan_of(p.network, m, *which), built.inputs, network=p.network, host=host, device=D)
        print(which, "predicted", simulate(c.program, p).makespan_ns / 1e3)
series(m, colds, given, 2 if cpu else 12, warm=False)
for c in colds.values(): c.close()
if not cpu:
    kinds = {}
    def counting(graph, gpu, arenas=None):
        drv = nodes.load_driver(); seen = [nodes._kind(drv, n) for n in nodes._nodes(drv, graph)]
        made = own(graph, gpu, arenas); kinds.setdefault(m, []).append((len(seen), seen.count(2), seen.count(1), made)); return made
    G.to_kernels = counting
    for m, d in (("resnet50", "fp32"), ("vit_b_16", "fp32"), ("vit_b_16", "bf16"), ("convnext_base", "bf16"), ("hf:bert-base", "fp32"), ("hf:gpt2", "bf16"), ("swin_v2_s", "fp32"), ("hf:llama-1b:hidden=512,layers=4,heads=8,kv_heads=4", "bf16")):
        from sim.trace import trace
        pass
        from calibrate.ways import everything
        from sim.plan import Access
        b = build(m, dtype=d); net = trace(b).network
        with prepare(b.module, everything(net, Access.DIRECT), b.inputs, network=net, host=host, device=D): pass
        print(m, d, "nodes, memsets, copies, made kernels, of cold, warm or resident graph:", kinds[m], flush=True)
json.dump(record, open(out, "w"))
