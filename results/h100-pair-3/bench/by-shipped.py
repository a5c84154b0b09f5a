"""Best plans of these benches as predicted when they ran, and by the shipped h100-pair, which another machine gave.
From the checkout's root: calibrate fit on a copy of results/h100-pair-3/calibration writes hosts/ and profiles/ there; then
python results/h100-pair-3/bench/by-shipped.py THAT_COPY"""

import sys
from pathlib import Path
from statistics import median

from hwexec.bench_record import BENCH
from sim.catalog import Request, find_host, find_profile
from sim.files import read_host, read_profile, read_record
from sim.program import lower
from sim.search import Options, search
from sim.simulate import simulate

copy = Path(sys.argv[1])
own, shipped = read_host(copy / "hosts/h100-pair.yaml"), find_host("h100-pair")
errors: dict[tuple[str, int], list[float]] = {}
for path in sorted(Path(__file__).parent.glob("*.yaml")):
    report = read_record(path, BENCH)
    (mine,) = copy.glob(f"profiles/h100-pair/{report.model.replace(':', '-')}.{report.dtype}.*")
    profile, theirs = read_profile(mine), find_profile(shipped, Request(report.model, None, report.dtype, None))
    for row in report.rows:
        if row.name != "best":
            continue
        best = search(profile, own, Options(partners=() if row.links == 1 else None)).best
        assert abs(best.makespan_ns / row.predicted_ns - 1) < 1e-6, "the plan that ran"
        measured = median(row.samples_ns)
        by_shipped = simulate(lower(best.plan, theirs.network, shipped), theirs, detail=False)
        found = {"as it ran": row.predicted_ns / measured - 1, "shipped": by_shipped.makespan_ns / measured - 1}
        for who, off in found.items():
            errors.setdefault((who, row.links), []).append(off)
        said = ", ".join(f"{who} {off:+.1%}" for who, off in found.items())
        issued = f"issued in {row.issued_ns / 1e3:.0f} us, predicted {row.predicted_issued_ns / 1e3:.0f}, shipped {by_shipped.issued_ns / 1e3:.0f}"
        print(f"{path.stem.removeprefix('bench-'):22} {row.links} link(s): measured {measured / 1e6:6.3f} ms; {said}; {issued}")
for (who, links), found in errors.items():
    off = sorted(map(abs, found))
    print(f"{who}, {links} link(s): median {median(off):.2%}, worst {off[-1]:.1%}, signed {median(found):+.1%} of {len(found)}")
