// The results of split keys, merged: out = sum w_s out_s, w_s = exp(lse_s - lse), as
// merge_attention_states does it; sinks join here. An empty part (lse_s = -inf) is not read. A block
// takes a row.

extern "C" __global__ void __launch_bounds__(kThreads)
combine(const __grid_constant__ Params p) {
  const i64 row = blockIdx.x;
  const int i = (int)(row % p.Lq), h = (int)(row / p.Lq % p.Hq), b = (int)(row / p.Lq / p.Hq);
  const Acc none = -infinity(Acc());
  const Acc* const part_lse = (const Acc*)p.partial_lse + row * p.splits;
  const Acc* const part = (const Acc*)p.partial_out + row * p.splits * p.Dv;
  const bool exists = i < entry_of(p, b).q_len;
  const Acc sink = p.sinks && exists ? ((const Acc*)p.sinks)[h] : none;

  Acc high = sink;
  for (int s = 0; s < p.splits; s++) high = max_of(high, part_lse[s]);
  const Acc safe = high == none ? 0 : high;
  Acc sum = sink == none ? 0 : exp2_of((sink - safe) * (Acc)kLog2e);
  for (int s = 0; s < p.splits; s++)
    if (part_lse[s] != none) sum += exp2_of((part_lse[s] - safe) * (Acc)kLog2e);
  if (threadIdx.x == 0)
    store(p.lse.at(b, h) + i * p.lse.row, high == none && sum == 0 ? none : high + log_of(sum), p.lse.access);
  for (int c = threadIdx.x; c < p.Dv; c += kThreads) {
    Acc value = 0;
    for (int s = 0; s < p.splits; s++)
      if (part_lse[s] != none)
        value += exp2_of((part_lse[s] - safe) * (Acc)kLog2e) / sum * part[s * p.Dv + c];
    char* const to = p.out.at(b, h) + i * p.out.row + c * p.out.column;
    if (sizeof(Elem) == 2 && p.out_kind == kF32) write<float>(to, value, p.out.access, kUsual);
    else write<Elem>(to, value, p.out.access, kUsual);
  }
}
