"""Starts of modules in a pool beside starts of the same plans prepared without one, in turn; and what each prepared module takes of
the GPU besides its weights.

    python pool.py OUT.json ROOT HOST PARTNERS MODEL:DTYPE:PROFILE ...     PARTNERS: GPUs to relay over, as 1 or 1,2; - for none

alone   prepared without a pool, evicted first
after   likewise, right after a start of another such module that was waited for
taken   in a pool, after another module has taken its place and was waited for
behind  in a pool, right after a start of another module that is still under way: from the first call until the second answer,
        beside the sum of both alone
warm    no one has taken the place: with a pool, and without
"""
import copy, json, statistics, sys, time
from functools import partial
import torch
import hwexec
from hwexec.core import once_at_full_pace, steady
from hwexec.devices import open_device
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search

out, root, name, partners, *wanted = sys.argv[1:]
cpu = "cpu" in wanted
wanted = [w for w in wanted if w != "cpu"]
ROUNDS = 3 if cpu else 21
device = open_device("cpu" if cpu else "cuda")
host = read_host(f"{root}/hosts/{name}.yaml")
over = () if partners == "-" else tuple(map(int, partners.split(",")))
med = statistics.median


def used():
    return 0 if cpu else [a - b for b, a in (torch.cuda.mem_get_info(g) for g in range(device.gpu_count))][0]


nets = []
for w in wanted:
    model, dtype, file = w.split("/")
    built = build(model, dtype=dtype)
    profile = read_profile(f"{root}/profiles/{name}/{file}.yaml")
    nets.append((f"{model} {dtype}", built, profile, search(profile, host, Options(0, over)).best.plan))
needs = [hwexec.arena_bytes(p.network, plan) for _, _, p, plan in nets]
gpus = sorted({g for need in needs for g in need})
largest = max(range(len(nets)), key=lambda at: sum(needs[at].values()))  # fills the pool: it overlaps with all others
others = [largest if at != largest else (at + 1) % len(nets) for at in range(len(nets))]
pool = hwexec.Pool({g: max(need.get(g, 0) for need in needs) or 1 for g in gpus}, device)
record = {"needs": needs, "rows": {}, "memory": {}}
alone, pooled, given, refs = [], [], [], []
for label, built, p, plan in nets:
    at = used()
    pooled.append(hwexec.prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=device, pool=pool))
    took = used() - at
    record["memory"][label] = took
    print(f"{label}: prepared in the pool, {took / 2**20:.0f} MiB more of GPU 0 in use", flush=True)
    alone.append(hwexec.prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=device))
    given.append(built.inputs_on(device.torch_device(0)))


def timed(call, ref):
    a = time.perf_counter_ns()
    y = call()
    i = time.perf_counter_ns()
    device.wait_for_caller(0)
    t = time.perf_counter_ns()
    device.synchronize()
    return t - a, i - a, likeness(y, ref).bit_equal


def evicted(at):
    alone[at].evict()
    device.synchronize()
    return timed(partial(alone[at], *given[at]), refs[at])


def after(at):
    alone[at].evict()
    alone[others[at]](*given[others[at]])
    device.synchronize()
    return timed(partial(alone[at], *given[at]), refs[at])


def taken(at):
    pooled[others[at]](*given[others[at]])
    device.synchronize()
    assert not pooled[at].hot
    return timed(partial(pooled[at].serve, *given[at]), refs[at])


def behind(at):
    other = others[at]
    pooled[at](*given[at])
    device.synchronize()

    def both():
        pooled[other](*given[other])
        return pooled[at](*given[at])

    return timed(both, refs[at])


def warm(colds, at):
    colds[at](*given[at])
    device.synchronize()
    return timed(partial(colds[at].warm, *given[at]), refs[at])


with steady(device), torch.no_grad():
    for at in range(len(nets)):
        refs.append(kept(alone[at].resident(*given[at])))
        wake(alone[at], given[at])
    ways = {"alone": evicted, "after": after, "taken": taken, "behind": behind, "warm": partial(warm, alone), "warm, pool": partial(warm, pooled)}
    rows = {(at, way): [] for at in range(len(nets)) for way in ways}
    for turn in range(ROUNDS + 2):
        for at in range(len(nets)):
            for way, call in ways.items():
                got = once_at_full_pace(partial(call, at), device)
                if turn > 1:
                    rows[at, way].append(got)
print(f"{len(gpus)} GPU(s), medians of {ROUNDS}, us: whole (issued); behind: beside the sum of both alone")
for at, (label, *_) in enumerate(nets):
    cells = []
    for way in ways:
        took = rows[at, way]
        record["rows"][f"{label}, {way}"] = took
        cells.append(f"{way} {med(x[0] for x in took) / 1e3:.1f} ({med(x[1] for x in took) / 1e3:.1f}){'' if all(x[2] for x in took) else ' WRONG'}")
    both = med(x[0] for x in rows[at, "alone"]) + med(x[0] for x in rows[others[at], "alone"])
    print(f"{label:18} {'; '.join(cells)}; both alone {both / 1e3:.1f}", flush=True)
pool.close()
for cold in alone:
    cold.close()
json.dump(record, open(out, "w"))
