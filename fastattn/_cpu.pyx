"""The CPU backend: from a Problem to tiles, from tiles to kernels.

Data flows one way:

    forward/backward(problem, arrays)   Python objects -> one C struct, Job; threads; workspaces
      forward_block / backward_block    one block of query rows (OpenMP hands these out)
        tile_mask                       which pairs of a tile take part: full, partial or empty
        fa_kernels (kernels.h)          arithmetic on one tile, for the ISA chosen

    forward    parallel over (batch, kv head, block of rows), any order
    backward   parallel over (batch, kv head); heads left over are shared by all threads, block by
               block, each adding to a tile of dK, dV after the block before it has (a wavefront):
               the sums have one order whatever the number of threads

Nothing here or below checks an argument (_problem.py did), and everything between the two
Python-level functions runs without the GIL.
"""
import math
import os

import numpy

cimport openmp
cimport numpy as cnp
from cython.parallel cimport prange, threadid
from libc.math cimport exp, log, INFINITY, NAN
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

cnp.import_array()


cdef extern from "_cpu_kernels/kernels.h" nogil:
    enum:
        FA_F16, FA_BF16, FA_F32, FA_F64, FA_BOOL, FA_NONE
        FA_MAX_PANEL
        FA_FIRST, FA_SAME, FA_RESCALE
    ctypedef struct fa_rows:
        const char *const *row
        ptrdiff_t stride
        int32_t rows, cols, dtype
    ctypedef struct fa_adjust:
        double scale, softcap
        const void *add[2]
        const void *slope
        const void *centre
        void *gain
    ctypedef struct fa_softmax_state:
        void *row_max
        void *row_sum
        void *alpha
        const void *tile_max
    ctypedef struct fa_product:
        void *c
        ptrdiff_t ldc
        const void *a
        ptrdiff_t a_row, a_depth
        const void *b
        ptrdiff_t ldb
        int32_t rows, cols, depth, mode
        const void *alpha
        const int32_t *row_depth
    ctypedef struct fa_selection:
        const uint32_t *keep
        ptrdiff_t ld
        int32_t keys, panel, rows_are_keys
        void *scratch
    ctypedef struct fa_backward_tile:
        void *s
        void *dp
        const uint32_t *keep
        const uint32_t *drop
        double scale, drop_scale
        const void *lse
        const void *shift
        const void *gain
        void *p
        void *ds
        void *ds_keys
        ptrdiff_t ld
    ctypedef struct fa_kernels:
        const char *type
        int32_t real_bytes, unit_bytes, pair, lanes, Br, Bc, Br_backward, Bc_backward, MR, NR
        void (*pack_lanes)(void *, int, const fa_rows *, int) noexcept nogil
        void (*pack_left)(void *, ptrdiff_t, const fa_rows *) noexcept nogil
        void (*pack_right)(void *, ptrdiff_t, const fa_rows *) noexcept nogil
        void (*load_lanes)(void *, int, const fa_rows *) noexcept nogil
        void (*store_row)(char *, ptrdiff_t, int, const void *, int, double) noexcept nogil
        double (*dot)(const char *, ptrdiff_t, int, const char *, ptrdiff_t, int, int) noexcept nogil
        void (*scores)(void *, int, const void *, ptrdiff_t, const void *, int, int, void *) noexcept nogil
        void (*adjust)(void *, int, int, const fa_adjust *) noexcept nogil
        void (*exclude)(void *, int, int, const uint32_t *, void *) noexcept nogil
        int (*softmax)(void *, void *, int, int, double, const fa_softmax_state *,
                       const uint32_t *, double) noexcept nogil
        void (*accumulate)(const fa_product *) noexcept nogil
        void (*accumulate_selected)(const fa_product *, const fa_selection *) noexcept nogil
        int (*all_finite)(const void *, ptrdiff_t, int, int) noexcept nogil
        void (*backward_tile)(const fa_backward_tile *, int, int) noexcept nogil
        void (*add_tile)(void *, const void *, int64_t) noexcept nogil
        void (*add_distances)(void *, const void *, int, int, const void *) noexcept nogil
        void (*keep_above_neg_inf)(uint32_t *, const void *, int, int) noexcept nogil
        void (*keep_true)(uint32_t *, const fa_rows *) noexcept nogil
        void (*dropout)(uint32_t *, int, int, int64_t, const uint32_t *, const uint32_t *,
                        uint32_t, uint64_t, uint64_t) noexcept nogil
        double (*peak)(int64_t, double *) noexcept nogil
    ctypedef struct fa_isa:
        const char *name
        const char *requires
        const fa_kernels *f32
        const fa_kernels *f64
        const fa_kernels *bf16
    const fa_isa *fa_isas
    int fa_isa_count
    const char *fa_isa_missing(const char *)
    void fa_publish(int64_t *, int64_t)
    void fa_wait_above(const int64_t *, int64_t)
    bint POOL_SURVIVES_FORK "FA_POOL_SURVIVES_FORK"

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **, size_t, size_t)


# ---- the job: everything a thread needs to know, fixed for one call ------------------------------

cdef enum:
    MAX_LEAD = 64
    MAX_PANELS = 256
    EMPTY, PARTIAL, FULL

# An array of the problem: bytes between neighbours along (leading axes..., head, row, column).
cdef struct Array:
    char *data
    int dtype
    ptrdiff_t head, row, col
    ptrdiff_t lead[MAX_LEAD]

cdef struct Job:
    const fa_kernels *kernels
    int lead_dims
    int64_t lead[MAX_LEAD]
    int64_t batch, Hq, Hkv, group, Lq, Lk
    int D, Dv                  # columns of q, k and of v, out
    int D_units, D_cols, Dv_units, Dv_cols  # as summed axis, in units; as columns, whole vectors
    Array q, k, v, out, lse, attn_mask, bias, q_segment_ids, kv_segment_ids
    Array dout, dlse, dq, dk, dv, dbias
    double scale, softcap      # the scale's magnitude; its sign is packed into the lanes of q
    bint negate
    bint adjusted              # scores are finished by `adjust`, else softmax applies the scale
    bint bounded_left, bounded_right
    int64_t left, right
    const int64_t *offset
    const int64_t *q_lens
    const int64_t *kv_lens
    const void *slopes
    const void *sinks
    uint64_t seed, threshold   # threshold 0: no dropout
    double drop_scale
    # How the rows are cut: a block is Br rows of one head, or `stack` whole heads of one group.
    int Br, Bc, panel, stack
    int64_t blocks             # of one kv head
    bint k_in_place, v_in_place
    # backward
    bint is_backward, want_dkv
    double *dsink_rows         # (batch, Hq, Lq) or NULL
    double *dslope_rows

# One thread's memory. Arrays over rows have an entry for every lane of the block's panels.
cdef struct Workspace:
    void *q_lanes
    void *o                    # backward: dq
    void *s
    void *p
    void *k_tile
    void *v_tile
    void *add[2]
    void *scratch
    uint32_t *keep
    uint32_t *drop
    int32_t *row_depth
    void *row_max
    void *row_sum
    void *alpha
    void *tile_max
    void *slope
    void *centre
    # backward
    void *do_lanes
    void *q_right
    void *do_right
    void *k_right
    void *dp
    void *gain
    void *ds
    void *ds_keys
    void *lse
    void *shift
    void *dslope
    void *dbias
    # rows of the block at hand
    int64_t b
    int rows, panels
    int64_t first_key, end_key          # keys that any row sees
    int64_t *pos
    int64_t *seg
    int64_t *key_from
    int64_t *key_to
    uint32_t *pos32
    uint32_t *head
    const char **row
    # tiles at hand
    const void *k_left
    const void *v_left
    const void *v_right
    ptrdiff_t ldk, ldv
    int v_finite               # -1: not looked at yet
    char *own                  # what make_workspaces put behind it


cdef inline double get(const fa_kernels *kr, const void *p, Py_ssize_t i) noexcept nogil:
    return (<const double *> p)[i] if kr.real_bytes == 8 else (<const float *> p)[i]

cdef inline void put(const fa_kernels *kr, void *p, Py_ssize_t i, double x) noexcept nogil:
    if kr.real_bytes == 8:
        (<double *> p)[i] = x
    else:
        (<float *> p)[i] = <float> x

cdef inline void *units(const Job *job, const void *p, ptrdiff_t n) noexcept nogil:
    return <char *> p + n * job.kernels.unit_bytes

cdef inline void *reals(const Job *job, const void *p, ptrdiff_t n) noexcept nogil:
    return <char *> p + n * job.kernels.real_bytes

cdef inline char *at(const Job *job, const Array *a, int64_t b, int64_t head) noexcept nogil:
    cdef ptrdiff_t offset = head * a.head
    cdef int axis
    for axis in range(job.lead_dims - 1, -1, -1):
        offset += (b % job.lead[axis]) * a.lead[axis]
        b //= job.lead[axis]
    return a.data + offset

cdef inline int64_t clamp(int64_t x, int64_t low, int64_t high) noexcept nogil:
    return low if x < low else high if x > high else x

cdef inline int ceil_div(int64_t a, int64_t b) noexcept nogil:
    return <int> ((a + b - 1) // b)


# Lays the workspace out from `base`; with base NULL, only tells its size.
cdef size_t lay_out(const Job *job, Workspace *ws, char *base) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef size_t used = 0
    cdef int rows = ceil_div(job.Br, job.panel) * job.panel
    cdef size_t real = kr.real_bytes, unit = kr.unit_bytes
    cdef size_t tile = <size_t> job.Bc * job.panel, key_pairs = ceil_div(job.Bc, kr.pair)
    cdef size_t query_pairs = ceil_div(rows, kr.pair)
    cdef size_t depth, panels = rows // job.panel

    ws.q_lanes = carve(base, &used, rows * job.D_units * unit)
    ws.o = carve(base, &used, rows * real * (job.D_cols if job.is_backward else job.Dv_cols))
    ws.s = carve(base, &used, tile * real)
    ws.add[0] = carve(base, &used, tile * real if job.attn_mask.dtype < FA_BOOL else 0)
    ws.add[1] = carve(base, &used, tile * real if job.bias.dtype < FA_BOOL else 0)
    ws.k_tile = carve(base, &used, 0 if job.k_in_place else job.Bc * key_ld(job) * unit)
    ws.keep = <uint32_t *> carve(base, &used, panels * job.Bc * sizeof(uint32_t))
    ws.drop = <uint32_t *> carve(base, &used, job.Bc * sizeof(uint32_t))
    ws.row_depth = <int32_t *> carve(base, &used, job.panel * sizeof(int32_t))
    ws.tile_max = carve(base, &used, job.panel * real)
    ws.slope = carve(base, &used, job.panel * real)
    ws.centre = carve(base, &used, job.panel * real)
    if job.is_backward:
        depth = max(key_pairs, query_pairs)
        ws.p = carve(base, &used, job.Bc * query_pairs * unit)
        ws.ds = carve(base, &used, job.Bc * query_pairs * unit)
        ws.ds_keys = carve(base, &used, key_pairs * rows * unit if kr.pair == 2 else 0)
        ws.dp = carve(base, &used, tile * real)
        ws.gain = carve(base, &used, tile * real if job.softcap != 0 else 0)
        ws.do_lanes = carve(base, &used, rows * job.Dv_units * unit)
        ws.q_right = carve(base, &used, query_pairs * job.D_cols * unit)
        ws.do_right = carve(base, &used, query_pairs * job.Dv_cols * unit)
        ws.k_right = carve(base, &used, key_pairs * job.D_cols * unit)
        ws.v_tile = carve(base, &used, 0 if job.v_in_place else job.Bc * job.Dv_units * unit)
        ws.scratch = carve(base, &used, depth * max(job.D_cols, job.Dv_cols) * unit)
        ws.lse = carve(base, &used, rows * real)
        ws.shift = carve(base, &used, rows * real)
        ws.dslope = carve(base, &used, rows * real)
        ws.dbias = carve(base, &used, panels * tile * real if job.dbias.dtype != FA_NONE else 0)
    else:
        ws.p = carve(base, &used, key_pairs * job.panel * unit) if kr.pair == 2 else ws.s
        ws.v_tile = carve(base, &used, 0 if job.v_in_place else key_pairs * job.Dv_cols * unit)
        ws.scratch = carve(base, &used, key_pairs * job.Dv_cols * unit)
        ws.row_max = carve(base, &used, rows * real)
        ws.row_sum = carve(base, &used, rows * real)
        ws.alpha = carve(base, &used, job.panel * real)
    ws.pos = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.seg = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.key_from = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.key_to = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.pos32 = <uint32_t *> carve(base, &used, rows * sizeof(uint32_t))
    ws.head = <uint32_t *> carve(base, &used, rows * sizeof(uint32_t))
    ws.row = <const char **> carve(base, &used, max(rows, job.Bc) * sizeof(char *))
    return used

cdef inline void *carve(char *base, size_t *used, size_t size) noexcept nogil:
    cdef size_t start = used[0]
    used[0] = start + (size + 63) // 64 * 64
    return base + start if base != NULL else NULL


# A copy of keys as reals has whole vectors, so that it is a right operand too.
cdef inline int key_ld(const Job *job) noexcept nogil:
    return job.D_cols if job.kernels.pair == 1 else job.D_units


# ---- a block of query rows -----------------------------------------------------------------------

# Rows [i0, i0 + n) of query heads [head0, head0 + heads): where they are, what they may see.
cdef void set_rows(const Job *job, Workspace *ws, int64_t b, int64_t head0, int heads, int64_t i0,
                   int n) noexcept nogil:
    cdef int r = 0, lane
    cdef int64_t h, i, low, high, centre
    cdef int64_t offset = clamp(job.offset[b], -(<int64_t> 1 << 61), <int64_t> 1 << 61) if job.offset != NULL else 0
    cdef int64_t q_len = clamp(job.q_lens[b], 0, job.Lq) if job.q_lens != NULL else job.Lq
    cdef int64_t kv_len = clamp(job.kv_lens[b], 0, job.Lk) if job.kv_lens != NULL else job.Lk
    cdef char *segments = at(job, &job.q_segment_ids, b, 0) if job.q_segment_ids.dtype != FA_NONE else NULL
    ws.b = b
    ws.rows = heads * n
    ws.panels = ceil_div(ws.rows, job.panel)
    ws.first_key = job.Lk
    ws.end_key = 0
    for h in range(head0, head0 + heads):
        for i in range(i0, i0 + n):
            low = 0
            high = kv_len
            centre = i + offset
            if job.bounded_left:
                low = clamp(centre - job.left, 0, high)
            if job.bounded_right:
                high = clamp(centre + job.right + 1, 0, high)
            if i >= q_len or high <= low:
                low = high = 0
            else:
                ws.first_key = min(ws.first_key, low)
                ws.end_key = max(ws.end_key, high)
            ws.pos[r] = centre
            ws.pos32[r] = <uint32_t> i
            ws.head[r] = <uint32_t> h
            ws.key_from[r] = low
            ws.key_to[r] = high
            if segments != NULL:
                ws.seg[r] = (<int64_t *> (segments + i * job.q_segment_ids.row))[0]
            r += 1
    for lane in range(r, ws.panels * job.panel):
        ws.pos[lane] = ws.pos32[lane] = ws.head[lane] = 0
        ws.key_from[lane] = ws.key_to[lane] = 0

# Row pointers into `a` for rows [r0, r0 + n) of the block, at column `col`; rows that see no
# key at all are not read.
cdef fa_rows block_rows(const Job *job, Workspace *ws, const Array *a, int r0, int n, int64_t col,
                        int cols, bint dead_too) noexcept nogil:
    cdef fa_rows rows
    cdef char *base = NULL
    cdef int r
    cdef int64_t head = -1
    for r in range(r0, r0 + n):
        if ws.head[r] != head:
            head = ws.head[r]
            base = at(job, a, ws.b, head)
        ws.row[r - r0] = base + <int64_t> ws.pos32[r] * a.row + col * a.col
        if not dead_too and ws.key_to[r] == 0:
            ws.row[r - r0] = NULL
    rows.row = ws.row
    rows.stride = a.col
    rows.rows = n
    rows.cols = cols
    rows.dtype = a.dtype
    return rows

# Rows [j0, j0 + n) of k or v.
cdef fa_rows key_rows(Workspace *ws, const Array *a, char *base, int64_t j0, int n, int cols) noexcept nogil:
    cdef fa_rows rows
    cdef int j
    for j in range(n):
        ws.row[j] = base + (j0 + j) * a.row
    rows.row = ws.row
    rows.stride = a.col
    rows.rows = n
    rows.cols = cols
    rows.dtype = a.dtype
    return rows

cdef void pack_query_lanes(const Job *job, Workspace *ws, const Array *a, void *dst, int cols,
                           int cols_units, bint negate) noexcept nogil:
    cdef int p
    cdef fa_rows rows
    for p in range(ws.panels):
        rows = block_rows(job, ws, a, p * job.panel, min(job.panel, ws.rows - p * job.panel), 0, cols, False)
        job.kernels.pack_lanes(units(job, dst, <ptrdiff_t> p * job.panel * cols_units), job.panel, &rows, negate)


# The keys of [k0, k1) that rows of panel p see, as [*low, *high), low rounded down to a multiple
# of 4 (dropout draws 4 keys at once, bfloat16 takes them in pairs). False if there are none.
cdef bint panel_keys(const Job *job, const Workspace *ws, int p, int64_t k0, int64_t k1,
                     int64_t *low, int64_t *high) noexcept nogil:
    cdef int r
    cdef int64_t first = k1, end = k0
    for r in range(p * job.panel, min((p + 1) * job.panel, ws.rows)):
        if ws.key_to[r] > ws.key_from[r]:
            first = min(first, ws.key_from[r])
            end = max(end, ws.key_to[r])
    low[0] = max(k0, first // 4 * 4)
    high[0] = min(k1, end)
    return low[0] < high[0]


# Keys [k0, k1) of k or v as a product's left operand, read where they lie if they can be.
cdef void load_left(const Job *job, Workspace *ws, const Array *a, char *base, int64_t k0, int64_t k1,
                    int cols, int ld, bint in_place, void *tile, const void **left, ptrdiff_t *ld_out) noexcept nogil:
    cdef fa_rows rows
    if left[0] != NULL:
        return
    if in_place:
        left[0] = base + k0 * a.row
        ld_out[0] = a.row // job.kernels.unit_bytes
    else:
        rows = key_rows(ws, a, base, k0, <int> (k1 - k0), cols)
        job.kernels.pack_left(tile, ld, &rows)
        left[0] = tile
        ld_out[0] = ld

cdef void load_right(const Job *job, Workspace *ws, const Array *a, char *base, int64_t k0, int64_t k1,
                     int cols, int ld, bint in_place, void *tile, const void **right, ptrdiff_t *ld_out) noexcept nogil:
    cdef fa_rows rows
    if right[0] != NULL:
        return
    if in_place:
        right[0] = base + k0 * a.row
        ld_out[0] = a.row // job.kernels.unit_bytes
    else:
        rows = key_rows(ws, a, base, k0, <int> (k1 - k0), cols)
        job.kernels.pack_right(tile, ld, &rows)
        right[0] = tile
        ld_out[0] = ld


# ---- masking: the one place that knows what excludes a pair -----------------------------------------

# Pairs of panel p with the keys [j0, j0 + n): FULL, EMPTY, or PARTIAL with the bits of keep[n]
# telling which rows take part. Loads the tiles of additive masks into ws.add on the way, and sets
# ws.row_depth, past which a row sees nothing.
cdef int tile_mask(const Job *job, Workspace *ws, int p, int64_t j0, int n, uint32_t *keep) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef int r0 = p * job.panel, rows = min(job.panel, ws.rows - r0)
    cdef uint32_t valid = <uint32_t> ((<uint64_t> 1 << rows) - 1), bits = 0, any_kept = 0, all_kept = valid
    cdef bint banded = False, element_wise
    cdef int r, j, a, e
    cdef const Array *add
    cdef fa_rows mask
    cdef int64_t segment = 0, last = 0
    cdef char *base

    for r in range(rows):
        if ws.key_from[r0 + r] > j0 or ws.key_to[r0 + r] < j0 + n:
            banded = True
    element_wise = (job.attn_mask.dtype != FA_NONE or job.bias.dtype != FA_NONE
                    or job.q_segment_ids.dtype != FA_NONE)
    for r in range(job.panel):
        ws.row_depth[r] = ceil_div(n, kr.pair)
    if not banded and not element_wise:
        return FULL

    # A row's keys are one interval: its bit is switched on at the start and off at the end.
    memset(keep, 0, n * sizeof(uint32_t))
    for r in range(rows):
        a = <int> clamp(ws.key_from[r0 + r] - j0, 0, n)
        e = <int> clamp(ws.key_to[r0 + r] - j0, 0, n)
        ws.row_depth[r] = ceil_div(e, kr.pair)
        if a < e:
            keep[a] ^= <uint32_t> 1 << r
            if e < n:
                keep[e] ^= <uint32_t> 1 << r
    for j in range(1, n):
        keep[j] ^= keep[j - 1]

    if job.q_segment_ids.dtype != FA_NONE:
        base = at(job, &job.kv_segment_ids, ws.b, 0)
        for j in range(n):
            segment = (<int64_t *> (base + (j0 + j) * job.kv_segment_ids.row))[0]
            if j == 0 or segment != last:
                bits = 0
                for r in range(rows):
                    bits |= <uint32_t> (ws.seg[r0 + r] == segment) << r
                last = segment
            keep[j] &= bits

    if job.attn_mask.dtype == FA_BOOL:
        mask = block_rows(job, ws, &job.attn_mask, r0, rows, j0, n, True)
        kr.keep_true(keep, &mask)
    for a in range(2):
        add = &job.bias if a else &job.attn_mask
        if add.dtype < FA_BOOL:
            mask = block_rows(job, ws, add, r0, rows, j0, n, True)
            kr.load_lanes(ws.add[a], job.panel, &mask)
            kr.keep_above_neg_inf(keep, ws.add[a], job.panel, n)

    for j in range(n):
        any_kept |= keep[j] & valid
        all_kept &= keep[j]
    return EMPTY if any_kept == 0 else FULL if all_kept == valid else PARTIAL


cdef void adjust_tile(const Job *job, Workspace *ws, int p, int64_t j0, int n, void *gain) noexcept nogil:
    cdef fa_adjust how
    how.scale = job.scale
    how.softcap = job.softcap
    how.add[0] = ws.add[0] if job.attn_mask.dtype < FA_BOOL else NULL
    how.add[1] = ws.add[1] if job.bias.dtype < FA_BOOL else NULL
    how.slope = how.centre = NULL
    if job.slopes != NULL:
        set_distances(job, ws, p, j0)
        how.slope = ws.slope
        how.centre = ws.centre
    how.gain = gain
    job.kernels.adjust(ws.s, job.panel, n, &how)

cdef void set_distances(const Job *job, Workspace *ws, int p, int64_t j0) noexcept nogil:
    cdef int r
    for r in range(job.panel):
        put(job.kernels, ws.slope, r, get(job.kernels, job.slopes, ws.head[p * job.panel + r]))
        put(job.kernels, ws.centre, r, <double> (ws.pos[p * job.panel + r] - j0))

cdef const uint32_t *draw_dropout(const Job *job, Workspace *ws, int p, int64_t j0, int n) noexcept nogil:
    if job.threshold == 0:
        return NULL
    job.kernels.dropout(ws.drop, job.panel, n, j0, ws.pos32 + p * job.panel, ws.head + p * job.panel,
                        <uint32_t> ws.b, job.seed, job.threshold)
    return ws.drop


# ---- forward -----------------------------------------------------------------------------------------

cdef void forward_block(const Job *job, Workspace *ws, int64_t item) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef int64_t heads = job.batch * job.Hkv, block, kv_head, b, i0, k0, k1, low, high
    cdef int64_t per_head = job.blocks // ceil_div(job.group, job.stack), head0
    cdef int stacked, n, p, j, r, state, mode
    cdef uint32_t live[MAX_PANELS]
    cdef bint started[MAX_PANELS]
    cdef char *k_base
    cdef char *v_base
    cdef fa_rows rows
    cdef fa_softmax_state softmax
    cdef const uint32_t *keep
    cdef const uint32_t *drop

    # Under a causal bound later blocks are longer: those of all heads come first.
    if job.bounded_right:
        block = job.blocks - 1 - item // heads
        item %= heads
    else:
        block = item % job.blocks
        item //= job.blocks
    b = item // job.Hkv
    kv_head = item % job.Hkv
    head0 = kv_head * job.group + block // per_head * job.stack
    stacked = <int> min(job.stack, (kv_head + 1) * job.group - head0)
    i0 = block % per_head * job.Br
    n = <int> min(job.Br, job.Lq - i0) if job.stack == 1 else <int> job.Lq
    set_rows(job, ws, b, head0, stacked, i0, n)

    pack_query_lanes(job, ws, &job.q, ws.q_lanes, job.D, job.D_units, job.negate)
    for r in range(ws.panels * job.panel):
        put(kr, ws.row_max, r, -INFINITY)
        put(kr, ws.row_sum, r, 0)
    for p in range(ws.panels):
        live[p] = 0
        started[p] = False

    k_base = at(job, &job.k, b, kv_head)
    v_base = at(job, &job.v, b, kv_head)
    k0 = ws.first_key // job.Bc * job.Bc
    while k0 < ws.end_key:
        k1 = min(k0 + job.Bc, ws.end_key)
        ws.k_left = ws.v_right = NULL
        ws.v_finite = -1
        for p in range(ws.panels):
            if not panel_keys(job, ws, p, k0, k1, &low, &high):
                continue
            n = <int> (high - low)
            state = tile_mask(job, ws, p, low, n, ws.keep)
            if state == EMPTY:
                continue
            keep = ws.keep if state == PARTIAL else NULL
            load_left(job, ws, &job.k, k_base, k0, k1, job.D, key_ld(job), job.k_in_place, ws.k_tile,
                      &ws.k_left, &ws.ldk)
            kr.scores(ws.s, job.panel, units(job, ws.k_left, (low - k0) * ws.ldk), ws.ldk,
                      units(job, ws.q_lanes, <ptrdiff_t> p * job.panel * job.D_units), n, job.D_units,
                      ws.tile_max)
            if job.adjusted:
                adjust_tile(job, ws, p, low, n, NULL)
            if job.adjusted or keep != NULL:
                kr.exclude(ws.s, job.panel, n, keep, ws.tile_max)
            if keep == NULL:
                live[p] = ~<uint32_t> 0
            else:
                for j in range(n):
                    live[p] |= keep[j]
            drop = draw_dropout(job, ws, p, low, n)
            softmax.row_max = reals(job, ws.row_max, p * job.panel)
            softmax.row_sum = reals(job, ws.row_sum, p * job.panel)
            softmax.alpha = ws.alpha
            softmax.tile_max = ws.tile_max
            mode = kr.softmax(ws.p, ws.s, job.panel, n, 1 if job.adjusted else job.scale, &softmax,
                              drop, job.drop_scale)
            if not started[p]:
                mode = FA_FIRST
            started[p] = True
            load_right(job, ws, &job.v, v_base, k0, k1, job.Dv, job.Dv_cols, job.v_in_place, ws.v_tile,
                       &ws.v_right, &ws.ldv)
            add_values(job, ws, p, k0, k1, low, n, keep, mode)
        k0 += job.Bc

    for r in range(ws.rows):
        p = r // job.panel
        finish_row(job, ws, r, started[p] and (live[p] >> (r % job.panel)) & 1)


# O += P V for panel p, tile [k0, k1), keys [low, low + n).
cdef void add_values(const Job *job, Workspace *ws, int p, int64_t k0, int64_t k1, int64_t low, int n,
                     const uint32_t *keep, int mode) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef fa_product x
    cdef fa_selection which
    cdef int j
    x.c = reals(job, ws.o, <ptrdiff_t> p * job.panel * job.Dv_cols)
    x.ldc = job.Dv_cols
    x.a = ws.p
    x.a_row = 1
    x.a_depth = job.panel
    x.b = units(job, ws.v_right, (low - k0) // kr.pair * ws.ldv)
    x.ldb = ws.ldv
    x.rows = min(job.panel, ws.rows - p * job.panel)
    x.cols = job.Dv_cols
    x.depth = ceil_div(n, kr.pair)
    x.mode = mode
    x.alpha = ws.alpha
    x.row_depth = ws.row_depth if keep != NULL else NULL
    # The last pair may hold a key past the panel's: as excluded as any.
    if (keep != NULL or (n % kr.pair != 0 and low + n < k1)) and not finite(
            kr, &ws.v_finite, ws.v_right, ws.ldv, ceil_div(k1 - k0, kr.pair), job.Dv_cols):
        if keep == NULL:
            for j in range(n):
                ws.keep[j] = ~<uint32_t> 0
        which.keep = ws.keep
        which.ld = job.Bc
        which.keys = n
        which.panel = job.panel
        which.rows_are_keys = False
        which.scratch = ws.scratch
        kr.accumulate_selected(&x, &which)
    else:
        kr.accumulate(&x)

cdef inline bint finite(const fa_kernels *kr, int *known, const void *b, ptrdiff_t ld, int rows,
                        int cols) noexcept nogil:
    if known[0] < 0:
        known[0] = kr.all_finite(b, ld, rows, cols)
    return known[0]

cdef void finish_row(const Job *job, Workspace *ws, int r, bint live) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef double total = 0, top = -INFINITY, sink, whole, factor = 0, lse = -INFINITY
    cdef int64_t i = ws.pos32[r]
    cdef bint exists = job.q_lens == NULL or i < job.q_lens[ws.b]
    cdef void *o = reals(job, ws.o, <ptrdiff_t> r * job.Dv_cols)
    if live:
        total = get(kr, ws.row_sum, r)
        top = get(kr, ws.row_max, r)
        if not job.adjusted:
            top *= job.scale
        factor = 1 / total
        lse = top + log(total) if total != 0 else NAN
    else:
        memset(o, 0, job.Dv_cols * kr.real_bytes)
    if job.sinks != NULL and exists:
        sink = get(kr, job.sinks, ws.head[r])
        if not live:
            lse = sink
        else:
            whole = max(top, sink) if top == top and sink == sink else NAN
            total = total * exp(top - whole)
            factor *= total / (total + exp(sink - whole))
            lse = whole + log(total + exp(sink - whole))
    kr.store_row(at(job, &job.out, ws.b, ws.head[r]) + i * job.out.row, job.out.col, job.out.dtype, o,
                 job.Dv, factor)
    put(kr, ws.alpha, 0, lse)
    memcpy(at(job, &job.lse, ws.b, ws.head[r]) + i * job.lse.row, ws.alpha, kr.real_bytes)


# ---- backward ----------------------------------------------------------------------------------------

# A block of rows of one head, ready for its tiles: lanes and rows of q and dout, lse, D - dlse.
cdef void load_backward_block(const Job *job, Workspace *ws, int64_t b, int64_t head, int64_t i0) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef int n = <int> min(job.Br, job.Lq - i0), r
    cdef int64_t i, row
    cdef double lse, delta, dlse
    cdef char *dout
    cdef char *out
    cdef fa_rows rows
    set_rows(job, ws, b, head, 1, i0, n)
    ws.first_key = job.Lk
    ws.end_key = 0
    for r in range(ws.panels * job.panel):
        lse = INFINITY
        delta = dlse = 0
        i = i0 + r
        if r < n and (job.q_lens == NULL or i < job.q_lens[b]):
            lse = real_at(job, at(job, &job.lse, b, head) + i * job.lse.row)
        if lse == -INFINITY:
            lse = INFINITY
            ws.key_from[r] = ws.key_to[r] = 0
        elif r < n and (job.q_lens == NULL or i < job.q_lens[b]):
            dout = at(job, &job.dout, b, head) + i * job.dout.row
            out = at(job, &job.out, b, head) + i * job.out.row
            delta = kr.dot(dout, job.dout.col, job.dout.dtype, out, job.out.col, job.out.dtype, job.Dv)
            if job.dlse.dtype != FA_NONE:
                dlse = real_at(job, at(job, &job.dlse, b, head) + i * job.dlse.row)
            if job.dsink_rows != NULL:
                row = (b * job.Hq + head) * job.Lq + i
                job.dsink_rows[row] = exp(get(kr, job.sinks, head) - lse) * (dlse - delta)
        put(kr, ws.lse, r, lse)
        put(kr, ws.shift, r, delta - dlse)
        if ws.key_to[r] > ws.key_from[r]:
            ws.first_key = min(ws.first_key, ws.key_from[r])
            ws.end_key = max(ws.end_key, ws.key_to[r])
    pack_query_lanes(job, ws, &job.q, ws.q_lanes, job.D, job.D_units, job.negate)
    pack_query_lanes(job, ws, &job.dout, ws.do_lanes, job.Dv, job.Dv_units, False)
    memset(ws.dslope, 0, ws.panels * job.panel * kr.real_bytes)

cdef inline double real_at(const Job *job, const char *p) noexcept nogil:
    cdef double wide
    cdef float narrow
    if job.kernels.real_bytes == 8:
        memcpy(&wide, p, 8)
        return wide
    memcpy(&narrow, p, 4)
    return narrow

# P and dS of panel p for the tile [k0, k1), into ws.p, ws.ds (and t into ws.dp): zeros where a
# pair is excluded. ws.keep gets the panel's pairs. Returns the panel's state over the tile.
cdef int backward_panel(const Job *job, Workspace *ws, int p, char *k_base, char *v_base, int64_t k0,
                        int64_t k1, int64_t *low, int64_t *high) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef uint32_t *keep = ws.keep + <ptrdiff_t> p * job.Bc
    cdef int rows = min(job.panel, ws.rows - p * job.panel), state = EMPTY, n = 0, j
    cdef fa_backward_tile x
    cdef ptrdiff_t lanes = <ptrdiff_t> ceil_div(job.Br, job.panel) * job.panel
    if panel_keys(job, ws, p, k0, k1, low, high):
        n = <int> (high[0] - low[0])
        state = tile_mask(job, ws, p, low[0], n, keep + (low[0] - k0))
    if state == EMPTY:
        low[0] = high[0] = k0
        n = 0
    if state == FULL:  # lanes past the last row are excluded too
        for j in range(n):
            keep[low[0] - k0 + j] = <uint32_t> ((<uint64_t> 1 << rows) - 1)
    memset(keep, 0, (low[0] - k0) * sizeof(uint32_t))
    memset(keep + (high[0] - k0), 0, (k1 - high[0]) * sizeof(uint32_t))
    clear_keys(job, ws, p, lanes, 0, <int> (low[0] - k0))
    clear_keys(job, ws, p, lanes, <int> (high[0] - k0), <int> (k1 - k0))
    if state == EMPTY:
        return EMPTY

    load_left(job, ws, &job.k, k_base, k0, k1, job.D, key_ld(job), job.k_in_place,
              ws.k_tile, &ws.k_left, &ws.ldk)
    load_left(job, ws, &job.v, v_base, k0, k1, job.Dv, job.Dv_units, job.v_in_place, ws.v_tile,
              &ws.v_left, &ws.ldv)
    kr.scores(ws.s, job.panel, units(job, ws.k_left, (low[0] - k0) * ws.ldk), ws.ldk,
              units(job, ws.q_lanes, <ptrdiff_t> p * job.panel * job.D_units), n, job.D_units, ws.tile_max)
    if job.adjusted:
        adjust_tile(job, ws, p, low[0], n, ws.gain)
    kr.scores(ws.dp, job.panel, units(job, ws.v_left, (low[0] - k0) * ws.ldv), ws.ldv,
              units(job, ws.do_lanes, <ptrdiff_t> p * job.panel * job.Dv_units), n, job.Dv_units, ws.tile_max)
    x.s = ws.s
    x.dp = ws.dp
    x.keep = keep + (low[0] - k0) if state == PARTIAL or rows < job.panel else NULL
    x.drop = draw_dropout(job, ws, p, low[0], n)
    x.scale = 1 if job.adjusted else job.scale
    x.drop_scale = job.drop_scale
    x.lse = reals(job, ws.lse, p * job.panel)
    x.shift = reals(job, ws.shift, p * job.panel)
    x.gain = ws.gain if job.softcap != 0 else NULL
    x.ld = lanes // kr.pair
    x.p = units(job, ws.p, (low[0] - k0) * x.ld + p * job.panel // kr.pair)
    x.ds = units(job, ws.ds, (low[0] - k0) * x.ld + p * job.panel // kr.pair)
    x.ds_keys = units(job, ws.ds_keys, (low[0] - k0) // 2 * lanes + p * job.panel)
    kr.backward_tile(&x, job.panel, n)
    return FULL if state == FULL and low[0] == k0 and high[0] == k1 else PARTIAL

# Zeros for panel p in keys [j0, j1) of the tile.
cdef void clear_keys(const Job *job, Workspace *ws, int p, ptrdiff_t lanes, int j0, int j1) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef ptrdiff_t ld = lanes // kr.pair, first = p * job.panel // kr.pair, size = job.panel // kr.pair * kr.unit_bytes
    cdef int j
    for j in range(j0, j1):
        memset(units(job, ws.p, j * ld + first), 0, size)
        memset(units(job, ws.ds, j * ld + first), 0, size)
    if kr.pair == 2:
        for j in range(ceil_div(j0, 2), ceil_div(j1, 2)):
            memset(units(job, ws.ds_keys, j * lanes + p * job.panel), 0, job.panel * kr.unit_bytes)

# One block of rows: its dq, its rows of dsinks and dalibi_slopes, and its share of dk and dv, which
# is added to a tile once the block before has passed it (*before, NULL: nobody shares them).
cdef void backward_block(const Job *job, Workspace *ws, int64_t b, int64_t kv_head, int64_t block, void *dk,
                         void *dv, const int64_t *before, int64_t *passed) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef int64_t per_head = job.blocks // job.group, head = kv_head * job.group + block // per_head
    cdef int64_t i0 = block % per_head * job.Br, k0, k1, low, high, first, end
    cdef int p, r, state, rows_finite = -1, k_finite
    cdef bint ragged, started = False
    cdef ptrdiff_t lanes = <ptrdiff_t> ceil_div(job.Br, job.panel) * job.panel, ldk_right = 0
    cdef char *k_base = at(job, &job.k, b, kv_head)
    cdef char *v_base = at(job, &job.v, b, kv_head)
    cdef const void *k_right
    cdef fa_rows rows
    cdef fa_product x
    cdef fa_selection which

    load_backward_block(job, ws, b, head, i0)
    rows = block_rows(job, ws, &job.q, 0, ws.rows, 0, job.D, False)
    kr.pack_right(ws.q_right, job.D_cols, &rows)
    rows = block_rows(job, ws, &job.dout, 0, ws.rows, 0, job.Dv, False)
    kr.pack_right(ws.do_right, job.Dv_cols, &rows)

    k0 = ws.first_key // job.Bc * job.Bc
    while k0 < ws.end_key:
        k1 = min(k0 + job.Bc, ws.end_key)
        ws.k_left = ws.v_left = k_right = NULL
        k_finite = -1
        first = k1
        end = k0
        ragged = False
        for p in range(ws.panels):
            state = backward_panel(job, ws, p, k_base, v_base, k0, k1, &low, &high)
            ragged |= state != FULL
            if state != EMPTY:
                first = min(first, low)
                end = max(end, high)
                if job.dslope_rows != NULL:
                    kr.add_distances(reals(job, ws.dslope, p * job.panel), ws.dp, job.panel,
                                     <int> (high - low), ws.centre)
        if before != NULL:
            fa_wait_above(before, k0)
        if first < end:
            memset(&x, 0, sizeof(x))
            which.keep = ws.keep + (first - k0)
            which.ld = job.Bc
            which.keys = <int> (end - first)
            which.panel = job.panel
            which.scratch = ws.scratch
            x.mode = FA_SAME
            if job.want_dkv:
                which.rows_are_keys = True
                x.a_row = lanes // kr.pair
                x.a_depth = 1
                x.rows = <int> (end - first)
                x.depth = ceil_div(ws.rows, kr.pair)

                x.a = units(job, ws.p, (first - k0) * x.a_row)
                x.c = reals(job, dv, first * job.Dv_cols)
                x.b = ws.do_right
                x.ldc = x.ldb = x.cols = job.Dv_cols
                multiply(job, &x, &which, ragged and not rows_all_finite(job, ws, &rows_finite))

                x.a = units(job, ws.ds, (first - k0) * x.a_row)
                x.c = reals(job, dk, first * job.D_cols)
                x.b = ws.q_right
                x.ldc = x.ldb = x.cols = job.D_cols
                multiply(job, &x, &which, ragged and not rows_all_finite(job, ws, &rows_finite))
            if passed != NULL:
                fa_publish(passed, k1)
            if job.dq.dtype != FA_NONE:
                if kr.pair == 1 and (not job.k_in_place or job.D == job.D_cols):
                    k_right = ws.k_left
                    ldk_right = ws.ldk
                else:
                    load_right(job, ws, &job.k, k_base, k0, k1, job.D, job.D_cols, False, ws.k_right,
                               &k_right, &ldk_right)
                which.rows_are_keys = False
                x.mode = FA_SAME if started else FA_FIRST
                x.a = units(job, ws.ds if kr.pair == 1 else ws.ds_keys, (first - k0) // kr.pair * lanes)
                x.a_row = 1
                x.a_depth = lanes
                x.rows = ws.rows
                x.depth = ceil_div(end - first, kr.pair)
                x.c = ws.o
                x.b = units(job, k_right, (first - k0) // kr.pair * ldk_right)
                x.ldb = ldk_right
                x.ldc = x.cols = job.D_cols
                multiply(job, &x, &which, ragged and not finite(kr, &k_finite, k_right, ldk_right,
                                                                ceil_div(k1 - k0, kr.pair), job.D_cols))
                started = True
        elif passed != NULL:
            fa_publish(passed, k1)
        k0 += job.Bc
    if before != NULL:
        fa_wait_above(before, job.Lk)
    if passed != NULL:
        fa_publish(passed, job.Lk + 1)

    for r in range(ws.rows):
        if job.dq.dtype != FA_NONE:
            if not started or ws.key_to[r] == 0:
                memset(reals(job, ws.o, <ptrdiff_t> r * job.D_cols), 0, job.D_cols * kr.real_bytes)
            kr.store_row(at(job, &job.dq, b, head) + (i0 + r) * job.dq.row, job.dq.col, job.dq.dtype,
                         reals(job, ws.o, <ptrdiff_t> r * job.D_cols), job.D, -job.scale if job.negate else job.scale)
        if job.dslope_rows != NULL:
            job.dslope_rows[(b * job.Hq + head) * job.Lq + i0 + r] = -get(kr, ws.dslope, r)

cdef inline bint rows_all_finite(const Job *job, Workspace *ws, int *known) noexcept nogil:
    cdef int pairs = ceil_div(ws.rows, job.kernels.pair)
    if known[0] < 0:
        known[0] = (job.kernels.all_finite(ws.q_right, job.D_cols, pairs, job.D_cols)
                    and job.kernels.all_finite(ws.do_right, job.Dv_cols, pairs, job.Dv_cols))
    return known[0]

cdef inline void multiply(const Job *job, const fa_product *x, const fa_selection *which, bint select) noexcept nogil:
    if select:
        job.kernels.accumulate_selected(x, which)
    else:
        job.kernels.accumulate(x)

# dk, dv of one kv head, from their sums in reals.
cdef void store_dkv(const Job *job, int64_t b, int64_t kv_head, const void *dk, const void *dv, int64_t j0,
                    int64_t j1) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef int64_t j
    for j in range(j0, j1):
        if job.dk.dtype != FA_NONE:
            kr.store_row(at(job, &job.dk, b, kv_head) + j * job.dk.row, job.dk.col, job.dk.dtype,
                         reals(job, dk, j * job.D_cols), job.D, -job.scale if job.negate else job.scale)
        if job.dv.dtype != FA_NONE:
            kr.store_row(at(job, &job.dv, b, kv_head) + j * job.dv.row, job.dv.col, job.dv.dtype,
                         reals(job, dv, j * job.Dv_cols), job.Dv, 1)


# dbias for the elements that rows [i0, i0 + Br) and keys [k0, k0 + Bc) of (b0, head0) fall on, over
# everything that is broadcast onto them: other batch entries and heads, and where the bias has one
# row (one column), all rows (keys). Each task owns its elements, so the order of its sum is fixed.
cdef void bias_task(const Job *job, Workspace *ws, int64_t b0, int64_t head0, int64_t i0, int64_t i1,
                    int64_t k_start, int64_t k_end) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef char *target = at(job, &job.dbias, b0, head0)
    cdef int64_t b, head, i, k0, k1, low, high
    cdef int p, state, rows = 0, keys = 0, r, j
    cdef ptrdiff_t tile = <ptrdiff_t> job.Bc * job.panel
    cdef bint one_row = job.dbias.row == 0, one_key = job.dbias.col == 0
    cdef double total
    cdef char *k_base
    cdef char *v_base
    memset(ws.dbias, 0, ceil_div(job.Br, job.panel) * tile * kr.real_bytes)
    for b in range(job.batch):
        for head in range(job.Hq):
            if at(job, &job.dbias, b, head) != target:
                continue
            k_base = at(job, &job.k, b, head // job.group)
            v_base = at(job, &job.v, b, head // job.group)
            i = i0
            while i < i1:
                load_backward_block(job, ws, b, head, i)
                rows = max(rows, ws.rows)
                k0 = k_start
                while k0 < k_end:
                    k1 = min(k0 + job.Bc, job.Lk)
                    keys = max(keys, <int> (k1 - k0))
                    ws.k_left = ws.v_left = NULL
                    for p in range(ws.panels):
                        state = backward_panel(job, ws, p, k_base, v_base, k0, k1, &low, &high)
                        if state != EMPTY:
                            kr.add_tile(reals(job, ws.dbias, p * tile + (low - k0) * job.panel), ws.dp,
                                        (high - low) * job.panel)
                    k0 += job.Bc
                i += job.Br
    # Fold what falls on one element, then round once.
    for r in range(1 if one_row else rows):
        for j in range(1 if one_key else keys):
            total = 0
            fold(job, ws, r, rows if one_row else r + 1, j, keys if one_key else j + 1, &total)
            put(kr, ws.tile_max, 0, total)
            kr.store_row(target + (i0 + r) * job.dbias.row + (k_start + j) * job.dbias.col, 0,
                         job.dbias.dtype, ws.tile_max, 1, 1)

cdef inline void fold(const Job *job, Workspace *ws, int r0, int r1, int j0, int j1, double *total) noexcept nogil:
    cdef int r, j
    for r in range(r0, r1):
        for j in range(j0, j1):
            total[0] += get(job.kernels, ws.dbias, (<ptrdiff_t> (r // job.panel) * job.Bc + j) * job.panel
                            + r % job.panel)


# ---- from a Problem to a Job ----------------------------------------------------------------------------

cdef void set_array(Array *a, cnp.ndarray array, int lead_dims) except *:
    """The last axes of `array` are (head, row, column), (head, row) or (row,), by its ndim."""
    cdef int axis, trailing = cnp.PyArray_NDIM(array) - lead_dims, number = cnp.PyArray_TYPE(array)
    cdef cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    a.data = <char *> cnp.PyArray_DATA(array)
    a.dtype = (FA_F32 if number == cnp.NPY_FLOAT else FA_F64 if number == cnp.NPY_DOUBLE else
               FA_F16 if number == cnp.NPY_FLOAT16 else FA_BOOL if number == cnp.NPY_BOOL else FA_BF16)
    for axis in range(lead_dims):
        a.lead[axis] = strides[axis]
    a.head = strides[lead_dims] if trailing > 1 else 0
    a.row = strides[lead_dims + trailing - 2] if trailing > 2 else strides[lead_dims + trailing - 1]
    a.col = strides[lead_dims + 2] if trailing > 2 else 0

cdef void set_optional(Array *a, array, int lead_dims) except *:
    if array is None:
        a.dtype = FA_NONE
    else:
        set_array(a, array, lead_dims)

cdef const int64_t *int64_data(array) except? NULL:
    return NULL if array is None else <const int64_t *> cnp.PyArray_DATA(<cnp.ndarray> array)

cdef void *data_or_null(array) except? NULL:
    return NULL if array is None else cnp.PyArray_DATA(<cnp.ndarray> array)

cdef bint lies_whole(const Job *job, const Array *a, int cols) noexcept nogil:
    """Whether rows of `a` are rows of whole units side by side, to be read where they lie."""
    cdef const fa_kernels *kr = job.kernels
    cdef int native = FA_F64 if kr.real_bytes == 8 else FA_F32 if kr.pair == 1 else FA_BF16
    return (a.dtype == native and a.col == kr.unit_bytes // kr.pair and a.row % kr.unit_bytes == 0
            and cols % kr.pair == 0)

cdef void fill_job(Job *job, problem, bint backward) except *:
    cdef const fa_kernels *kr = kernels_for(problem.dtype)
    cdef int axis, lanes = kr.lanes, rows
    cdef double scale = problem.scale, dropout_p = problem.dropout_p
    lead = problem.lead
    job.kernels = kr
    job.is_backward = backward
    job.lead_dims = <int> len(lead)
    for axis in range(job.lead_dims):
        job.lead[axis] = lead[axis]
    job.batch = problem.batch
    job.Hq = problem.Hq
    job.Hkv = problem.Hkv
    job.group = max(1, <int64_t> problem.group)
    job.Lq = problem.Lq
    job.Lk = problem.Lk
    job.D = problem.D
    job.Dv = problem.Dv
    job.D_units = ceil_div(job.D, kr.pair)
    job.Dv_units = ceil_div(job.Dv, kr.pair)
    job.D_cols = ceil_div(job.D, lanes) * lanes
    job.Dv_cols = ceil_div(job.Dv, lanes) * lanes
    set_array(&job.q, problem.q, job.lead_dims)
    set_array(&job.k, problem.k, job.lead_dims)
    set_array(&job.v, problem.v, job.lead_dims)
    set_optional(&job.attn_mask, problem.attn_mask, job.lead_dims)
    set_optional(&job.bias, problem.bias, job.lead_dims)
    set_optional(&job.q_segment_ids, problem.q_segment_ids, job.lead_dims)
    set_optional(&job.kv_segment_ids, problem.kv_segment_ids, job.lead_dims)
    job.dlse.dtype = job.dq.dtype = job.dk.dtype = job.dv.dtype = job.dbias.dtype = FA_NONE
    job.dsink_rows = job.dslope_rows = NULL
    left, right = problem.window_left, problem.window_right
    job.bounded_left = left is not None
    job.bounded_right = right is not None
    job.left = left if job.bounded_left else 0
    job.right = right if job.bounded_right else 0
    job.offset = int64_data(problem.causal_offset)
    job.q_lens = int64_data(problem.q_lens)
    job.kv_lens = int64_data(problem.kv_lens)
    job.slopes = data_or_null(problem.alibi_slopes)
    job.sinks = data_or_null(problem.sinks)
    job.negate = scale < 0
    job.scale = -scale if job.negate else scale
    job.softcap = problem.softcap
    job.seed = problem.seed
    # ceil(p 2^32) <= 2^32; p = 1 keeps nothing, whatever the factor.
    job.threshold = <uint64_t> math.ceil(dropout_p * 4294967296.0)
    job.drop_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0
    # Unfinished scores let softmax apply the scale, as (s - max) scale: out of range for the extremes.
    job.adjusted = (job.softcap != 0 or job.attn_mask.dtype < FA_BOOL or job.bias.dtype < FA_BOOL
                    or job.slopes != NULL or not 1e-30 < job.scale < 1e30)

    job.Bc = kr.Bc_backward if backward else kr.Bc
    job.Br = kr.Br_backward if backward else kr.Br
    if job.D + job.Dv > 512:  # the block's q and o stay about as large
        job.Br = max(2 * lanes, job.Br * 512 // (job.D + job.Dv) // (2 * lanes) * (2 * lanes))
    # Short rows of the heads that share keys are taken together.
    job.stack = 1
    if not backward and 0 < job.Lq <= job.Br // 2:
        job.stack = <int> clamp(job.Br // job.Lq, 1, job.group)
    rows = <int> min(job.Br, job.stack * job.Lq)
    job.Br = max(1, rows)
    job.panel = lanes if rows <= lanes else 2 * lanes
    job.blocks = (ceil_div(job.group, job.stack) if job.stack > 1 else
                  job.group * ceil_div(job.Lq, job.Br))
    job.Bc = <int> clamp((job.Lk + 3) // 4 * 4, 4, job.Bc)
    job.k_in_place = lies_whole(job, &job.k, job.D)
    # v is a right operand forward (whole vectors), a left one backward.
    job.v_in_place = lies_whole(job, &job.v, job.Dv) and (
        backward or (kr.pair == 1 and job.Dv == job.Dv_cols))


cdef int team_size(const Job *job, int threads, int64_t items) noexcept nogil:
    """Threads worth waking: one for each half million multiply-adds, and no more than items."""
    cdef double work = <double> job.batch * job.Hq * job.Lq * job.Lk * (job.D + job.Dv)
    return <int> max(1, min(<double> threads, min(<double> items, 1 + work / 524288)))

cdef Workspace *make_workspaces(const Job *job, int threads, size_t extra, char **memory) except NULL:
    """One Workspace a thread, with `extra` bytes behind each; free memory[0] once, after use."""
    cdef Workspace probe
    cdef size_t each = lay_out(job, &probe, NULL), structs = (threads * sizeof(Workspace) + 63) // 64 * 64
    cdef size_t total = structs + threads * (each + extra)
    cdef Workspace *spaces
    cdef void *block = NULL
    cdef int t
    if posix_memalign(&block, 64, total) != 0:
        raise MemoryError(f"no memory for the workspace of {threads} threads, {total} bytes")
    memory[0] = <char *> block
    spaces = <Workspace *> block
    for t in range(threads):
        lay_out(job, &spaces[t], memory[0] + structs + t * (each + extra))
        spaces[t].own = memory[0] + structs + t * (each + extra) + each
    return spaces


def forward(problem, cnp.ndarray out not None, cnp.ndarray lse not None):
    """Fill out, of q's dtype or float32, and lse, of the accumulation dtype; any strides."""
    cdef Job job
    cdef char *memory = NULL
    cdef Workspace *spaces
    cdef int64_t items, i
    cdef int team
    fill_job(&job, problem, False)
    set_array(&job.out, out, job.lead_dims)
    set_array(&job.lse, lse, job.lead_dims)
    job.lse.col = 0
    items = job.batch * job.Hkv * job.blocks
    if items == 0:
        return
    team = team_size(&job, num_threads_for(problem.num_threads), items)
    spaces = make_workspaces(&job, team, 0, &memory)
    with nogil:
        if team == 1:
            for i in range(items):
                forward_block(&job, spaces, i)
        else:
            for i in prange(items, schedule="dynamic", chunksize=1, num_threads=team):
                forward_block(&job, spaces + threadid(), i)
        free(memory)


def backward(problem, cnp.ndarray dout not None, cnp.ndarray out not None, cnp.ndarray lse not None, dlse,
             dq, dk, dv, dbias, dsinks, dalibi_slopes):
    """Fill the gradients that are not None; see fastattn._backends.Backend."""
    cdef Job job
    cdef int threads
    fill_job(&job, problem, True)
    set_array(&job.dout, dout, job.lead_dims)
    set_array(&job.out, out, job.lead_dims)
    set_array(&job.lse, lse, job.lead_dims)
    set_optional(&job.dlse, dlse, job.lead_dims)
    set_optional(&job.dq, dq, job.lead_dims)
    set_optional(&job.dk, dk, job.lead_dims)
    set_optional(&job.dv, dv, job.lead_dims)
    job.want_dkv = dk is not None or dv is not None
    rows_shape = job.batch, job.Hq, job.Lq
    sink_sums = slope_sums = None
    if dsinks is not None:
        sink_sums = numpy.zeros(rows_shape)
        job.dsink_rows = <double *> cnp.PyArray_DATA(<cnp.ndarray> sink_sums)
    if dalibi_slopes is not None:
        slope_sums = numpy.zeros(rows_shape)
        job.dslope_rows = <double *> cnp.PyArray_DATA(<cnp.ndarray> slope_sums)
    threads = num_threads_for(problem.num_threads)
    if job.want_dkv or dq is not None or dsinks is not None or dalibi_slopes is not None:
        backward_heads(&job, threads)
    if dsinks is not None:
        dsinks[...] = sink_sums.sum(axis=(0, 2))
    if dalibi_slopes is not None:
        dalibi_slopes[...] = slope_sums.sum(axis=(0, 2))
    if dbias is not None:
        set_array(&job.dbias, dbias, job.lead_dims)
        backward_bias(&job, threads, list(zip(dbias.shape, dbias.strides))[:dbias.ndim - 2])


cdef void backward_heads(const Job *job, int threads) except *:
    cdef const fa_kernels *kr = job.kernels
    cdef int64_t heads = job.batch * job.Hkv, alone, h, block
    cdef size_t dk_bytes = <size_t> job.Lk * job.D_cols * kr.real_bytes * job.want_dkv
    cdef size_t dv_bytes = <size_t> job.Lk * job.Dv_cols * kr.real_bytes * job.want_dkv
    cdef int team = team_size(job, threads, heads * max(1, job.blocks))
    cdef char *memory = NULL
    cdef Workspace *spaces
    cdef int64_t *passed
    cdef char *sums
    if heads == 0:
        return
    # Each thread takes whole heads while there are enough for all; the rest are shared.
    alone = heads // team * team
    spaces = make_workspaces(job, team, dk_bytes + dv_bytes, &memory)
    if posix_memalign(<void **> &passed, 64, (job.blocks + 1) * sizeof(int64_t)) != 0:
        free(memory)
        raise MemoryError(f"no memory for {job.blocks} counters")
    with nogil:
        if team == 1:
            for h in range(heads):
                backward_head(job, spaces, h, dk_bytes, dv_bytes)
        else:
            for h in prange(alone, schedule="dynamic", chunksize=1, num_threads=team):
                backward_head(job, spaces + threadid(), h, dk_bytes, dv_bytes)
            sums = spaces[0].own
            for h in range(alone, heads):
                memset(passed, 0xff, (job.blocks + 1) * sizeof(int64_t))  # -1: at no key yet
                passed[0] = job.Lk + 1
                memset(sums, 0, dk_bytes + dv_bytes)
                # Blocks are begun in order, so that the one waited for is always under way.
                for block in prange(job.blocks, schedule="dynamic", chunksize=1, num_threads=team):
                    backward_block(job, spaces + threadid(), h // job.Hkv, h % job.Hkv, block, sums,
                                   sums + dk_bytes, passed + block, passed + block + 1)
                for block in prange(ceil_div(job.Lk, job.Bc), num_threads=team):
                    store_dkv(job, h // job.Hkv, h % job.Hkv, sums, sums + dk_bytes, block * job.Bc,
                              min(job.Lk, (block + 1) * job.Bc))
        free(passed)
        free(memory)

cdef void backward_head(const Job *job, Workspace *ws, int64_t h, size_t dk_bytes, size_t dv_bytes) noexcept nogil:
    cdef char *sums = ws.own
    cdef int64_t block
    memset(sums, 0, dk_bytes + dv_bytes)
    for block in range(job.blocks):
        backward_block(job, ws, h // job.Hkv, h % job.Hkv, block, sums, sums + dk_bytes, NULL, NULL)
    store_dkv(job, h // job.Hkv, h % job.Hkv, sums, sums + dk_bytes, 0, job.Lk)


cdef void backward_bias(const Job *job, int threads, axes) except *:
    """dbias, a task for every tile of its own elements; axes are (size, stride) of its leading axes and heads."""
    cdef int64_t row_tasks, key_tasks, tasks, t
    cdef int64_t row_span, key_span
    cdef char *memory = NULL
    cdef Workspace *spaces
    cdef int64_t[::1] owners
    cdef int team
    # (b, head) pairs that own elements: index 0 along every axis that is broadcast.
    owner = numpy.zeros((1,), numpy.int64)
    for size, stride in axes:
        steps = numpy.arange(size if stride != 0 else min(size, 1), dtype=numpy.int64)
        owner = (owner[:, None] * size + steps).ravel()
    owners = owner
    row_tasks = 1 if job.dbias.row == 0 else ceil_div(job.Lq, job.Br)
    key_tasks = 1 if job.dbias.col == 0 else ceil_div(job.Lk, job.Bc)
    tasks = len(owners) * row_tasks * key_tasks
    if tasks == 0:
        return
    team = team_size(job, threads, tasks)
    spaces = make_workspaces(job, team, 0, &memory)
    row_span = job.Lq if job.dbias.row == 0 else job.Br
    key_span = job.Lk if job.dbias.col == 0 else job.Bc
    with nogil:
        if team == 1:
            for t in range(tasks):
                run_bias_task(job, spaces, &owners[0], t, row_tasks, key_tasks, row_span, key_span)
        else:
            for t in prange(tasks, schedule="dynamic", chunksize=1, num_threads=team):
                run_bias_task(job, spaces + threadid(), &owners[0], t, row_tasks, key_tasks, row_span, key_span)
        free(memory)

cdef void run_bias_task(const Job *job, Workspace *ws, const int64_t *owners, int64_t t, int64_t row_tasks,
                        int64_t key_tasks, int64_t row_span, int64_t key_span) noexcept nogil:
    cdef int64_t owner = owners[t // (row_tasks * key_tasks)]
    cdef int64_t i0 = t // key_tasks % row_tasks * row_span, k0 = t % key_tasks * key_span
    bias_task(job, ws, owner // job.Hq, owner % job.Hq, i0, min(job.Lq, i0 + row_span), k0,
              min(job.Lk, k0 + key_span))


# ---- which kernels, how many threads ------------------------------------------------------------------------

cdef const fa_isa *isa_in_use = NULL

cdef const fa_isa *find_isa(name, who) except NULL:
    cdef int i
    for i in range(fa_isa_count):
        if fa_isas[i].name.decode() == name:
            missing = fa_isa_missing(fa_isas[i].name).decode()
            if missing:
                raise RuntimeError(f"{who} is {name!r}, which cannot run here: this machine lacks {missing}")
            return &fa_isas[i]
    names = ", ".join(row["name"] for row in isa_table())
    raise ValueError(f"{who} is {name!r}; expected one of: {names}")

cdef const fa_isa *isa() except NULL:
    """FASTATTN_CPU_ISA, else the highest that runs here; looked up once."""
    global isa_in_use
    cdef int i
    if isa_in_use == NULL:
        forced = os.environ.get("FASTATTN_CPU_ISA")
        if forced is not None:
            isa_in_use = find_isa(forced, "FASTATTN_CPU_ISA")
        else:
            for i in range(fa_isa_count):
                if fa_isa_missing(fa_isas[i].name)[0] == 0:
                    isa_in_use = &fa_isas[i]
    return isa_in_use

cdef const fa_kernels *kernels_for(str dtype) except NULL:
    cdef const fa_isa *chosen = isa()
    if dtype == "float64":
        return chosen.f64
    if dtype == "bfloat16" and chosen.bf16 != NULL:
        return chosen.bf16
    return chosen.f32

def current_isa():
    """The name of the ISA whose kernels run; ValueError or RuntimeError for a bad FASTATTN_CPU_ISA."""
    return isa().name.decode()

def use_isa(name):
    """Run the kernels of another ISA from now on; returns the name of the one before."""
    global isa_in_use
    before = current_isa()
    isa_in_use = find_isa(name, "name")
    return before

def isa_table():
    """Every ISA that was built, lowest rank first: name, requires, missing ("" if it runs here)."""
    return [dict(name=fa_isas[i].name.decode(), requires=fa_isas[i].requires.decode(),
                 missing=fa_isa_missing(fa_isas[i].name).decode()) for i in range(fa_isa_count)]

def kernel_table():
    """Every kernel set: isa, dtype, and its tile sizes."""
    rows = []
    cdef int i
    for i in range(fa_isa_count):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            rows.append(dict(isa=fa_isas[i].name.decode(), dtype=dtype, **kernel_row(&fa_isas[i], dtype)))
    return rows

cdef dict kernel_row(const fa_isa *of, dtype):
    cdef const fa_kernels *kr = of.f64 if dtype == "float64" else of.f32
    if dtype == "bfloat16" and of.bf16 != NULL:
        kr = of.bf16
    return dict(arithmetic=kr.type.decode(), lanes=kr.lanes, Br=kr.Br, Bc=kr.Bc, Br_backward=kr.Br_backward,
                Bc_backward=kr.Bc_backward, MR=kr.MR, NR=kr.NR)


cdef int threads_set = 0
cdef bint in_forked_child = False

def _after_fork_in_child():
    # libgomp's threads are not there any more, and it would wait for them for ever.
    global in_forked_child
    in_forked_child = not POOL_SURVIVES_FORK

os.register_at_fork(after_in_child=_after_fork_in_child)

def forked():
    """Whether this process was forked from one that had loaded the package, and so has one thread."""
    return in_forked_child

def _quota():
    """CPUs that the container's quota (cgroup v2 or v1) allows, or infinity."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        try:
            with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
                quota = file.read().strip()
            with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
                period = file.read()
        except OSError:
            return math.inf
    if quota in ("max", "-1"):
        return math.inf
    return max(1, math.ceil(int(quota) / int(period)))

cpu_quota = _quota()
cdef double quota_at_import = cpu_quota

cdef int num_threads_for(requested) except -1:
    if in_forked_child:
        return 1
    if requested is not None:
        return requested
    return get_num_threads()

cpdef int get_num_threads() except -1:
    """The number of threads of a call that does not say: set_num_threads, else OpenMP's maximum
    now, capped by the process's affinity and the container's quota."""
    if in_forked_child:
        return 1
    if threads_set:
        return threads_set
    return <int> max(1, min(openmp.omp_get_max_threads(), min(openmp.omp_get_num_procs(), quota_at_import)))

def set_num_threads(int n):
    """Threads of the calls to come; 0 goes back to OpenMP's own number."""
    global threads_set
    threads_set = n


def peak_flops(str dtype, int num_threads, double seconds):
    """Floating point operations per second of multiply-adds (dot products for "bfloat16" where the
    ISA in use has them) on registers alone, all threads together."""
    cdef const fa_kernels *kr = kernels_for(dtype)
    cdef int64_t iterations = 20000
    cdef double flops = 0, start, end, sink = 0
    cdef int t
    with nogil:
        start = openmp.omp_get_wtime()
        end = start
        while end - start < seconds:
            for t in prange(num_threads, num_threads=num_threads, schedule="static", chunksize=1):
                flops += peak_once(kr, iterations)
            end = openmp.omp_get_wtime()
    return flops / (end - start)

cdef double peak_once(const fa_kernels *kr, int64_t iterations) noexcept nogil:
    cdef double sink = 0
    return kr.peak(iterations, &sink) + 0 * sink
