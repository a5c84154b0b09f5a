"""Cases `start` and `head` again and again: how they scatter at the core's full pace."""
import statistics, sys
from types import SimpleNamespace
from calibrate.bench import Bench, QUICK
from calibrate.launches import start, head, launch
from hwexec import core
from hwexec.preparing import open_device
D = open_device("cuda"); med = statistics.median
b = Bench(D, SimpleNamespace(gpus=2), QUICK)
with core.steady(D):
    for k in range(2):
        for f in (start, head, launch):
            before = core.tally()
            for p in f(b):
                print(f"{f.__name__} {k} {p.label:20s} c{p.count} e{p.edges} k{p.copies} w{p.waits} med {p.median_ns/1e3:.1f} sp {p.spread:.0%}", [round(x / 1e3) for x in p.samples_ns] if f is not launch else "", flush=True)
            now = core.tally(); print("   apart", now[0] - before[0], "never", now[1] - before[1])
