# The backward: P and dS of a tile again from lse, five products; dbias in a pass of its own.

cdef enum:
    STORE_AHEAD = 8  # rows of a result

# A block of rows of one head, ready for its tiles: lanes and rows of q and dout, lse, D - dlse.
cdef void load_backward_block(const Job *job, Workspace *ws, int64_t b, int64_t head,
                              int64_t i0) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef int n = <int> min(job.Br, job.Lq - i0), r
    cdef int64_t i, row
    cdef double lse, delta, dlse
    cdef char *lse_rows = at(job, &job.lse, b, head)
    cdef char *dlse_rows = at(job, &job.dlse, b, head) if job.dlse.dtype != FA_NONE else NULL
    cdef char *dout_rows = at(job, &job.dout, b, head)
    cdef char *out_rows = at(job, &job.out, b, head)
    set_rows(job, ws, b, head, 1, i0, n)
    ws.first_key = job.Lk
    ws.end_key = 0
    for r in range(ws.panels * job.panel):
        lse = INFINITY
        delta = dlse = 0
        i = i0 + r
        if r < n and (job.q_lens == NULL or i < job.q_lens[b]):
            lse = real_at(job, lse_rows + i * job.lse.row)
        if lse == -INFINITY:
            lse = INFINITY
            ws.key_from[r] = ws.key_to[r] = 0
        elif r < n and (job.q_lens == NULL or i < job.q_lens[b]):
            delta = kr.dot(dout_rows + i * job.dout.row, job.dout.col, job.dout.dtype,
                           out_rows + i * job.out.row, job.out.col, job.out.dtype, job.Dv)
            if dlse_rows != NULL:
                dlse = real_at(job, dlse_rows + i * job.dlse.row)
            if job.dsink_rows != NULL:
                row = (head * job.batch + b) * job.Lq + i
                job.dsink_rows[row] = exp(get(kr, job.sinks, head) - lse) * (dlse - delta)
        put(kr, ws.lse, r, lse)
        put(kr, ws.shift, r, delta - dlse)
        if ws.key_to[r] > ws.key_from[r]:
            ws.first_key = min(ws.first_key, ws.key_from[r])
            ws.end_key = max(ws.end_key, ws.key_to[r])
    set_spans(job, ws)
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
cdef int backward_panel(const Job *job, Workspace *ws, int p, char *k_base, char *v_base,
                        int64_t k0, int64_t k1, int64_t *low, int64_t *high) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef uint32_t *keep = ws.keep + <ptrdiff_t> p * job.Bc
    cdef int rows = min(job.panel, ws.rows - p * job.panel), state, n, j
    cdef fa_backward_tile x
    cdef fa_adjust how
    cdef const fa_adjust *finish
    cdef bint plain
    cdef ptrdiff_t lanes = <ptrdiff_t> ceil_div(job.Br, job.panel) * job.panel
    state = tile_mask(job, ws, p, k0, k1, low, high, keep)
    n = <int> (high[0] - low[0])
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
    x.k = units(job, ws.k_left, (low[0] - k0) * ws.ldk)
    x.ldk = ws.ldk
    x.q = units(job, ws.q_lanes, <ptrdiff_t> p * job.panel * job.D_units)
    x.D = job.D_units
    x.fetch = ws.fetch
    x.fetches = ws.fetches
    x.fetch_rows = ws.fetch_rows
    x.s = ws.s
    x.dp = ws.dp
    # A lane past the last row counts only if it shares a unit with that row.
    x.keep = keep + (low[0] - k0) if state == PARTIAL or rows % kr.pair != 0 else NULL
    x.drop = NULL
    x.scale = 1 if job.adjusted else job.scale
    x.drop_scale = job.drop_scale
    x.lse = reals(job, ws.lse, p * job.panel)
    x.shift = reals(job, ws.shift, p * job.panel)
    x.gain = ws.gain if job.softcap != 0 else NULL
    x.rough = not job.adjusted
    x.ld = lanes // kr.pair
    x.p = units(job, ws.p, (low[0] - k0) * x.ld + p * job.panel // kr.pair)
    x.ds = units(job, ws.ds, (low[0] - k0) * x.ld + p * job.panel // kr.pair)
    x.ds_keys = units(job, ws.ds_keys, (low[0] - k0) // 2 * lanes + p * job.panel)
    kr.scores(ws.dp, job.panel, units(job, ws.v_left, (low[0] - k0) * ws.ldv), ws.ldv, False,
              units(job, ws.do_lanes, <ptrdiff_t> p * job.panel * job.Dv_units), n, job.Dv_units,
              NULL, NULL, ws.tile_max)
    plain = x.keep == NULL and not job.adjusted and job.threshold == 0
    if not plain or kr.backward_plain(&x, job.panel, n):
        finish = adjustment(job, ws, p, low[0], n, ws.gain, &how)
        kr.scores(ws.s, job.panel, x.k, x.ldk, False, x.q, n, x.D, NULL, finish, ws.tile_max)
        x.drop = draw_dropout(job, ws, p, low[0], n)
        if kr.backward_tile(&x, job.panel, n):
            kr.keep_above_neg_inf(keep + (low[0] - k0), ws.s, job.panel, n)
            state = PARTIAL
    return FULL if state == FULL and low[0] == k0 and high[0] == k1 else PARTIAL

# What the products of a tile of whose keys [first, end) some row sees any can leave out.
cdef void set_extents(const Job *job, Workspace *ws, int first, int end) noexcept nogil:
    cdef int pair = job.kernels.pair, p, r0, r1, j, r
    for j in range(end - first):
        ws.key_start[j] = job.Br
        ws.key_end[j] = 0
    for p in range(ws.panels):
        r0 = p * job.panel
        r1 = min(ws.rows, r0 + job.panel)
        for j in range(ws.panel_start[p] - first, ws.panel_end[p] - first):
            ws.key_start[j] = min(ws.key_start[j], r0 // pair)
            ws.key_end[j] = ceil_div(r1, pair)
        for r in range(r0, r1):
            ws.row_start[r] = max(0, ws.panel_start[p] - first) // pair
            ws.row_end[r] = ceil_div(max(0, ws.panel_end[p] - first), pair)

# Zeros for panel p in keys [j0, j1) of the tile.
cdef void clear_keys(const Job *job, Workspace *ws, int p, ptrdiff_t lanes, int j0,
                     int j1) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef ptrdiff_t ld = lanes // kr.pair, first = p * job.panel // kr.pair
    cdef ptrdiff_t size = job.panel // kr.pair * kr.unit_bytes
    cdef int j
    for j in range(j0, j1):
        memset(units(job, ws.p, j * ld + first), 0, size)
        memset(units(job, ws.ds, j * ld + first), 0, size)
    if kr.pair == 2:
        for j in range(ceil_div(j0, 2), ceil_div(j1, 2)):
            memset(units(job, ws.ds_keys, j * lanes + p * job.panel), 0, job.panel * kr.unit_bytes)

# Rows [i, i + n) of a, if they lie in one piece each, are to be fetched.
cdef inline void want(Workspace *ws, const Array *a, const char *base, int64_t i, int64_t n,
                      int cols) noexcept nogil:
    cdef fa_fetch *fetch = ws.fetch + ws.fetches
    if 0 < a.col <= 8 and n > 0:
        fetch.row = base + i * a.row
        fetch.step = a.row
        fetch.rows = <int> n
        fetch.bytes = <int> (cols * a.col)
        ws.fetches += 1

# What is wanted after the tile that ends before key k1: the next tile's keys or the next block's
# rows.
cdef void want_next(const Job *job, Workspace *ws, int64_t batch_head, int64_t block, int64_t k1,
                    int64_t next_head) noexcept nogil:
    cdef int64_t per_head = job.blocks // job.group, b, kv_head, head, i0, most = 0
    cdef int n
    ws.fetches = 0
    if k1 >= ws.end_key:
        block += 1
        k1 = job.Lk
        if block == job.blocks:
            batch_head = next_head
            block = k1 = 0
        if batch_head >= job.batch * job.Hkv:
            return
    b = batch_head // job.Hkv
    kv_head = batch_head % job.Hkv
    want(ws, &job.k, at(job, &job.k, b, kv_head), k1, min(job.Bc, job.Lk - k1), job.D)
    want(ws, &job.v, at(job, &job.v, b, kv_head), k1, min(job.Bc, job.Lk - k1), job.Dv)
    if k1 == 0 or k1 == job.Lk:
        head = kv_head * job.group + block // per_head
        i0 = block % per_head * job.Br
        want(ws, &job.q, at(job, &job.q, b, head), i0, min(job.Br, job.Lq - i0), job.D)
        want(ws, &job.dout, at(job, &job.dout, b, head), i0, min(job.Br, job.Lq - i0), job.Dv)
        want(ws, &job.out, at(job, &job.out, b, head), i0, min(job.Br, job.Lq - i0), job.Dv)
    for n in range(ws.fetches):
        most = max(most, ws.fetch[n].rows)
    ws.fetch_rows = <int> ceil_div(8 * most, ws.panels * job.Bc)

# One block of rows: its dq, its rows of dsinks and dalibi_slopes, and its share of dk and dv, which
# is added to a tile once the block before has passed it (before NULL: nobody shares them). The
# thread is likely to go on with next_head.
cdef void backward_block(const Job *job, Workspace *ws, int64_t batch_head, int64_t block,
                         int64_t next_head, void *dk, void *dv, const int64_t *before,
                         int64_t *passed) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef int64_t b = batch_head // job.Hkv, kv_head = batch_head % job.Hkv
    cdef int64_t per_head = job.blocks // job.group, head = kv_head * job.group + block // per_head
    cdef int64_t i0 = block % per_head * job.Br, k0, k1, low, high, first, end
    cdef int p, r, j, state, rows_finite = -1
    cdef bint ragged
    cdef ptrdiff_t lanes = <ptrdiff_t> ceil_div(job.Br, job.panel) * job.panel, ldk_right = 0
    cdef char *k_base = at(job, &job.k, b, kv_head)
    cdef char *v_base = at(job, &job.v, b, kv_head)
    cdef const void *k_right
    cdef const void *q_right
    cdef const void *do_right
    cdef fa_product x
    cdef fa_selection which

    load_backward_block(job, ws, b, head, i0)
    memset(ws.o, 0, <size_t> ws.rows * job.D_cols * kr.real_bytes)
    q_right = rows_as_right(job, ws, &job.q, job.D, job.D_cols, ws.q_right)
    do_right = rows_as_right(job, ws, &job.dout, job.Dv, job.Dv_cols, ws.do_right)

    k0 = ws.first_key // job.Bc * job.Bc
    while k0 < ws.end_key:
        k1 = min(k0 + job.Bc, ws.end_key)
        ws.k_left = ws.v_left = k_right = NULL
        first = k1
        end = k0
        ragged = False
        want_next(job, ws, batch_head, block, k1, next_head)
        for p in range(ws.panels):
            state = backward_panel(job, ws, p, k_base, v_base, k0, k1, &low, &high)
            ragged |= state != FULL
            ws.panel_start[p] = <int> (low - k0)
            ws.panel_end[p] = <int> (high - k0)
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
            which.rows_are_keys = True
            x.a_row = lanes // kr.pair
            x.a_depth = 1
            x.rows = <int> (end - first)
            x.depth = ceil_div(ws.rows, kr.pair)
            x.raw = False
            x.cold = True
            x.strip = 0
            if ragged:
                set_extents(job, ws, <int> (first - k0), <int> (end - k0))
                x.row_start = ws.key_start
                x.row_end = ws.key_end
            if job.dv.dtype != FA_NONE:
                x.a = units(job, ws.p, (first - k0) * x.a_row)
                x.c = reals(job, dv, first * job.Dv_cols)
                x.b = do_right
                x.ldc = x.ldb = x.cols = job.Dv_cols
                multiply(job, &x, &which, ragged and not rows_all_finite(
                    job, ws, q_right, do_right, &rows_finite))
            if job.dk.dtype != FA_NONE:
                x.a = units(job, ws.ds, (first - k0) * x.a_row)
                x.c = reals(job, dk, first * job.D_cols)
                x.b = q_right
                x.ldc = x.ldb = x.cols = job.D_cols
                multiply(job, &x, &which, ragged and not rows_all_finite(
                    job, ws, q_right, do_right, &rows_finite))
            x.cold = False
            if passed != NULL:
                fa_publish(passed, k1)
            if job.dq.dtype != FA_NONE:
                if kr.pair == 1 and (not job.k_in_place or job.D == job.D_cols):
                    k_right = ws.k_left
                    ldk_right = ws.ldk
                else:
                    load_right(job, ws, &job.k, k_base, k0, k1, job.D, job.D_cols, False, False,
                               ws.k_right, &k_right, &ldk_right)
                which.rows_are_keys = False
                x.a = units(job, ws.ds if kr.pair == 1 else ws.ds_keys,
                            (first - k0) // kr.pair * lanes)
                x.a_row = 1
                x.a_depth = lanes
                x.rows = ws.rows
                x.depth = ceil_div(end - first, kr.pair)
                if ragged:
                    x.row_start = ws.row_start
                    x.row_end = ws.row_end
                x.c = ws.o
                x.b = units(job, k_right, (first - k0) // kr.pair * ldk_right)
                x.ldb = ldk_right
                x.ldc = x.cols = job.D_cols
                multiply(job, &x, &which, ragged and not kr.right_finite(
                    k_right, ldk_right, ceil_div(k1 - k0, kr.pair), job.D_cols))
        elif passed != NULL:
            fa_publish(passed, k1)
        k0 += job.Bc
    if before != NULL:
        fa_wait_above(before, job.Lk)
    if passed != NULL:
        fa_publish(passed, job.Lk + 1)

    if job.dq.dtype != FA_NONE:
        store_rows(job, &job.dq, b, head, i0, ws.rows, ws.o, job.D, job.D_cols, signed_scale(job))
    for r in range(ws.rows):
        if job.dslope_rows != NULL:
            job.dslope_rows[(head * job.batch + b) * job.Lq + i0 + r] = -get(kr, ws.dslope, r)

# The block's rows of `a` as a product's right operand: where they lie, if they lie side by side.
cdef const void *rows_as_right(const Job *job, Workspace *ws, const Array *a, int cols, int ld,
                               void *dst) noexcept nogil:
    cdef fa_rows rows
    cdef int r
    cdef bint in_place = (job.kernels.pair == 1 and lies_whole(job, a, cols) and cols == ld
                          and a.row == cols * job.kernels.unit_bytes)
    for r in range(ws.rows):
        in_place &= ws.key_to[r] != 0
    rows = block_rows(job, ws, a, 0, ws.rows, 0, cols, False, ws.row)
    if in_place:
        return rows.row[0]
    job.kernels.pack_right(dst, ld, &rows)
    return dst

cdef inline bint rows_all_finite(const Job *job, const Workspace *ws, const void *q_right,
                                 const void *do_right, int *known) noexcept nogil:
    cdef int pairs = ceil_div(ws.rows, job.kernels.pair)
    if known[0] < 0:
        known[0] = (job.kernels.right_finite(q_right, job.D_cols, pairs, job.D_cols)
                    and job.kernels.right_finite(do_right, job.Dv_cols, pairs, job.Dv_cols))
    return known[0]

cdef inline void multiply(const Job *job, const fa_product *x, const fa_selection *which,
                          bint select) noexcept nogil:
    if select:
        job.kernels.accumulate_selected(x, which)
    else:
        job.kernels.accumulate(x)

# Rows [i0, i0 + n) of a result, from reals.
cdef void store_rows(const Job *job, const Array *a, int64_t b, int64_t head, int64_t i0, int64_t n,
                     const void *src, int cols, int ld, double factor) noexcept nogil:
    cdef char *base = at(job, a, b, head)
    cdef int64_t i
    for i in range(i0, i0 + n):
        if a.col <= job.kernels.real_bytes:
            fa_fetch_to_write(base + (i + STORE_AHEAD) * a.row, cols * a.col)
        job.kernels.store_row(base + i * a.row, a.col, a.dtype, reals(job, src, (i - i0) * ld),
                              cols, factor)

cdef inline double signed_scale(const Job *job) noexcept nogil:
    return -job.scale if job.negate else job.scale

# dk, dv of keys [j0, j1) of one kv head, from their sums.
cdef void store_dkv(const Job *job, int64_t batch_head, const void *dk, const void *dv, int64_t j0,
                    int64_t j1) noexcept nogil:
    cdef int64_t b = batch_head // job.Hkv, head = batch_head % job.Hkv
    if job.dk.dtype != FA_NONE:
        store_rows(job, &job.dk, b, head, j0, j1 - j0, reals(job, dk, j0 * job.D_cols), job.D,
                   job.D_cols, signed_scale(job))
    if job.dv.dtype != FA_NONE:
        store_rows(job, &job.dv, b, head, j0, j1 - j0, reals(job, dv, j0 * job.Dv_cols), job.Dv,
                   job.Dv_cols, 1)


cdef struct Shared:            # heads that all threads work on together
    Workspace *spaces          # the sums of head first + n are in spaces[n].own
    int64_t first, count
    int64_t *passed            # [count][blocks + 1]: the key up to which a block has added

cdef void backward_heads(const Job *job, num_threads) except *:
    """All gradients but dbias. Each thread takes whole heads while there are enough for all; the
    heads left over are shared."""
    cdef int64_t heads = job.batch * job.Hkv, n
    cdef int team = team_size(job, num_threads, heads * max(1, job.blocks))
    cdef char *memory = NULL
    cdef void *passed = NULL
    cdef Shared shared
    if heads == 0:
        return
    shared.first = heads // team * team
    shared.count = heads - shared.first
    shared.spaces = make_workspaces(job, team, sums_bytes(job), &memory)
    if posix_memalign(&passed, 64, (shared.count * (job.blocks + 1) + 1) * sizeof(int64_t)) != 0:
        free(memory)
        raise MemoryError(f"no memory for the progress of {shared.count * job.blocks} blocks")
    shared.passed = <int64_t *> passed
    with nogil:
        run(job, shared.spaces, team, shared.first, backward_head, &team)
        if shared.count > 0:
            # -1: at no key yet
            memset(passed, 0xff, shared.count * (job.blocks + 1) * sizeof(int64_t))
            for n in range(shared.count):
                shared.passed[n * (job.blocks + 1)] = job.Lk + 1
                memset(shared.spaces[n].own, 0, <size_t> sums_bytes(job))
            # First blocks of all heads first: a block seldom waits for the one before.
            run(job, shared.spaces, team, shared.count * job.blocks, backward_shared_block, &shared)
            if job.dk.dtype != FA_NONE or job.dv.dtype != FA_NONE:
                run(job, shared.spaces, team, shared.count * ceil_div(job.Lk, job.Bc),
                    store_shared_keys, &shared)
        free(passed)
        free(memory)

# What the sums of a head's dk and dv, those that are wanted, take; dv's lie behind dk's.
cdef double sums_bytes(const Job *job) noexcept nogil:
    return <double> job.Lk * job.kernels.real_bytes * (
        (job.D_cols if job.dk.dtype != FA_NONE else 0)
        + (job.Dv_cols if job.dv.dtype != FA_NONE else 0))

cdef inline char *dv_sums(const Job *job, const Workspace *ws) noexcept nogil:
    return <char *> reals(job, ws.own, job.Lk * job.D_cols) if job.dk.dtype != FA_NONE else ws.own

cdef void backward_head(const Job *job, Workspace *ws, int64_t head,
                        const void *team) noexcept nogil:
    cdef int64_t block, next_head = head + (<const int *> team)[0]
    memset(ws.own, 0, <size_t> sums_bytes(job))
    for block in range(job.blocks):
        backward_block(job, ws, head, block, next_head, ws.own, dv_sums(job, ws), NULL, NULL)
    store_dkv(job, head, ws.own, dv_sums(job, ws), 0, job.Lk)

cdef void backward_shared_block(const Job *job, Workspace *ws, int64_t item,
                                const void *shared_) noexcept nogil:
    cdef const Shared *shared = <const Shared *> shared_
    cdef int64_t n = item % shared.count, block = item // shared.count
    cdef const Workspace *sums = shared.spaces + n
    cdef int64_t *passed = shared.passed + n * (job.blocks + 1) + block
    backward_block(job, ws, shared.first + n, block, INT64_MAX, sums.own, dv_sums(job, sums),
                   passed, passed + 1)

cdef void store_shared_keys(const Job *job, Workspace *ws, int64_t item,
                            const void *shared_) noexcept nogil:
    cdef const Shared *shared = <const Shared *> shared_
    cdef int64_t n = item % shared.count, tile = item // shared.count
    cdef const Workspace *sums = shared.spaces + n
    store_dkv(job, shared.first + n, sums.own, dv_sums(job, sums), tile * job.Bc,
              min(job.Lk, (tile + 1) * job.Bc))


# ---- dbias ---------------------------------------------------------------------------------------

cdef struct BiasTasks:
    const int64_t *owners      # (b, head) pairs, as b * Hq + head, that own elements of dbias
    int64_t rows, keys         # tasks along the axis
    int64_t row_span, key_span

# dbias for the elements on which a block of rows and a tile of keys of one head fall, over
# everything that is broadcast onto them: other batch entries and heads, and where the bias has one
# row (one column), all rows (keys). Each task owns its elements, so the order of its sum is fixed.
cdef void bias_task(const Job *job, Workspace *ws, int64_t task, const void *tasks_) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef const BiasTasks *tasks = <const BiasTasks *> tasks_
    cdef int64_t owner = tasks.owners[task // (tasks.rows * tasks.keys)]
    cdef int64_t i0 = task // tasks.keys % tasks.rows * tasks.row_span
    cdef int64_t i1 = min(job.Lq, i0 + tasks.row_span)
    cdef int64_t k_start = task % tasks.keys * tasks.key_span
    cdef int64_t k_end = min(job.Lk, k_start + tasks.key_span)
    cdef char *target = at(job, &job.dbias, owner // job.Hq, owner % job.Hq)
    cdef int64_t b, head, i, k0, k1, low, high
    cdef int p, state, rows = 0, keys = 0, r, j
    cdef ptrdiff_t tile = <ptrdiff_t> job.Bc * job.panel
    cdef bint one_row = job.dbias.row == 0, one_key = job.dbias.col == 0
    cdef double total
    cdef char *k_base
    cdef char *v_base
    memset(ws.dbias, 0, ceil_div(job.Br, job.panel) * tile * sizeof(double))
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
                    ws.fetches = 0
                    for p in range(ws.panels):
                        state = backward_panel(job, ws, p, k_base, v_base, k0, k1, &low, &high)
                        if state != EMPTY:
                            kr.add_tile(ws.dbias + p * tile + (low - k0) * job.panel, ws.dp,
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

cdef inline void fold(const Job *job, Workspace *ws, int r0, int r1, int j0, int j1,
                      double *total) noexcept nogil:
    cdef int r, j
    cdef double row
    # A sum of sums: its error grows with the longer chain, not with all of it.
    for r in range(r0, r1):
        row = 0
        for j in range(j0, j1):
            row += ws.dbias[(<ptrdiff_t> (r // job.panel) * job.Bc + j) * job.panel + r % job.panel]
        total[0] += row


cdef void backward_bias(const Job *job, num_threads, axes) except *:
    """dbias, a task for every tile of elements of its own; axes are (size, stride) of its leading
    axes and heads."""
    cdef char *memory = NULL
    cdef Workspace *spaces
    cdef BiasTasks tasks
    cdef int64_t count
    cdef int team
    # Index 0 along every axis that is broadcast.
    owners = numpy.zeros(1, numpy.int64)
    for size, stride in axes:
        steps = numpy.arange(size if stride != 0 else min(size, 1), dtype=numpy.int64)
        owners = (owners[:, None] * size + steps).ravel()
    tasks.owners = int64_data(owners)
    tasks.rows = 1 if job.dbias.row == 0 else ceil_div(job.Lq, job.Br)
    tasks.keys = 1 if job.dbias.col == 0 else ceil_div(job.Lk, job.Bc)
    tasks.row_span = job.Lq if job.dbias.row == 0 else job.Br
    tasks.key_span = job.Lk if job.dbias.col == 0 else job.Bc
    count = len(owners) * tasks.rows * tasks.keys
    if count == 0 or job.Lq == 0 or job.Lk == 0:
        return
    team = team_size(job, num_threads, count)
    spaces = make_workspaces(job, team, 0, &memory)
    with nogil:
        run(job, spaces, team, count, bias_task, &tasks)
        free(memory)
