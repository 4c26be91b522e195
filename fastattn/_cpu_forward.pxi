# The forward of one block of query rows: all its keys, tile by tile, with the online softmax.
#
# P is zero where a pair is excluded, and a zero times a finite v adds nothing, so the usual pass
# looks at no value. What an excluded v that is not finite does to a row cannot be missed: the row
# ends as NaN. Rows that end so without a NaN score are done again with excluded pairs left out of
# the product (the bits of a row are the same either way), and if that does not help, with P
# scaled down, for sums that overflow though their mean does not.

cdef enum:
    USUAL, SELECTING, SCALED, CARES

cdef Block block_at(const Job *job, int64_t unit) noexcept nogil:
    cdef int64_t heads = job.batch * job.Hkv, per_head = job.blocks // ceil_div(job.group, job.stack), block
    cdef Block found
    # Under a causal bound later blocks are longer: those of all heads come first.
    if job.bounded_right:
        block = job.blocks - 1 - unit // heads
        unit %= heads
    else:
        block = unit % job.blocks
        unit //= job.blocks
    found.b = unit // job.Hkv
    found.kv_head = unit % job.Hkv
    found.head = found.kv_head * job.group + block // per_head * job.stack
    found.heads = <int> min(job.stack, (found.kv_head + 1) * job.group - found.head)
    found.row = block % per_head * job.Br
    found.rows = <int> job.Lq if job.stack > 1 else <int> min(job.Br, job.Lq - found.row)
    return found

cdef void forward_block(const Job *job, Workspace *ws, int64_t item, const void *more) noexcept nogil:
    cdef const Team *team = <const Team *> more
    cdef int64_t unit = item // job.chunks
    cdef Block block = block_at(job, unit)
    cdef int64_t kv_head = block.kv_head
    cdef int care, r
    set_rows(job, ws, block.b, block.head, block.heads, block.row, block.rows)
    set_spans(job, ws)
    ws.fetches = 0
    if job.wants_next and unit + team.size < job.batch * job.Hkv * job.blocks:
        block = block_at(job, unit + team.size)
        want_block(job, ws, &block)
    pack_queries(job, ws)
    for r in range(ws.rows):
        ws.settled[r] = False
    if job.chunks > 1:
        forward_chunk(job, ws, kv_head, unit, item % job.chunks, team)
        return
    for care in range(CARES):
        attend(job, ws, kv_head, care, 0, job.Lk)
        if finish_rows(job, ws, care):
            return

# Rows of q (of one head), k and v that a block will read are fetched while the one at hand is computed.
cdef void want_block(const Job *job, Workspace *ws, const Block *block) noexcept nogil:
    cdef char *q = at(job, &job.q, block.b, block.head) + block.row * job.q.row
    ws.fetch[0] = wanted_rows(&job.q, q, block.rows, job.D)
    ws.fetch[1] = wanted_rows(&job.k, at(job, &job.k, block.b, block.kv_head), job.Lk, job.D)
    ws.fetch[2] = wanted_rows(&job.v, at(job, &job.v, block.b, block.kv_head), job.Lk, job.Dv)
    ws.fetches = 3
    ws.fetch_rows = <int> ceil_div(max(block.rows, job.Lk), ceil_div(ws.rows, job.kernels.MR))

cdef fa_fetch wanted_rows(const Array *a, char *base, int64_t rows, int cols) noexcept nogil:
    cdef fa_fetch wanted
    wanted.row = base
    wanted.step = a.row
    wanted.rows = <int32_t> rows
    wanted.bytes = <int32_t> (cols * a.col)
    return wanted

cdef void pack_queries(const Job *job, Workspace *ws) noexcept nogil:
    cdef fa_rows rows
    if job.few:
        rows = block_rows(job, ws, &job.q, 0, ws.rows, 0, job.D, False, ws.row)
        job.kernels.pack_left(ws.q_lanes, query_ld(job), &rows)
    else:
        pack_query_lanes(job, ws, &job.q, ws.q_lanes, job.D, job.D_units, job.negate)


# ---- keys in chunks --------------------------------------------------------------------------------
#
# A block's chunks are merged in order, whoever computes them: the state so far lies in one of as
# many slots as there are threads, and each thread waits for its turn to merge.

cdef struct Team:
    Workspace *spaces   # slot t is spaces[t].own: how many merges it has seen, then the state
    int size

cdef inline int64_t *progress_of(const Workspace *ws) noexcept nogil:
    return <int64_t *> ws.own

# The state in slot `ws`, or with base NULL the bytes of a slot.
cdef size_t partial_at(const Job *job, char *base, fa_partial *state) noexcept nogil:
    cdef size_t used = 64, rows = ceil_div(job.Br, job.panel) * job.panel, real = job.kernels.real_bytes
    state.o = carve(base, &used, rows * job.Dv_cols * real)
    state.row_max = carve(base, &used, rows * real)
    state.row_sum = carve(base, &used, rows * real)
    state.row_lost = carve(base, &used, rows * real)
    return used

cdef size_t partial_bytes(const Job *job) noexcept nogil:
    cdef fa_partial state
    return partial_at(job, NULL, &state) if job.chunks > 1 else 0

cdef void forward_chunk(const Job *job, Workspace *ws, int64_t kv_head, int64_t unit, int64_t chunk,
                        const Team *team) noexcept nogil:
    cdef const Workspace *slot = team.spaces + unit % team.size
    cdef int64_t turn = unit // team.size * job.chunks + chunk
    cdef int care
    attend(job, ws, kv_head, USUAL, chunk * job.chunk, (chunk + 1) * job.chunk)
    fa_wait_above(progress_of(slot), turn - 1)
    merge_chunk(job, ws, slot, chunk)
    if chunk == job.chunks - 1:
        care = USUAL
        while not finish_rows(job, ws, care):
            care += 1
            for chunk in range(job.chunks):
                attend(job, ws, kv_head, care, chunk * job.chunk, (chunk + 1) * job.chunk)
                merge_chunk(job, ws, slot, chunk)
    fa_publish(progress_of(slot), turn + 1)

# Adds the chunks before to this one's state; leaves it to the next one, if there is one.
cdef void merge_chunk(const Job *job, Workspace *ws, const Workspace *slot, int64_t chunk) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef size_t lanes = ws.panels * job.panel * kr.real_bytes
    cdef fa_partial before, here
    partial_at(job, slot.own, &before)
    here.o = ws.o
    here.row_max = ws.row_max
    here.row_sum = ws.row_sum
    here.row_lost = ws.row_lost
    if chunk > 0:
        kr.merge(&here, &before, ws.rows, job.Dv_cols, 1 if job.adjusted else job.scale)
    if chunk < job.chunks - 1:
        memcpy(before.o, here.o, <size_t> ws.rows * job.Dv_cols * kr.real_bytes)
        memcpy(before.row_max, here.row_max, lanes)
        memcpy(before.row_sum, here.row_sum, lanes)
        memcpy(before.row_lost, here.row_lost, lanes)


# ---- the keys of one chunk -------------------------------------------------------------------------

# Keys [begin, end), begin at the start of a tile.
cdef void attend(const Job *job, Workspace *ws, int64_t kv_head, int care, int64_t begin,
                 int64_t end) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef char *k_base = at(job, &job.k, ws.b, kv_head)
    cdef char *v_base = at(job, &job.v, ws.b, kv_head)
    cdef int64_t k0 = max(begin, ws.first_key // FA_RUN * FA_RUN), k1, low, high
    cdef int p, n, j, r, state
    cdef fa_adjust how
    cdef const fa_adjust *finish
    cdef fa_softmax_state softmax
    cdef fa_product x
    cdef fa_selection which
    cdef uint32_t *keep
    cdef const uint32_t *excluded
    cdef const uint32_t *drop
    cdef double drop_scale = job.drop_scale
    cdef bint moved, raw, turned = job.turned and care == USUAL
    if care == SCALED:
        drop_scale = ldexp(drop_scale, -scaled_bits(job))
    for r in range(ws.panels * job.panel):
        put(kr, ws.row_max, r, -INFINITY)
    memset(ws.row_sum, 0, ws.panels * job.panel * kr.real_bytes)
    memset(ws.row_lost, 0, ws.panels * job.panel * kr.real_bytes)
    for p in range(ws.panels):
        ws.span[p].begun = False
    if not turned:
        memset(ws.o, 0, <size_t> ws.rows * job.Dv_cols * kr.real_bytes)
    softmax.alpha = ws.alpha
    softmax.tile_max = ws.tile_max

    end = min(end, ws.end_key)
    while k0 < end:
        k1 = min((k0 // job.Bc + 1) * job.Bc, end)
        ws.k_left = ws.v_right = NULL
        raw = job.v_raw and care == USUAL and (k1 - k0) % kr.pair == 0
        for p in range(ws.panels):
            state = tile_mask(job, ws, p, k0, k1, &low, &high, ws.keep)
            if state == EMPTY:
                continue
            n = <int> (high - low)
            keep = ws.keep + (low - k0)
            load_left(job, ws, &job.k, k_base, k0, k1, job.D, key_ld(job), job.k_in_place, ws.k_tile,
                      &ws.k_left, &ws.ldk)
            load_right(job, ws, &job.v, v_base, k0, k1, job.Dv, job.Dv_cols, raw or job.v_in_place,
                       turned, ws.v_tile, &ws.v_right, &ws.ldv)
            finish = adjustment(job, ws, p, low, n, NULL, &how)
            excluded = keep if state == PARTIAL else NULL
            if job.few:
                kr.few_scores(ws.s, job.panel, units(job, ws.k_left, (low - k0) * ws.ldk), ws.ldk,
                              ws.q_lanes, query_ld(job), ws.rows, n, query_ld(job), job.negate, job.k_raw,
                              excluded, finish, ws.tile_max)
            else:
                kr.scores(ws.s, job.panel, units(job, ws.k_left, (low - k0) * ws.ldk), ws.ldk,
                          job.k_in_place, units(job, ws.q_lanes, <ptrdiff_t> p * job.panel * job.D_units),
                          n, job.D_units, excluded, finish, ws.tile_max)
            drop = draw_dropout(job, ws, p, low, n)
            if care != USUAL:
                for j in range(n):  # excluded scores are -inf by now
                    keep[j] = ~<uint32_t> 0
                kr.keep_above_neg_inf(keep, ws.s, job.panel, n)
                if drop == NULL and care == SCALED:
                    memset(ws.drop, 0xff, n * sizeof(uint32_t))
                    drop = ws.drop
            softmax.row_max = reals(job, ws.row_max, p * job.panel)
            softmax.row_sum = reals(job, ws.row_sum, p * job.panel)
            softmax.row_lost = reals(job, ws.row_lost, p * job.panel)
            moved = kr.softmax(ws.p, ws.s, job.panel, n, 1 if job.adjusted else job.scale, &softmax,
                               drop, drop_scale)
            x.c = reals(job, ws.o, <ptrdiff_t> p * job.panel * job.Dv_cols)
            x.ldc = x.cols = job.Dv_cols
            x.a = ws.p
            x.a_row = 1
            x.a_depth = job.panel
            x.b = units(job, ws.v_right, (low - k0 if raw else (low - k0) // kr.pair) * ws.ldv)
            x.raw = raw
            x.ldb = ws.ldv
            x.rows = min(job.panel, ws.rows - p * job.panel)
            x.depth = ceil_div(n, kr.pair)
            x.alpha = ws.alpha if moved else NULL
            x.row_start = x.row_end = NULL
            if state == PARTIAL:
                kr.seen_units(ws.row_start, ws.row_end, keep, n, x.rows)
                x.row_start = ws.row_start
                x.row_end = ws.row_end
            x.cold = False
            x.few = job.few
            x.strip = FA_STRIP if job.few and job.Br > FA_FEW_ROWS else 0
            x.fetch = ws.fetch
            x.fetches = ws.fetches
            x.fetch_rows = ws.fetch_rows
            x.fresh = not ws.span[p].begun
            ws.span[p].begun = True
            if turned:
                kr.accumulate_turned(&x)
            elif care == USUAL or kr.right_finite(ws.v_right, ws.ldv, ceil_div(k1 - k0, kr.pair), job.Dv_cols):
                kr.accumulate(&x)
            else:
                which.keep = keep
                which.ld = job.Bc
                which.keys = n
                which.panel = job.panel
                which.rows_are_keys = False
                which.scratch = ws.scratch
                kr.accumulate_selected(&x, &which)
        k0 = k1
    if turned:
        for p in range(ws.panels):
            n = min(job.panel, ws.rows - p * job.panel)
            x.c = reals(job, ws.o, <ptrdiff_t> p * job.panel * job.Dv_cols)
            if ws.span[p].begun:
                memcpy(ws.scratch, x.c, <size_t> job.panel * job.Dv_cols * kr.real_bytes)
                kr.turn_back(x.c, ws.scratch, job.panel, n, job.Dv_cols)
            else:
                memset(x.c, 0, <size_t> n * job.Dv_cols * kr.real_bytes)

# Powers of two to scale P down by, so that a sum over all keys stays below the largest summand.
cdef inline int scaled_bits(const Job *job) noexcept nogil:
    cdef int bits = 1
    while job.Lk >> bits:
        bits += 1
    return bits


# Stores the rows that are done; False if some must be done again, with more care.
cdef bint finish_rows(const Job *job, Workspace *ws, int care) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef double total, top, sink, whole, factor, lse
    cdef bint all_settled = True
    cdef int64_t i
    cdef int r
    cdef void *o
    for r in range(ws.rows):
        if ws.settled[r]:
            continue
        i = ws.pos32[r]
        o = reals(job, ws.o, <ptrdiff_t> r * job.Dv_cols)
        total = get(kr, ws.row_sum, r) + get(kr, ws.row_lost, r)
        factor = 0
        lse = -INFINITY
        if total == 0:  # the largest score adds exp(0) = 1: no pair is left
            memset(o, 0, job.Dv_cols * kr.real_bytes)
            if job.sinks != NULL and (job.q_lens == NULL or i < job.q_lens[ws.b]):
                lse = get(kr, job.sinks, ws.head[r])
        else:
            if care < CARES - 1 and total == total and not kr.row_finite(o, job.Dv_cols):
                all_settled = False
                continue
            top = get(kr, ws.row_max, r)
            if not job.adjusted:
                top *= job.scale
            factor = 1 / total
            lse = top + log(total)
            if job.sinks != NULL:
                sink = get(kr, job.sinks, ws.head[r])
                whole = max(top, sink) if top == top and sink == sink else NAN
                factor = exp(top - whole)
                total = total * factor + exp(sink - whole)
                factor /= total
                lse = whole + log(total)
            if care == SCALED:
                factor = ldexp(factor, scaled_bits(job))
        ws.settled[r] = True
        kr.store_row(at(job, &job.out, ws.b, ws.head[r]) + i * job.out.row, job.out.col, job.out.dtype, o,
                     job.Dv, factor)
        put(kr, ws.alpha, 0, lse)
        memcpy(at(job, &job.lse, ws.b, ws.head[r]) + i * job.lse.row, ws.alpha, kr.real_bytes)
    return all_settled
