# One call as the threads see it: the Job, made from a Problem; a Workspace a thread; blocks of query
# rows; and which pairs of a tile take part.

# ---- the job: everything a thread needs to know, fixed for one call ------------------------------

cdef enum:
    MAX_LEAD = 64
    CHUNK = 512  # keys of a chunk, at least
    WANTED_KEYS = 256  # of the next heads, with that many columns: within the second level of cache
    WANTED_COLUMNS = 256
    MAX_CHUNKS = 64
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
    bint few                   # rows of a block fill half a vector at most: few_scores
    int ahead                  # rows of k and v to fetch ahead where few rows of q stream them
    int64_t chunk, chunks      # keys are cut into chunks whose results are merged in order
    bint k_in_place, v_in_place
    bint turned                # the forward's usual pass keeps its sums turned
    bint k_raw, v_raw          # the products with few rows take them as they lie
    bint wants_next            # short sequences: the next ones are fetched while these are computed
    # backward
    bint is_backward
    double *dsink_rows         # (Hq, batch, Lq) or NULL
    double *dslope_rows

# What the rows of a panel see: some of them keys [first, end), all of them keys [all_from, all_to).
cdef struct Span:
    int64_t first, end, all_from, all_to
    int64_t low_segment, high_segment
    bint begun                 # forward: its turned sums hold something

# Query rows [row, row + rows) of a few heads that share a key head.
cdef struct Block:
    int64_t b, kv_head, head, row
    int heads, rows

# One thread's memory. Arrays over rows have an entry for every lane of the block's panels.
cdef struct Workspace:
    void *q_lanes
    void *o                    # backward: dq
    void *s
    void *p
    void *k_tile
    void *v_tile
    void *scratch
    uint32_t *keep
    uint32_t *drop
    int32_t *row_start         # the keys of the tile, in units, that a row may see
    int32_t *row_end
    void *row_max
    void *row_sum
    void *row_lost
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
    int32_t *panel_start       # the keys of the tile that a panel may see
    int32_t *panel_end
    int32_t *key_start         # the rows of the block, in units, that may see a key of the tile
    int32_t *key_end
    double *dbias
    fa_fetch fetch[5]          # what is wanted next
    int fetches, fetch_rows
    # rows of the block at hand
    int64_t b
    int rows, panels
    int64_t first_key, end_key          # keys that any row sees
    int64_t *pos
    int64_t *seg
    int64_t *key_from
    int64_t *key_to
    Span *span                          # of each panel
    int64_t seen_from, seen_to, low_segment, high_segment  # segments of the keys looked at last
    uint32_t *pos32
    uint32_t *head
    const char **row
    const char **add_row[2]             # of the tile's additive masks
    # tiles at hand
    const void *k_left
    const void *v_left
    const void *v_right
    ptrdiff_t ldk, ldv
    bint *settled              # forward: rows whose result is stored
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

cdef inline int64_t ceil_div(int64_t a, int64_t b) noexcept nogil:
    return (a + b - 1) // b


# Lays the workspace out from `base`; with base NULL, only tells its size.
cdef size_t lay_out(const Job *job, Workspace *ws, char *base) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef size_t used = 0
    cdef size_t real = kr.real_bytes, unit = kr.unit_bytes, Bc = job.Bc
    cdef size_t panels = ceil_div(job.Br, job.panel), rows = panels * job.panel, tile = Bc * job.panel
    cdef size_t key_pairs = ceil_div(Bc, kr.pair), query_pairs = ceil_div(rows, kr.pair)
    cdef int a

    ws.q_lanes = carve(base, &used, rows * query_ld(job) * unit)
    ws.o = carve(base, &used, rows * real * (job.D_cols if job.is_backward else job.Dv_cols))
    ws.s = carve(base, &used, tile * real)
    ws.k_tile = carve(base, &used, 0 if job.k_in_place else Bc * key_ld(job) * unit)
    ws.keep = <uint32_t *> carve(base, &used, panels * Bc * sizeof(uint32_t))
    ws.drop = <uint32_t *> carve(base, &used, Bc * sizeof(uint32_t))
    ws.row_start = <int32_t *> carve(base, &used, max(rows, <size_t> FA_MAX_PANEL) * sizeof(int32_t))
    ws.row_end = <int32_t *> carve(base, &used, max(rows, <size_t> FA_MAX_PANEL) * sizeof(int32_t))
    ws.tile_max = carve(base, &used, job.panel * real)
    ws.slope = carve(base, &used, job.panel * real)
    ws.centre = carve(base, &used, job.panel * real)
    if job.is_backward:
        ws.p = carve(base, &used, Bc * query_pairs * unit)
        ws.ds = carve(base, &used, Bc * query_pairs * unit)
        ws.ds_keys = carve(base, &used, key_pairs * rows * unit if kr.pair == 2 else 0)
        ws.dp = carve(base, &used, tile * real)
        ws.gain = carve(base, &used, tile * real if job.softcap != 0 else 0)
        ws.do_lanes = carve(base, &used, rows * job.Dv_units * unit)
        ws.q_right = carve(base, &used, query_pairs * job.D_cols * unit)
        ws.do_right = carve(base, &used, query_pairs * job.Dv_cols * unit)
        ws.k_right = carve(base, &used, key_pairs * job.D_cols * unit)
        ws.v_tile = carve(base, &used, 0 if job.v_in_place else Bc * job.Dv_units * unit)
        ws.scratch = carve(base, &used, max(key_pairs, query_pairs) * max(job.D_cols, job.Dv_cols) * unit)
        ws.lse = carve(base, &used, rows * real)
        ws.shift = carve(base, &used, rows * real)
        ws.dslope = carve(base, &used, rows * real)
        ws.panel_start = <int32_t *> carve(base, &used, panels * sizeof(int32_t))
        ws.panel_end = <int32_t *> carve(base, &used, panels * sizeof(int32_t))
        ws.key_start = <int32_t *> carve(base, &used, Bc * sizeof(int32_t))
        ws.key_end = <int32_t *> carve(base, &used, Bc * sizeof(int32_t))
        ws.dbias = <double *> carve(base, &used, panels * tile * 8 if job.dbias.dtype != FA_NONE else 0)
    else:
        ws.p = carve(base, &used, key_pairs * job.panel * unit) if kr.pair == 2 else ws.s
        ws.v_tile = carve(base, &used, 0 if job.v_in_place else key_pairs * job.Dv_cols * unit)
        ws.scratch = carve(base, &used, max(key_pairs, <size_t> job.panel) * job.Dv_cols * unit)
        ws.row_max = carve(base, &used, rows * real)
        ws.row_sum = carve(base, &used, rows * real)
        ws.row_lost = carve(base, &used, rows * real)
        ws.settled = <bint *> carve(base, &used, rows * sizeof(bint))
        ws.alpha = carve(base, &used, job.panel * real)
    ws.pos = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.seg = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.key_from = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.key_to = <int64_t *> carve(base, &used, rows * sizeof(int64_t))
    ws.span = <Span *> carve(base, &used, panels * sizeof(Span))
    ws.pos32 = <uint32_t *> carve(base, &used, rows * sizeof(uint32_t))
    ws.head = <uint32_t *> carve(base, &used, rows * sizeof(uint32_t))
    ws.row = <const char **> carve(base, &used, max(rows, Bc + FA_AHEAD) * sizeof(char *))
    for a in range(2):
        ws.add_row[a] = <const char **> carve(base, &used, job.panel * sizeof(char *))
    return used

cdef inline void *carve(char *base, size_t *used, size_t size) noexcept nogil:
    cdef size_t start = used[0]
    used[0] = start + (size + 63) // 64 * 64
    return base + start if base != NULL else NULL


# A copy of keys as reals has whole vectors, so that it is a right operand too.
cdef inline int key_ld(const Job *job) noexcept nogil:
    return job.D_cols if job.kernels.pair == 1 else query_ld(job)

# Few rows of q meet those of k in whole vectors.
cdef inline int query_ld(const Job *job) noexcept nogil:
    return <int> ceil_div(job.D_units, job.kernels.lanes) * job.kernels.lanes if job.few else job.D_units


# ---- threads -------------------------------------------------------------------------------------

ctypedef void (*work_fn)(const Job *job, Workspace *ws, int64_t item, const void *more) noexcept nogil

# Items are begun in order, whatever OpenMP is underneath: one may wait for those before it.
cdef void run(const Job *job, Workspace *spaces, int team, int64_t items, work_fn work,
              const void *more) noexcept nogil:
    cdef int64_t following = 0, item
    cdef int t
    if team == 1:
        enter(job)
        for item in range(items):
            work(job, spaces, item, more)
        leave(job)
    else:
        for t in prange(team, num_threads=team, schedule="static", chunksize=1):
            drain(job, spaces + t, items, work, more, &following)

cdef void drain(const Job *job, Workspace *ws, int64_t items, work_fn work, const void *more,
                int64_t *following) noexcept nogil:
    cdef int64_t item = fa_next(following)
    enter(job)
    while item < items:
        work(job, ws, item, more)
        item = fa_next(following)
    leave(job)

cdef inline void enter(const Job *job) noexcept nogil:
    if job.kernels.enter != NULL:
        job.kernels.enter()

cdef inline void leave(const Job *job) noexcept nogil:
    if job.kernels.leave != NULL:
        job.kernels.leave()


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

cdef void *data_or_null(array) except? NULL:
    return NULL if array is None else cnp.PyArray_DATA(<cnp.ndarray> array)

cdef const int64_t *int64_data(array) except? NULL:
    return <const int64_t *> data_or_null(array)

cdef bint lies_whole(const Job *job, const Array *a, int cols) noexcept nogil:
    """Whether rows of `a` are rows of whole units side by side, to be read where they lie."""
    cdef const fa_kernels *kr = job.kernels
    cdef int native = FA_F64 if kr.real_bytes == 8 else FA_F32 if kr.pair == 1 else FA_BF16
    return (a.dtype == native and a.col == kr.unit_bytes // kr.pair and a.row % kr.unit_bytes == 0
            and cols % kr.pair == 0)

cdef inline bint takes_raw(const Job *job, const Array *a) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    return job.few and a.dtype == kr.raw and a.col == 2 and a.row % kr.unit_bytes == 0

cdef inline bint lies_side_by_side(const Array *a) noexcept nogil:
    return a.col == (8 if a.dtype == FA_F64 else 4 if a.dtype == FA_F32 else 2)

cdef void fill_job(Job *job, problem, bint backward) except *:
    cdef const fa_kernels *kr
    cdef int axis, lanes, rows
    cdef int64_t D, Dv, row_bytes
    cdef double scale, dropout_p
    # Problem's fields in its order: by name each would take as long as the rest of a small call.
    (lead, job.batch, job.Hq, job.Hkv, job.group, job.Lq, job.Lk, D, Dv, dtype, _, q, k, v, attn_mask,
     bias, left, right, causal_offset, q_lens, kv_lens, q_segment_ids, kv_segment_ids, scale, job.softcap,
     alibi_slopes, sinks, dropout_p, job.seed, _, _) = <tuple> problem
    kr = kernels_for(dtype)
    lanes = kr.lanes
    job.kernels = kr
    job.is_backward = backward
    job.lead_dims = <int> len(lead)
    for axis in range(job.lead_dims):
        job.lead[axis] = lead[axis]
    job.group = max(1, job.group)
    if max(D, Dv) > 1 << 30:
        raise MemoryError(f"no memory for rows of D = {D} and Dv = {Dv} elements")
    job.D = D
    job.Dv = Dv
    job.D_units = ceil_div(ceil_div(job.D, kr.pair), kr.scores_step) * kr.scores_step
    job.Dv_units = ceil_div(ceil_div(job.Dv, kr.pair), kr.scores_step) * kr.scores_step
    job.D_cols = ceil_div(job.D, lanes) * lanes
    job.Dv_cols = ceil_div(job.Dv, lanes) * lanes
    set_array(&job.q, q, job.lead_dims)
    set_array(&job.k, k, job.lead_dims)
    set_array(&job.v, v, job.lead_dims)
    set_optional(&job.attn_mask, attn_mask, job.lead_dims)
    set_optional(&job.bias, bias, job.lead_dims)
    set_optional(&job.q_segment_ids, q_segment_ids, job.lead_dims)
    set_optional(&job.kv_segment_ids, kv_segment_ids, job.lead_dims)
    job.dlse.dtype = job.dq.dtype = job.dk.dtype = job.dv.dtype = job.dbias.dtype = FA_NONE
    job.dsink_rows = job.dslope_rows = NULL
    job.bounded_left = left is not None
    job.bounded_right = right is not None
    job.left = left if job.bounded_left else 0
    job.right = right if job.bounded_right else 0
    job.offset = int64_data(causal_offset)
    job.q_lens = int64_data(q_lens)
    job.kv_lens = int64_data(kv_lens)
    job.slopes = data_or_null(alibi_slopes)
    job.sinks = data_or_null(sinks)
    job.negate = scale < 0
    job.scale = -scale if job.negate else scale
    # ceil(p 2^32) <= 2^32; p = 1 keeps nothing, whatever the factor.
    job.threshold = <uint64_t> ceil(dropout_p * 4294967296.0)
    job.drop_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0
    # Unfinished scores let softmax apply the scale, as (s - max) scale: out of range for the extremes.
    job.adjusted = (job.softcap != 0 or job.attn_mask.dtype < FA_BOOL or job.bias.dtype < FA_BOOL
                    or job.slopes != NULL or not 1e-30 < job.scale < 1e30)

    job.Bc = kr.Bc_backward if backward else kr.Bc
    job.Br = kr.Br_backward if backward else kr.Br
    # dk and dv of a long sequence lie outside the caches, and are added to once a block.
    if backward and kr.real_bytes == 4 and job.Lq >= 1536:
        job.Br += job.Br // 2
    row_bytes = (job.D + job.Dv) * kr.real_bytes
    if row_bytes > 2048:  # the block's q and o stay about as large
        job.Br = max(2 * lanes, job.Br * 2048 // row_bytes // (2 * lanes) * (2 * lanes))
    # Short rows of the heads that share keys are taken together.
    job.stack = 1
    if not backward and 0 < job.Lq <= job.Br // 2:
        job.stack = <int> clamp(job.Br // job.Lq, 1, job.group)
    rows = <int> min(job.Br, job.stack * job.Lq)
    job.Br = max(1, rows)
    job.panel = lanes if rows <= lanes else 2 * lanes
    job.blocks = (ceil_div(job.group, job.stack) if job.stack > 1 else
                  job.group * ceil_div(job.Lq, job.Br)) if job.Hq > 0 else 0
    job.Bc = <int> clamp((job.Lk + FA_RUN - 1) // FA_RUN * FA_RUN, FA_RUN, job.Bc)
    job.few = not backward and rows <= lanes // 2
    job.ahead = FA_AHEAD if not backward and rows <= lanes else 0
    # Rows of a head that are one block have few items to offer. Chunks are cut by Lk alone.
    job.chunk = max(1, job.Lk)
    if not backward and job.Lq <= job.Br and job.Lk >= 2 * CHUNK:
        job.chunk = max(CHUNK, ceil_div(ceil_div(job.Lk, MAX_CHUNKS), job.Bc) * job.Bc)
    job.chunks = max(1, ceil_div(job.Lk, job.chunk))
    job.wants_next = (not backward and not job.few and job.chunks == 1 and job.Lk <= WANTED_KEYS
                      and job.D + job.Dv <= WANTED_COLUMNS and lies_side_by_side(&job.q)
                      and lies_side_by_side(&job.k) and lies_side_by_side(&job.v))
    job.k_in_place = lies_whole(job, &job.k, job.D) and job.D == query_ld(job) * kr.pair
    job.k_raw = kr.pair == 1 and takes_raw(job, &job.k) and job.D == query_ld(job)
    job.k_in_place = job.k_in_place or job.k_raw
    # v is a right operand forward (whole vectors), a left one backward.
    job.turned = not backward and not job.few and kr.pack_turned != NULL
    job.v_in_place = lies_whole(job, &job.v, job.Dv) and (
        job.Dv == job.Dv_units * kr.pair if backward else (kr.pair == 1 and job.Dv == job.Dv_cols))
    job.v_raw = takes_raw(job, &job.v) and job.Dv == job.Dv_cols


cdef int team_size(const Job *job, num_threads, int64_t items) except -1:
    """Threads worth waking: one for each half million multiply-adds, no more than items, and never
    so many that the system might refuse them, for which GCC's OpenMP ends the process."""
    cdef double work = <double> job.batch * job.Hq * job.Lq * job.Lk * (job.D + job.Dv)
    cdef double most = min(<double> items, 1 + work / 524288)
    if most < 2:  # before the system is asked for what this process may use
        return 1
    return <int> min(<double> min(num_threads_for(num_threads), max(64, 4 * openmp.omp_get_num_procs())), most)

cdef Workspace *make_workspaces(const Job *job, int threads, double extra_bytes, char **memory) except NULL:
    """One Workspace a thread, with `extra_bytes` behind each; free memory[0] once, after use."""
    cdef Workspace probe
    cdef size_t each = lay_out(job, &probe, NULL), structs = (threads * sizeof(Workspace) + 63) // 64 * 64
    cdef double total = structs + threads * (each + extra_bytes)
    cdef size_t extra = <size_t> extra_bytes if total < SIZE_MAX // 2 else 0
    cdef Workspace *spaces
    cdef void *block = NULL
    cdef int t
    if total > SIZE_MAX // 2 or posix_memalign(&block, 64, <size_t> total) != 0:
        raise MemoryError(f"no memory for the workspace of {threads} threads, {total:.0f} bytes")
    memory[0] = <char *> block
    spaces = <Workspace *> block
    for t in range(threads):
        lay_out(job, &spaces[t], memory[0] + structs + t * (each + extra))
        spaces[t].own = memory[0] + structs + t * (each + extra) + each
    return spaces


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

# What the panels see, once key_from and key_to of the rows are settled.
cdef void set_spans(const Job *job, Workspace *ws) noexcept nogil:
    cdef int p, r
    cdef Span *span
    ws.seen_from = ws.seen_to = -1
    for p in range(ws.panels):
        span = ws.span + p
        span.first = span.all_to = job.Lk
        span.end = span.all_from = 0
        for r in range(p * job.panel, min((p + 1) * job.panel, ws.rows)):
            if ws.key_to[r] > ws.key_from[r]:
                span.first = min(span.first, ws.key_from[r])
                span.end = max(span.end, ws.key_to[r])
            span.all_from = max(span.all_from, ws.key_from[r])
            span.all_to = min(span.all_to, ws.key_to[r])
        if job.q_segment_ids.dtype != FA_NONE:
            span.low_segment = span.high_segment = ws.seg[p * job.panel]
            for r in range(p * job.panel, min((p + 1) * job.panel, ws.rows)):
                span.low_segment = min(span.low_segment, ws.seg[r])
                span.high_segment = max(span.high_segment, ws.seg[r])

# Pointers into `a`, left in `row`, for rows [r0, r0 + n) of the block, at column `col`; rows that see no
# key at all are not read.
cdef fa_rows block_rows(const Job *job, const Workspace *ws, const Array *a, int r0, int n, int64_t col,
                        int cols, bint dead_too, const char **row) noexcept nogil:
    cdef fa_rows rows
    cdef char *base = NULL
    cdef int r
    cdef int64_t head = -1
    for r in range(r0, r0 + n):
        if ws.head[r] != head:
            head = ws.head[r]
            base = at(job, a, ws.b, head)
        row[r - r0] = base + <int64_t> ws.pos32[r] * a.row + col * a.col
        if not dead_too and ws.key_to[r] == 0:
            row[r - r0] = NULL
    rows.row = row
    rows.stride = a.col
    rows.rows = n
    rows.cols = cols
    rows.dtype = a.dtype
    rows.ahead = 0
    return rows

# Rows [j0, j0 + n) of k or v, `ahead` rows after each of them wanted soon.
cdef fa_rows key_rows(Workspace *ws, const Array *a, char *base, int64_t j0, int n, int cols, int ahead) noexcept nogil:
    cdef fa_rows rows
    cdef int j
    for j in range(n + ahead):
        ws.row[j] = base + (j0 + j) * a.row
    rows.row = ws.row
    rows.stride = a.col
    rows.rows = n
    rows.cols = cols
    rows.dtype = a.dtype
    rows.ahead = ahead
    return rows

cdef void pack_query_lanes(const Job *job, Workspace *ws, const Array *a, void *dst, int cols,
                           int cols_units, bint negate) noexcept nogil:
    cdef int p
    cdef fa_rows rows
    for p in range(ws.panels):
        rows = block_rows(job, ws, a, p * job.panel, min(job.panel, ws.rows - p * job.panel), 0, cols, False, ws.row)
        job.kernels.pack_lanes(units(job, dst, <ptrdiff_t> p * job.panel * cols_units), job.panel, &rows, negate)


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
        rows = key_rows(ws, a, base, k0, <int> (k1 - k0), cols, job.ahead)
        job.kernels.pack_left(tile, ld, &rows)
        left[0] = tile
        ld_out[0] = ld

cdef void load_right(const Job *job, Workspace *ws, const Array *a, char *base, int64_t k0, int64_t k1,
                     int cols, int ld, bint in_place, bint turned, void *tile, const void **right,
                     ptrdiff_t *ld_out) noexcept nogil:
    cdef fa_rows rows
    if right[0] != NULL:
        return
    if in_place:
        right[0] = base + k0 * a.row
        ld_out[0] = a.row // job.kernels.unit_bytes
    else:
        rows = key_rows(ws, a, base, k0, <int> (k1 - k0), cols, job.ahead)
        if turned:
            job.kernels.pack_turned(tile, ld, &rows)
        else:
            job.kernels.pack_right(tile, ld, &rows)
        right[0] = tile
        ld_out[0] = ld


# ---- masking: the one place that knows what excludes a pair -----------------------------------------

# Which pairs of panel p with the keys [k0, k1) of a tile take part: FULL, EMPTY, or PARTIAL with
# the bits of keep[j - k0] telling which rows do, but for what an additive mask excludes: that is left
# to `adjust`, whose scores tell. Keys outside of [low, high) take no part; low is rounded down:
# dropout draws 4 keys at once, bfloat16 takes them in pairs, and sums in runs start at the same keys
# in any panel.
cdef int tile_mask(const Job *job, Workspace *ws, int p, int64_t k0, int64_t k1, int64_t *low,
                   int64_t *high, uint32_t *keep) noexcept nogil:
    cdef const Span *span = ws.span + p
    cdef int r0 = p * job.panel, rows = min(job.panel, ws.rows - r0), r, j, a, n
    cdef int64_t j0 = max(k0, span.first // FA_RUN * FA_RUN), end = min(k1, span.end)
    cdef uint32_t valid = <uint32_t> ((<uint64_t> 1 << rows) - 1), all_kept = valid
    cdef bint banded, by_segment = job.q_segment_ids.dtype != FA_NONE
    cdef fa_rows mask
    cdef fa_rows adds[2]

    low[0] = high[0] = k0
    if j0 >= end:
        return EMPTY
    if by_segment:
        look_at_segments(job, ws, k0, k1)
        if ws.high_segment < span.low_segment or ws.low_segment > span.high_segment:
            return EMPTY
        by_segment = not (ws.low_segment == ws.high_segment == span.low_segment == span.high_segment)
    if job.attn_mask.dtype < FA_BOOL or job.bias.dtype < FA_BOOL:
        j = 0
        n = <int> (end - j0)
        for a in range(added_rows(job, ws, p, j0, n, adds)):
            job.kernels.cut_neg_inf(&adds[a], &j, &n)
        if j >= n:
            return EMPTY
        end = j0 + n
        j0 += j

    banded = span.all_from > j0 or span.all_to < end
    if banded or by_segment or job.attn_mask.dtype == FA_BOOL:
        n = <int> (end - j0)
        keep += j0 - k0
        keep_keys(ws, r0, rows, j0, n, banded, keep)
        if by_segment:
            keep_segments(job, ws, r0, rows, j0, n, keep)
        if job.attn_mask.dtype == FA_BOOL:
            mask = block_rows(job, ws, &job.attn_mask, r0, rows, j0, n, True, ws.row)
            job.kernels.keep_true(keep, &mask)
        while n > 0 and keep[n - 1] == 0:
            n -= 1
        if n == 0:
            return EMPTY
        j = 0
        while keep[j] == 0:
            j += 1
        j = j // FA_RUN * FA_RUN
        end = j0 + n
        j0 += j
        for j in range(j, n):
            all_kept &= keep[j]
    low[0] = j0
    high[0] = end
    return FULL if all_kept == valid else PARTIAL

# A row's keys are one interval: its bit is switched on at the start and off at the end.
cdef void keep_keys(const Workspace *ws, int r0, int rows, int64_t j0, int n, bint banded,
                    uint32_t *keep) noexcept nogil:
    cdef int r, j, a, e
    cdef uint32_t bits = 0
    if not banded:
        bits = <uint32_t> ((<uint64_t> 1 << rows) - 1)
        for j in range(n):
            keep[j] = bits
        return
    memset(keep, 0, n * sizeof(uint32_t))
    for r in range(rows):
        a = <int> clamp(ws.key_from[r0 + r] - j0, 0, n)
        e = <int> clamp(ws.key_to[r0 + r] - j0, 0, n)
        if a < e:
            keep[a] ^= <uint32_t> 1 << r
            if e < n:
                keep[e] ^= <uint32_t> 1 << r
    for j in range(n):
        bits ^= keep[j]
        keep[j] = bits

# The least and the largest segment of the keys [k0, k1).
cdef void look_at_segments(const Job *job, Workspace *ws, int64_t k0, int64_t k1) noexcept nogil:
    cdef const char *segments = at(job, &job.kv_segment_ids, ws.b, 0)
    cdef int64_t j, segment
    if ws.seen_from == k0 and ws.seen_to == k1:
        return
    ws.seen_from = k0
    ws.seen_to = k1
    ws.low_segment = ws.high_segment = (<int64_t *> (segments + k0 * job.kv_segment_ids.row))[0]
    for j in range(k0 + 1, k1):
        segment = (<int64_t *> (segments + j * job.kv_segment_ids.row))[0]
        ws.low_segment = min(ws.low_segment, segment)
        ws.high_segment = max(ws.high_segment, segment)

cdef void keep_segments(const Job *job, const Workspace *ws, int r0, int rows, int64_t j0, int n,
                        uint32_t *keep) noexcept nogil:
    cdef const char *segments = at(job, &job.kv_segment_ids, ws.b, 0)
    cdef int64_t segment, last = 0
    cdef uint32_t bits = 0
    cdef int j, r
    for j in range(n):
        segment = (<int64_t *> (segments + (j0 + j) * job.kv_segment_ids.row))[0]
        if j == 0 or segment != last:
            bits = 0
            for r in range(rows):
                bits |= <uint32_t> (ws.seg[r0 + r] == segment) << r
            last = segment
        keep[j] &= bits

# Rows of what is added to the scores of panel p with keys [j0, j0 + n); returns how many arrays.
cdef int added_rows(const Job *job, const Workspace *ws, int p, int64_t j0, int n, fa_rows *adds) noexcept nogil:
    cdef int r0 = p * job.panel, rows = min(job.panel, ws.rows - r0), terms = 0
    if job.attn_mask.dtype < FA_BOOL:
        adds[0] = block_rows(job, ws, &job.attn_mask, r0, rows, j0, n, True, ws.add_row[0])
        terms = 1
    if job.bias.dtype < FA_BOOL:
        adds[terms] = block_rows(job, ws, &job.bias, r0, rows, j0, n, True, ws.add_row[1])
        terms += 1
    return terms

# How the scores of panel p with keys [j0, j0 + n) are finished; NULL: softmax does it.
cdef const fa_adjust *adjustment(const Job *job, Workspace *ws, int p, int64_t j0, int n, void *gain,
                                 fa_adjust *how) noexcept nogil:
    if not job.adjusted:
        return NULL
    how.scale = job.scale
    how.softcap = job.softcap
    how.terms = added_rows(job, ws, p, j0, n, how.add)
    how.slope = how.centre = NULL
    if job.slopes != NULL:
        set_distances(job, ws, p, j0)
        how.slope = ws.slope
        how.centre = ws.centre
    how.gain = gain
    return how

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
