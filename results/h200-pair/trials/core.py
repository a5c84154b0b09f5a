"""How long a graph's launch takes the host, by core and by how long that core has been busy. Prints medians in microseconds.

Tidied after it ran; what it does is what ran.
"""

import os
import statistics
import time

from hwexec.bench import warm_plan
from hwexec.executor import open_device, prepare
from sim.catalog import Request, find_host, obtain_profile
from sim.models import build

os.system("lscpu | egrep 'Model name|Socket|NUMA|Thread|MHz|L3|L2'; head -1 /proc/stat; nvidia-smi topo -m | head -12")
device, host = open_device("cuda"), find_host("h200-pair")
network = obtain_profile(host, Request("vit_b_16", 1, "fp32", None)).network
built = build("vit_b_16")
inputs = tuple(i.to("cuda:0") for i in built.inputs)
cores = sorted(os.sched_getaffinity(0))
with prepare(built.module, warm_plan(network, 0), inputs, network=network, host=host, device=device) as cold:
    compute, graph = cold._stage.compute, cold._graphs["resident"].graph

    def launch(before=device.synchronize):
        before()
        with device.on(compute):
            began = time.perf_counter_ns()
            graph.replay()
            return time.perf_counter_ns() - began

    def launches(count, evict=False):
        found = []
        for _ in range(count):
            if evict:
                cold.evict()
            found.append(launch())
            device.synchronize()
        return round(statistics.median(found) / 1e3, 1)

    launches(50)
    print("unpinned, 20 groups of 20:", [launches(20) for _ in range(20)])
    print("unpinned, arenas filled before each:", [launches(8, True) for _ in range(12)])
    by_core = {}
    for core in cores:
        os.sched_setaffinity(0, {core})
        launches(3)
        by_core[core] = launches(15)
    print("by core, each just come to:", by_core)
    for core in (cores[0], cores[5], min(by_core, key=by_core.get), max(by_core, key=by_core.get)):
        os.sched_setaffinity(0, {core})
        launches(3)
        print("held to", core, [launches(20) for _ in range(15)], "filled", [launches(8, True) for _ in range(8)])
    os.sched_setaffinity(0, set(cores))
    for idle_s in (0, 0.001, 0.01):

        def sleep(idle_s=idle_s):
            device.synchronize()
            time.sleep(idle_s)

        print("after a sleep of", idle_s, "s:", round(statistics.median(launch(sleep) for _ in range(30)) / 1e3, 1))
