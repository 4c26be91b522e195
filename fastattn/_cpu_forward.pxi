# The forward of one block of query rows: all its keys, tile by tile, with the online softmax.
#
# P is zero where a pair is excluded, and a zero times a finite v adds nothing, so the usual pass
# looks at no value. What an excluded v that is not finite does to a row cannot be missed: the row
# ends as NaN. Rows that end so without a NaN score are done again with excluded pairs left out of
# the product (the bits of a row are the same either way), and if that does not help, with P
# scaled down, for sums that overflow though their mean does not.

cdef enum:
    USUAL, SELECTING, SCALED, CARES

cdef void forward_block(const Job *job, Workspace *ws, int64_t item, const void *more) noexcept nogil:
    cdef int64_t heads = job.batch * job.Hkv, block, kv_head
    cdef int64_t per_head = job.blocks // ceil_div(job.group, job.stack), head0
    cdef int stacked, n, care, r
    # Under a causal bound later blocks are longer: those of all heads come first.
    if job.bounded_right:
        block = job.blocks - 1 - item // heads
        item %= heads
    else:
        block = item % job.blocks
        item //= job.blocks
    kv_head = item % job.Hkv
    head0 = kv_head * job.group + block // per_head * job.stack
    stacked = <int> min(job.stack, (kv_head + 1) * job.group - head0)
    n = <int> job.Lq if job.stack > 1 else <int> min(job.Br, job.Lq - block % per_head * job.Br)
    set_rows(job, ws, item // job.Hkv, head0, stacked, block % per_head * job.Br, n)
    pack_query_lanes(job, ws, &job.q, ws.q_lanes, job.D, job.D_units, job.negate)
    for r in range(ws.rows):
        ws.settled[r] = False
    for care in range(CARES):
        attend(job, ws, kv_head, care)
        if finish_rows(job, ws, care):
            return

cdef void attend(const Job *job, Workspace *ws, int64_t kv_head, int care) noexcept nogil:
    cdef const fa_kernels *kr = job.kernels
    cdef char *k_base = at(job, &job.k, ws.b, kv_head)
    cdef char *v_base = at(job, &job.v, ws.b, kv_head)
    cdef int64_t k0 = ws.first_key // job.Bc * job.Bc, k1, low, high
    cdef int p, n, j, r, state
    cdef fa_softmax_state softmax
    cdef fa_product x
    cdef fa_selection which
    cdef const uint32_t *drop
    cdef double drop_scale = job.drop_scale
    cdef bint moved
    if care == SCALED:
        drop_scale = ldexp(drop_scale, -scaled_bits(job))
    for r in range(ws.panels * job.panel):
        put(kr, ws.row_max, r, -INFINITY)
    memset(ws.row_sum, 0, ws.panels * job.panel * kr.real_bytes)
    memset(ws.row_lost, 0, ws.panels * job.panel * kr.real_bytes)
    memset(ws.o, 0, <size_t> ws.rows * job.Dv_cols * kr.real_bytes)
    softmax.alpha = ws.alpha
    softmax.tile_max = ws.tile_max

    while k0 < ws.end_key:
        k1 = min(k0 + job.Bc, ws.end_key)
        ws.k_left = ws.v_right = NULL
        for p in range(ws.panels):
            if not panel_keys(job, ws, p, k0, k1, &low, &high):
                continue
            n = <int> (high - low)
            state = tile_mask(job, ws, p, low, n, ws.keep)
            if state == EMPTY:
                continue
            load_left(job, ws, &job.k, k_base, k0, k1, job.D, key_ld(job), job.k_in_place, ws.k_tile,
                      &ws.k_left, &ws.ldk)
            load_right(job, ws, &job.v, v_base, k0, k1, job.Dv, job.Dv_cols, job.v_in_place, ws.v_tile,
                       &ws.v_right, &ws.ldv)
            kr.scores(ws.s, job.panel, units(job, ws.k_left, (low - k0) * ws.ldk), ws.ldk,
                      units(job, ws.q_lanes, <ptrdiff_t> p * job.panel * job.D_units), n, job.D_units,
                      ws.tile_max)
            if job.adjusted:
                adjust_tile(job, ws, p, low, n, NULL)
            if job.adjusted or state == PARTIAL:
                kr.exclude(ws.s, job.panel, n, ws.keep if state == PARTIAL else NULL, ws.tile_max)
            drop = draw_dropout(job, ws, p, low, n)
            if care != USUAL:
                for j in range(n):  # excluded scores are -inf by now
                    ws.keep[j] = ~<uint32_t> 0
                kr.keep_above_neg_inf(ws.keep, ws.s, job.panel, n)
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
            x.b = units(job, ws.v_right, (low - k0) // kr.pair * ws.ldv)
            x.ldb = ws.ldv
            x.rows = min(job.panel, ws.rows - p * job.panel)
            x.depth = ceil_div(n, kr.pair)
            x.alpha = ws.alpha if moved else NULL
            x.row_start = NULL
            x.row_end = ws.row_depth
            x.cold = False
            if care == USUAL or kr.right_finite(ws.v_right, ws.ldv, ceil_div(k1 - k0, kr.pair), job.Dv_cols):
                kr.accumulate(&x)
            else:
                which.keep = ws.keep
                which.ld = job.Bc
                which.keys = n
                which.panel = job.panel
                which.rows_are_keys = False
                which.scratch = ws.scratch
                kr.accumulate_selected(&x, &which)
        k0 += job.Bc

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
