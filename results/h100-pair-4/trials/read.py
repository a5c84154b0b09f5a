"""What layers.json says, in a table: whole runs without the profiler, then kernels, memsets and what lies between, with it."""
import json, statistics, sys
import numpy as np
med = statistics.median
for n, d in json.load(open(sys.argv[1])).items():
    print(f"{n}: {d['chunks']} chunks, opening of {d['opening']}, answer {'right' if d['right'] else 'WRONG'}")
    alone = med(d["gated alone"])
    print("  whole, us:", ", ".join(f"{k} {med(d[k]) / 1e3:.0f}" for k in ("loop", "warm", "landed", "cold")), "| on the GPU alone", f"{alone / 1e3:.0f};",
          ", ".join(f"beside {w} {med(d[k]) / alone - 1:+.1%}" for k, w in (("gated o", "own copies"), ("gated p", "relays"), ("gated op", "both"))))
    memsets = [i for i, x in enumerate(d["names"]) if x.startswith("Memset")]
    for w in d["durations"]:
        took, gaps = np.array(d["durations"][w]), np.array(d["gaps"][w])
        is_memset = np.zeros(len(took), bool); is_memset[memsets] = True
        before, behind = [i - 1 for i in memsets if i], [i for i in memsets if i < len(gaps)]
        rest = [i for i in range(len(gaps)) if i not in before and i not in behind]
        each = f", each {np.median(took[memsets] + gaps[[i - 1 for i in memsets]] + gaps[memsets]) / 1e3:.1f} with what is around it" if memsets else ""
        print(f"  {w:12s} kernels {took[~is_memset].sum() / 1e3:7.1f}, between them {gaps[rest].sum() / 1e3:6.1f}; {len(memsets)} memsets {took[is_memset].sum() / 1e3:5.1f}, around them {(gaps[before].sum() + gaps[behind].sum()) / 1e3:6.1f}{each}")
