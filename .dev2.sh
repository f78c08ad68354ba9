set -u
export PYTHONPATH=$PWD REGRAFT_CACHE=/tmp/rg OMP_NUM_THREADS=1 MAX_JOBS=2 TORCHINDUCTOR_COMPILE_THREADS=1
sed -i 's/SETTLING = 30, 60, 240.0/SETTLING = 30, 60, 60.0/' benchmarks/coexec.py
(timeout 90 python3 -m pytest -q -x -p no:cacheprovider tests/runtime/test_cuda_graph.py 2>&1 | tail -4 | cut -c1-300 > /tmp/fused.txt) &
python3 -c "
import regraft.runtime.coexec.build as b
b._built()" 2>&1 | tail -2
mkdir -p /tmp/f /tmp/o
cat > /tmp/eq.py <<'P'
import sys, torch, time, regraft
sys.path.insert(0,".")
from regraft.benchmarks.programs import PROGRAMS
from tests.runtime.coexec.conftest import state
torch.backends.cudnn.allow_tf32=False
name = sys.argv[1]
def outcome(p, step, n):
    torch.manual_seed(1)
    seen=[step() for _ in range(n)]
    return seen, [x.cpu() for x in state(p.kept)], torch.cuda.get_rng_state()
a,b=PROGRAMS[name]("cuda"),PROGRAMS[name]("cuda")
s=regraft.coexecute(b.step, backend="inductor", measure=False)
x,y=outcome(a,a.step,20),outcome(b,s,20)
worst=max(((u.double()-v.double()).abs().max().item() for u,v in zip(x[1],y[1])), default=0)
r=s.report()
print(f"{name:16s} rng={torch.equal(x[2],y[2])} worst={worst:.2e} symbolic={r.symbolic:.2f} segs={[(g[0],g[1],g[3][:50]) for g in r.segments if g[3]!='watched'][:5]} {x[0][-1]} {y[0][-1]} {list(r.fallbacks.items())[:2]}"[:400])
P
P=("BERT-CLS" "DropBlock" "MusicTransformer" "SDPoint" "FasterRCNN" "BERT-Q&A" "GPT-2" "DCGAN" "YOLOv3" "ResNet" "Adam + schedule" "HF decode" "REINFORCE" "TreeLSTM")
one() { # program rival
 k=$(echo "$1 $2" | tr -dc 'A-Za-z0-9'); c="/tmp/f/$k"; export TORCHINDUCTOR_CACHE_DIR=$c TRITON_CACHE_DIR=$c
 if [ "$2" = eq ]; then timeout 100 python3 /tmp/eq.py "$1" 2>&1 | tail -1 | cut -c1-400 > "/tmp/o/$k.eq"; else
 timeout 150 python3 -m regraft.benchmarks.coexec "$1" "$2" cuda /tmp/f > "/tmp/o/$k.json" 2> "/tmp/o/$k.err" || echo "$1 | $2 | $(tail -n 1 /tmp/o/$k.err | cut -c1-160)" > "/tmp/o/$k.fail"; fi; }
export -f one
(for r in regraft "compile module" "compile module, reduce-overhead"; do for n in "${P[@]}"; do printf '%s\0%s\0' "$n" "$r"; done; done; for n in BERT-CLS DropBlock ResNet DCGAN "Adam + schedule" ; do printf '%s\0%s\0' "$n" eq; done) | xargs -0 -n 2 -P 15 bash -c 'one "$0" "$1"' &
X=$!
for t in $(seq 1 44); do sleep 5; kill -0 $X 2>/dev/null || break; done
cat > /tmp/as.py <<'P'
import glob, json, os
from regraft.benchmarks.coexec import _checks, _row
from regraft.benchmarks.harness import Result, environment
from regraft.benchmarks.programs import PROGRAMS
rows=[]
for f in sorted(glob.glob("/tmp/o/*.json")):
    t=open(f).read().strip()
    if t: rows.append(json.loads(t.splitlines()[-1]))
for f in glob.glob("/tmp/o/*.fail"):
    n,r,why=open(f).read().strip().split(" | ",2); rows.append(_row(n, f"{r}: {why[:100]}"))
rows.sort(key=lambda r: (list(PROGRAMS).index(r["model"]), r["test"]))
Result("regraft bench coexec", environment(), rows, _checks(rows,"cuda"), chart="ratio").write(os.environ["OUT"]+"/coexec-cuda.json")
P
python3 /tmp/as.py 2>&1 | tail -3; cat $OUT/coexec-cuda.md | cut -c1-200; cat /tmp/o/*.eq /tmp/fused.txt; kill $X 2>/dev/null; true
