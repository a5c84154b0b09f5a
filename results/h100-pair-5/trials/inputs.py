"""Cold starts given inputs on the GPU, in pageable memory and in pinned memory."""
import json, statistics, sys, time
import torch
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search
med = statistics.median; D = open_device("cuda"); record = {}
host = read_host("scenarios/hosts/h100-pair.yaml")
for name in sys.argv[2:]:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"scenarios/profiles/h100-pair/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(torch.device("cuda", 0))
    for links in (1, 2):
        plan = search(p, host, Options(partners=() if links == 1 else None)).best.plan
        with prepare(built.module, plan, built.inputs, network=p.network, host=host, device=D) as cold, steady(D):
            ref = kept(cold.resident(*given)); wake(cold, given)
            ways = {"gpu": given, "pageable": built.inputs, "pinned": tuple(t.pin_memory() for t in built.inputs)}
            took, ok = {}, []
            for r in range(12):
                for w, inp in ways.items():
                    def start():
                        cold.evict(); D.synchronize(); a = time.perf_counter_ns(); y = cold(*inp); D.synchronize(); t = time.perf_counter_ns() - a
                        ok.append(likeness(y, ref).bit_equal); return t
                    t = once_at_full_pace(start, D)
                    if r: took.setdefault(w, []).append(t)
            record[f"{m} {d} {links}"] = took
            print(f"{m} {d} {links} links, inputs {sum(t.numel() * t.element_size() for t in given)} bytes:", {w: f"{med(v)/1e3:.0f} us" for w, v in took.items()}, all(ok), flush=True)
json.dump(record, open(sys.argv[1], "w"))
