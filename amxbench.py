"""time fastattn of several ISAs and torch, bfloat16 forward and backward; processes one after the other"""
import os, subprocess, sys, time
if len(sys.argv) == 1:
    for threads in (1, 16):
        for isa in ("avx512", "amx", "torch"):
            env = dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_PROC_BIND="true", FASTATTN_CPU_ISA="amx" if isa == "torch" else isa)
            subprocess.run([sys.executable, __file__, isa, str(threads)], env=env)
    sys.exit()
import numpy as np, ml_dtypes
isa, threads = sys.argv[1], int(sys.argv[2])
import fastattn
from fastattn.attention import attention_forward, attention_backward
bf = ml_dtypes.bfloat16
for (B, H, L, D), causal in [((1,8,2048,64),0), ((1,8,2048,64),1), ((1,8,2048,128),0), ((1,8,2048,128),1), ((8,12,128,64),0), ((1,16,8192,128),0)]:
    if threads == 1 and L > 2048: continue
    rng = np.random.default_rng(0)
    q,k,v,do = (rng.standard_normal((B,H,L,D), dtype=np.float32).astype(bf) for _ in range(4))
    flop = 4*B*H*L*L*D/(2 if causal else 1)
    if isa == "torch":
        import torch; torch.set_num_threads(threads)
        t = [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).requires_grad_(True) for x in (q,k,v)]
        g = torch.from_numpy(do.view(np.int16)).view(torch.bfloat16)
        f = lambda: torch.nn.functional.scaled_dot_product_attention(*t, is_causal=bool(causal))
        o = f()
        b = lambda: torch.autograd.grad(o, t, g, retain_graph=True)
        with torch.no_grad(): f()
    else:
        f = lambda: attention_forward(q,k,v,is_causal=bool(causal))
        o, lse = f()
        b = lambda: attention_backward(do,q,k,v,o,lse,is_causal=bool(causal))
    res = []
    for fn, fl in ((f, flop), (b, 2.5*flop)):
        fn(); n=0; ts=[]; t0=time.perf_counter()
        while time.perf_counter()-t0 < 0.7 or n < 3:
            a=time.perf_counter(); fn(); ts.append(time.perf_counter()-a); n+=1
        res.append(fl/np.median(ts)/1e9)
    print(f"{isa:8s} {threads:2d} {(B,H,L,D)} causal {causal}: forward {res[0]:7.0f} backward {res[1]:7.0f} GFLOP/s", flush=True)
