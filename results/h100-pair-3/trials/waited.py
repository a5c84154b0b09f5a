"""How much longer than predicted the host took to issue the graph plans of a sweep, by what they are made of and how long they take.
From the checkout's root: calibrate fit on a copy of results/h100-pair-3/calibration writes hosts/ and profiles/ there; then
python results/h100-pair-3/trials/waited.py THAT_COPY results/h100-pair-3/sweep/sweep.yaml"""
import sys
import numpy as np, math
from collections import Counter
from hwexec.sweep import SWEEP
from sim.files import read_record, read_host, read_profile
from sim.program import lower
from sim.simulate import simulate
from sim.ops import Copy,Record,Wait,Run
C=sys.argv[1]; host=read_host(f'{C}/hosts/h100-pair.yaml')
P={m:read_profile(f'{C}/profiles/h100-pair/{f}') for m,f in (('wide_resnet101_2','wide_resnet101_2.fp32.b1.yaml'),('hf:roberta-base','hf-roberta-base.bf16.b1.s384.yaml'))}
r=read_record(sys.argv[2],SWEEP)
rows=[]
for p in r.points:
    if p.launch.value!='graph': continue
    prof=P[p.model]; plan=p.plan.plan(prof.network); prog=lower(plan,prof.network,host)
    t=simulate(prog,prof,detail=False)
    c=Counter(type(o).__name__ for o in prog.ops[:prog.head_ops]); g=Counter(type(o).__name__ for o in prog.ops[prog.head_ops:])
    rel=sum(len(x.path)>1 for x in plan.chunks)
    rows.append((p.issued_ns/1e3,t.issued_ns/1e3,p.measured_ns/1e6,c['Copy'],c['Record']+c['Wait'],g['Copy'],g['Wait'],rel,plan.opening>0,(p.measured_ns-t.makespan_ns)/1e3,p.links,p.model[:6],t.makespan_ns/1e6))
for x in sorted(rows,key=lambda x:x[0]-x[1]): print(f"iss {x[0]:6.0f} pred {x[1]:6.0f} exc {x[0]-x[1]:6.0f} | t {x[2]:6.2f} late {x[9]:7.0f} us {x[9]/x[2]/10:5.1f}% | head c{x[3]} e{x[4]} graph c{x[5]} w{x[6]} rel {x[7]} open {x[8]} L{x[10]} {x[11]}")
A=np.array([[1,math.log(x[2]),x[3]+x[5],x[4]+x[6],x[8]] for x in rows],float); y=np.array([x[0]-x[1] for x in rows])
k, *_ = np.linalg.lstsq(A, y, rcond=None)
print(f"{len(y)} plans: excess, us = {k[0]:.0f} + {k[1]:.0f} ln(ms that a start takes) + {k[2]:.1f} a copy + {k[3]:.1f} an event + {k[4]:.0f} with an opening; rest {np.std(y - A @ k):.0f}")
