"""Graphs whose memsets stay memsets, and whose memsets are kernels: warm runs and cold starts in turn, in one process."""
import json, statistics, sys, time
import torch
import hwexec.cuda_graph as cuda_graph
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import prepare, open_device
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search

D = open_device("cuda"); med = statistics.median
host = read_host("scenarios/hosts/h100-pair.yaml")
real, counted = cuda_graph.memsets_to_kernels, []
record = {}
for name in sys.argv[2:]:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"scenarios/profiles/h100-pair/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(torch.device("cuda", 0)); rec = record[f"{m} {d}"] = {}
    for links in (1, 2):
        plan = search(p, host, Options(partners=() if links == 1 else None)).best.plan
        other = build(m, dtype=d); other.module.load_state_dict(built.module.state_dict())
        cuda_graph.memsets_to_kernels = lambda graph, gpu: 0
        old = prepare(built.module, plan, built.inputs, network=p.network, host=host, device=D)
        cuda_graph.memsets_to_kernels = lambda graph, gpu: counted.append(real(graph, gpu))
        counted.clear()
        new = prepare(other.module, plan, other.inputs, network=p.network, host=host, device=D)
        rec["memsets"] = list(counted)
        with steady(D):
            ref = kept(old.resident(*given)); wake(old, given); kept(new.resident(*given)); ok = []
            def cold(c):
                c.evict(); D.synchronize(); a = time.perf_counter_ns(); y = c(*given); D.synchronize(); t = time.perf_counter_ns() - a
                ok.append(likeness(y, ref).bit_equal); return t
            def warm(c):
                D.synchronize(); a = time.perf_counter_ns(); y = c.resident(*given); D.synchronize(); t = time.perf_counter_ns() - a
                ok.append(likeness(y, ref).bit_equal); return t
            for k in range(11):
                for kind, f in (("cold", cold), ("warm", warm)):
                    for which, c in (("memsets", old), ("kernels", new)):
                        t = once_at_full_pace(lambda: f(c), D)
                        if k: rec.setdefault(f"{kind} {links} {which}", []).append(t)
            rec["right"] = all(ok)
        old.close(); new.close()
    print(f"{m} {d}", "right" if rec["right"] else "WRONG", "replaced", rec["memsets"], {k: round(med(v) / 1e3) for k, v in rec.items() if k[:4] in ("cold", "warm")}, flush=True)
json.dump(record, open(sys.argv[1], "w"))
