// dQ of the sums that hopper_backward_qkv.cu leaves: a warp takes 16 rows, which in the sums lie as
// in the registers of hopper_backward_q.cu, and ends as that one does, its flag for
// hopper_careful_q.cu included.

static_assert(kThreads == 128 * kGroups, "");

extern "C" __global__ void __launch_bounds__(kThreads)
hopper_finish_q(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2;
  const Work work = work_of(p, blockIdx.x);
  const int chunks = (int)p.D / 8, part = work.row0 / 64 + group;
  float dq[kO][4];
  Rows rows;
  clear(dq);
  rows.load(p, work, work.row0 + warp * 16 + (lane >> 2));
  if (part * 64 < p.Lq) {
    const float4* const sums =
        (const float4*)RowSums(p).at(work.b, work.h, part, 0) + threadIdx.x % 128;
#pragma unroll
    for (int n = 0; n < kO; n++)
      if (n < chunks) {
        const float4 x = sums[n * 128];
        dq[n][0] = x.x, dq[n][1] = x.y, dq[n][2] = x.z, dq[n][3] = x.w;
      }
  }
  const bool odd = __any_sync(~0u, finish(dq, rows));
  if (lane == 0) ((u8*)p.flags)[(i64)blockIdx.x * 4 * kGroups + warp] = odd;
  write_rows(p, work, dq, shared, kUsual);
}
