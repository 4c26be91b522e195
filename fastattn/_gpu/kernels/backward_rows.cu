// Backward, first step: for every row D - dlse, with D = dout . out, and its lse; a warp takes a
// row. Rows without a pair (lse -inf) and rows that do not exist get lse = +inf, so that every P of
// theirs is 0; nothing else of them is read.

extern "C" __global__ void __launch_bounds__(kThreads)
backward_rows(const __grid_constant__ Params p) {
  const i64 padded_rows = padded(p.Lq), all = p.batch * p.Hq * padded_rows;
  const i64 row = (i64)blockIdx.x * kWarps + (threadIdx.x >> 5);
  const int lane = threadIdx.x & 31;
  if (row >= all) return;
  const int i = (int)(row % padded_rows), h = (int)(row / padded_rows % p.Hq);
  const int b = (int)(row / padded_rows / p.Hq);
  Acc lse = -infinity(Acc());
  if (i < p.Lq && i < entry_of(p, b).q_len)
    lse = load<Acc>(p.lse.at(b, h) + i * p.lse.row, p.lse.access);
  Acc delta = 0;
  if (lse == -infinity(Acc())) {
    lse = infinity(Acc());
  } else {
    const char* const out = p.out.at(b, h) + i * p.out.row;
    const char* const dout = p.dout.at(b, h) + i * p.dout.row;
    for (int c = lane; c < p.Dv; c += 32) {
      const char* const at = out + c * p.out.column;
      const Acc o = p.out_kind == kF32 && sizeof(Elem) == 2
          ? (Acc)load<float>(at, p.out.access)
          : (Acc)widen(load<Elem>(at, p.out.access));
      delta += o * (Acc)widen(load<Elem>(dout + c * p.dout.column, p.dout.access));
    }
#pragma unroll
    for (int x = 16; x; x >>= 1) delta += __shfl_xor_sync(~0u, delta, x);
    if (p.dlse.data) delta -= load<Acc>(p.dlse.at(b, h) + i * p.dlse.row, p.dlse.access);
  }
  if (lane == 0) {
    ((Acc*)p.row_lse)[row] = lse;
    ((Acc*)p.row_delta)[row] = delta;
  }
}
