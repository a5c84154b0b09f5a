"""Best plans of these benches as predicted when they ran, and by the shipped host and profiles, which are the same figures, and the model
as it is now. From the checkout's root: python results/h100-pair-4/bench/again.py"""

from pathlib import Path
from statistics import median

from hwexec.bench_record import BENCH
from sim.catalog import Request, find_host, find_profile
from sim.files import read_record
from sim.program import lower
from sim.simulate import simulate

host = find_host("h100-pair")
errors: dict[tuple[str, int], list[float]] = {}
for path in sorted(Path(__file__).parent.glob("*.yaml")):
    report = read_record(path, BENCH)
    profile = find_profile(host, Request(report.model, None, report.dtype, None))
    for row in report.rows:
        if row.name != "best":
            continue
        plan = row.plan.plan(profile.network)
        measured = median(row.samples_ns)
        now = simulate(lower(plan, profile.network, host), profile, detail=False).makespan_ns
        found = {"as it ran": row.predicted_ns / measured - 1, "now": now / measured - 1}
        for when, off in found.items():
            errors.setdefault((when, row.links), []).append(off)
        said = ", ".join(f"{when} {off:+.2%}" for when, off in found.items())
        chunks = f"{len(plan.chunks)} chunks, {plan.head} ahead, opening of {plan.opening}"
        print(f"{path.stem.removeprefix('bench-'):22} {row.links} link(s): measured {measured / 1e6:6.3f} ms; {said}; {chunks}")
for (when, links), found in errors.items():
    off = sorted(map(abs, found))
    print(f"{when}, {links} link(s): median {median(off):.2%}, worst {off[-1]:.1%}, signed {median(found):+.2%} of {len(found)}")
