"""h100-quad with what three lanes carried in benches, predicted again."""
import glob, statistics
from dataclasses import replace
from itertools import combinations
from sim.files import read_host, read_profile, read_record
from sim.host import Link
from sim.program import lower
from sim.simulate import simulate
from sim.search import Options, search
from hwexec.bench_record import BENCH
C = "calibration"
h=read_host(f'{C}/hosts/h100-quad.yaml')

def triples(rate):
    f=next(l for l in h.links if l.name=='host memory').bytes_per_s
    names={m:'host memory '+'+'.join(map(str,m)) for m in combinations(range(4),3)}
    links=tuple(h.links)+tuple(Link(n,replace(f,value=rate,low=None,high=None)) for n in names.values())
    gpus=tuple(replace(g,h2d=(g.h2d[0],*(n for m,n in names.items() if g.index in m),*g.h2d[1:])) for g in h.gpus)
    return replace(h,links=links,gpus=gpus)
import sys
h3=triples(float(sys.argv[1])*1e9)
for f in sorted(glob.glob('bench/bench-*.yaml')):
    r=read_record(f,BENCH)
    stem={'resnet50':'resnet50','vit_b_16':'vit_b_16'}.get(r.model,r.model.replace(':','-'))
    pf=glob.glob(f'{C}/profiles/h100-quad/{stem}.{r.dtype}.b1*.yaml')[0]
    p=read_profile(pf); p3=replace(p,host_digest=h3.digest)
    for row in r.rows:
        if row.plan is None or row.launch!='graph': continue
        plan=row.plan.plan(p.network)
        a=simulate(lower(plan,p.network,h),p,detail=False).makespan_ns; b=simulate(lower(plan,p.network,h3),p3,detail=False).makespan_ns
        m=statistics.median(row.samples_ns)
        print(f"{r.model:14} {r.dtype} {row.label:12} lanes {row.lanes} measured {m/1e6:7.3f}  by one figure {a/1e6:7.3f} ({a/m-1:+.1%})  by triples {b/1e6:7.3f} ({b/m-1:+.1%})")
    for n in (3,4):
        o=search(p3,h3,Options(0,tuple(range(1,n)))); print('    now best over',n,round(o.best.makespan_ns/1e6,3),o.best.plan.gpus)
