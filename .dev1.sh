set -u
export PYTHONPATH=$PWD REGRAFT_CACHE=/tmp/rg OMP_NUM_THREADS=1
python3 - <<'P' 2>&1 | tail -5
import time; t=time.time()
import torch; print(torch.__version__, torch.cuda.get_device_name())
import regraft.runtime.coexec.build as b
print(b._built(), time.time()-t)
P
cp /tmp/rg/coexec/*.so $OUT/
cat > /tmp/eq.py <<'P'
import sys, torch, time, regraft, warnings, logging, faulthandler
faulthandler.dump_traceback_later(50, exit=True)
logging.basicConfig(); logging.getLogger("regraft").setLevel(logging.DEBUG)
sys.path.insert(0,".")
from regraft.benchmarks.programs import PROGRAMS
from tests.runtime.coexec.conftest import state, equal
torch.backends.cudnn.deterministic=True
name, backend = sys.argv[1:3]
def outcome(p, step, n):
    torch.manual_seed(1)
    seen=[step() for _ in range(n)]
    return seen, [x.cpu() for x in state(p.kept)], torch.cuda.get_rng_state()
a,b=PROGRAMS[name]("cuda"),PROGRAMS[name]("cuda")
s=regraft.coexecute(b.step, backend=backend, measure=False)
n=16
x,y=outcome(a,a.step,n),outcome(b,s,n)
eq=equal(x,y)
worst=max(((u.double()-v.double()).abs().max().item() for u,v in zip(x[1],y[1])), default=0)
r=s.report()
t=[]
for f in (a.step,s):
    torch.cuda.synchronize(); t0=time.perf_counter()
    for _ in range(30): f()
    torch.cuda.synchronize(); t.append((time.perf_counter()-t0)/30*1e3)
print(f"{name:16s} {backend:9s} equal={eq} rng={torch.equal(x[2],y[2])} worst={worst:.2e} ms {t[0]:.2f} {t[1]:.2f} symbolic={r.symbolic:.2f} segs={[(g[0],g[1],g[3][:60]) for g in r.segments if g[1] or 'compiled'!=g[3] and g[3]!='watched'][:4]} {x[0][-1]} {y[0][-1]}"[:420])
P
names=("DropBlock" "BERT-CLS" "FasterRCNN" "GPT-2" "DCGAN" "YOLOv3" "ResNet" "Adam + schedule")
i=0; for b in aten inductor; do
for n in "${names[@]}"; do (timeout 70 python3 /tmp/eq.py "$n" $b > /tmp/o_$i.txt 2>&1 || echo "RC $?" >> /tmp/o_$i.txt) & i=$((i+1)); done; done; wait
for j in $(seq 0 15); do tail -n 1 /tmp/o_$j.txt | cut -c1-420; if grep -q "^RC\|not compiled" /tmp/o_$j.txt; then grep -v "^    " /tmp/o_$j.txt | grep -A3 "Error\|File \"/work\|File \".*coexec" | tail -n 8 | cut -c1-240; fi; done
