// The selective scan of sequences: summaries of chunks, the scan, its gradients. After walk.cuh and input.cuh.
//
// A block is SEGMENTS adjacent chunks of up to D channels of one group of one sample. Compiled with -DSOFTPLUS and
// -DWHOLE=<whether all D channels and N states exist and a row's length is a multiple of four>.

struct Sizes {
    int length, dim, group_dim, groups, states;
    int blocks;  // of D channels a group
    int spans;   // of SEGMENTS chunks a sequence
    int subs;    // blocks of SUB positions a chunk
};

struct Place {
    int span, block, group, batch;
    int first;  // channel
    int d;      // channels that exist

    __device__ __forceinline__ Place(const Sizes& s) {
        int item = blockIdx.x;
        span = item % s.spans;
        item /= s.spans;
        block = item % s.blocks;
        item /= s.blocks;
        group = item % s.groups;
        batch = item / s.groups;
        first = group * s.group_dim + block * D;
        d = WHOLE ? D : min(D, s.group_dim - block * D);
    }
};

// Where a thread's share of a sub-block is.
struct Cursor {
    int segment, row, cell, position, length;
    long long channel_at;  // of its first row in (batch, dim, length), without the position
    long long state_at;    // the same in (batch, groups, states, length)
    long long pass;        // from row to row

    __device__ __forceinline__ Cursor(const Sizes& s, const Place& at, int rows) {
        const Share share;
        segment = share.segment;
        row = share.row;
        cell = share.cell(rows);
        position = (at.span * SEGMENTS + share.segment) * s.subs * SUB + share.quad * 4;
        length = s.length;
        channel_at = ((long long)at.batch * s.dim + at.first + row) * length;
        state_at = (((long long)at.batch * s.groups + at.group) * s.states + row) * length;
        pass = (long long)PASS * length;
    }
};

template <int COUNT, typename T>
__device__ __forceinline__ void read_rows(const T* from, const Cursor& cursor, int rows, Four (&values)[COUNT]) {
    from += cursor.position;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = Four{};
        if (WHOLE) {
            if (cursor.position < cursor.length && (PASS <= N || cursor.row < rows))
                values[i] = stream4(from + i * cursor.pass);
        } else if (cursor.row + i * PASS < rows) {
            for (int k = 0; k < 4; ++k)
                if (cursor.position + k < cursor.length) values[i].at[k] = widen(from[i * cursor.pass + k]);
        }
    }
}

__device__ __forceinline__ void write_row(float* to, const Cursor& cursor, const Four& v) {
    if (WHOLE) {
        if (cursor.position < cursor.length) write4(to + cursor.position, v);
    } else {
        for (int k = 0; k < 4; ++k)
            if (cursor.position + k < cursor.length) to[cursor.position + k] = v.at[k];
    }
}

__device__ __forceinline__ void read_values(const float* values, const Place& at, const Cursor& cursor,
                                            float (&mine)[CHANNEL_ROWS]) {
    for (int i = 0; i < CHANNEL_ROWS; ++i) {
        const int row = cursor.row + i * PASS;
        mine[i] = values && row < at.d ? values[at.first + row] : 0.0f;
    }
}

__device__ __forceinline__ void read_decays(const float* A, const Place& at, const Lane& lane, int states, Tile& A2) {
    for (int r = 0; r < CHANNELS; ++r)
        for (int j = 0; j < STATES; ++j) {
            const int c = lane.channel[r], n = lane.state[j];
            A2[r][j] = c < at.d && n < states ? A[(at.first + c) * states + n] * LOG2E : 0.0f;
        }
}

// Row of a chunk's states in (batch, chunks, dim, N).
__device__ __forceinline__ long long chunk_row(const Sizes& s, const Place& at, const Lane& lane, int r) {
    const long long chunk = ((long long)at.batch * s.spans + at.span) * SEGMENTS + lane.segment;
    return chunk * s.dim + at.first + lane.channel[r];
}

__device__ __forceinline__ void read_chunk(const float* states, const Sizes& s, const Place& at, const Lane& lane,
                                           Tile& h) {
    for (int r = 0; r < CHANNELS; ++r)
        for (int j = 0; j < STATES; ++j)
            h[r][j] = lane.channel[r] < at.d ? states[chunk_row(s, at, lane, r) * N + lane.state[j]] : 0.0f;
}

// What a thread loads of a sub-block: while the block walks one, the next is on its way.
template <typename T>
struct Loaded {
    Four delta[CHANNEL_ROWS], v[CHANNEL_ROWS];

    __device__ __forceinline__ void read(const Input* delta_from, const T* v_from, const Cursor& cursor, int d) {
        read_rows(delta_from + cursor.channel_at, cursor, d, delta);
        read_rows(v_from + cursor.channel_at, cursor, d, v);
    }

    // delta into shared rows, and v: the forward scan's w = delta u (PRODUCT), or dy as it is.
    template <bool PRODUCT>
    __device__ __forceinline__ void place(const float (&bias)[CHANNEL_ROWS], const Cursor& cursor, float* delta_rows,
                                          float* v_rows) const {
        for (int i = 0; i < CHANNEL_ROWS; ++i) {
            Four steps, value = v[i];
            for (int k = 0; k < 4; ++k) {
                const float x = delta[i].at[k] + bias[i];
                steps.at[k] = SOFTPLUS ? softplus(x) : x;
                if (cursor.position + (WHOLE ? 0 : k) >= cursor.length) steps.at[k] = 0.0f;
                if (PRODUCT) value.at[k] *= steps.at[k];
            }
            write4(delta_rows + cursor.cell + i * PASS * ROW, steps);
            write4(v_rows + cursor.cell + i * PASS * ROW, value);
        }
    }
};

struct LoadedStates {
    Four m[STATE_ROWS];

    __device__ __forceinline__ void read(const Input* from, const Cursor& cursor, int states) {
        read_rows(from + cursor.state_at, cursor, states, m);
    }
    __device__ __forceinline__ void place(const Cursor& cursor, float* rows) const {
        for (int i = 0; i < STATE_ROWS; ++i)
            if (PASS <= N || cursor.row < N) write4(rows + cursor.cell + i * PASS * ROW, m[i]);
    }
};

template <bool ADJOINT, typename T>
__device__ __forceinline__ void summarise(float* shared, const T* v, const Input* delta, const float* bias_of,
                                          const float* A, const Input* m, float* state, float* total, const Sizes& s) {
    constexpr int ROWS = 2 * D + N;
    const Place at(s);
    const Lane lane;
    Cursor cursor(s, at, ROWS);
    if (ADJOINT) cursor.position += (s.subs - 1) * SUB;
    const float* mine = shared + lane.segment * segment_floats(ROWS);
    Tile A2, h = {};
    float sum[CHANNELS] = {}, bias[CHANNEL_ROWS];
    Loaded<T> channels;
    LoadedStates by;
    read_decays(A, at, lane, s.states, A2);
    read_values(bias_of, at, cursor, bias);
    channels.read(delta, v, cursor, at.d);
    by.read(m, cursor, s.states);
    for (int i = 0; i < s.subs; ++i) {
        channels.template place<!ADJOINT>(bias, cursor, shared, shared + D * ROW);
        by.place(cursor, shared + 2 * D * ROW);
        group_sync();
        cursor.position += ADJOINT ? -SUB : SUB;
        if (i + 1 < s.subs) {
            channels.read(delta, v, cursor, at.d);
            by.read(m, cursor, s.states);
        }
        walk_summary<ADJOINT>(lane, mine, mine + D * ROW, mine + 2 * D * ROW, A2, h, sum);
        group_sync();
    }
    for (int r = 0; r < CHANNELS; ++r) {
        if (lane.channel[r] >= at.d) continue;
        const long long row = chunk_row(s, at, lane, r);
        if (threadIdx.x / 2 % 2 == 0) total[row] = sum[r];
        for (int j = 0; j < STATES; ++j) state[row * N + lane.state[j]] = h[r][j];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    summary_1d(const Input* u, const Input* delta, const float* bias, const float* A, const Input* B, float* state,
               float* total, Sizes s) {
    extern __shared__ float shared[];
    summarise<false>(shared, u, delta, bias, A, B, state, total, s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    adjoint_1d(const float* dy, const Input* delta, const float* bias, const float* A, const Input* C, float* state,
               float* total, Sizes s) {
    extern __shared__ float shared[];
    summarise<true>(shared, dy, delta, bias, A, C, state, total, s);
}

// Where a thread's states before a sub-block are saved: (blocks of the grid, subs, CHANNELS, THREADS, STATES).
__device__ __forceinline__ float* saved_at(float* saved, const Sizes& s, int sub, int r) {
    return saved + ((((long long)blockIdx.x * s.subs + sub) * CHANNELS + r) * THREADS + threadIdx.x) * STATES;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    forward_1d(const Input* u, const Input* delta, const float* bias_of, const float* A, const Input* B,
               const Input* C, const float* skip_of, const float* starts, float* saved, float* y, Sizes s) {
    constexpr int ROWS = 2 * D + 2 * N;
    extern __shared__ float shared[];
    const Place at(s);
    const Lane lane;
    Cursor cursor(s, at, ROWS);
    float* mine = shared + lane.segment * segment_floats(ROWS);
    Tile A2, h;
    float bias[CHANNEL_ROWS], skip[CHANNEL_ROWS];
    Loaded<Input> channels;
    LoadedStates b, c;
    read_decays(A, at, lane, s.states, A2);
    read_values(bias_of, at, cursor, bias);
    read_values(skip_of, at, cursor, skip);
    read_chunk(starts, s, at, lane, h);
    channels.read(delta, u, cursor, at.d);
    b.read(B, cursor, s.states);
    c.read(C, cursor, s.states);
    for (int sub = 0; sub < s.subs; ++sub) {
        channels.place<true>(bias, cursor, shared, shared + D * ROW);
        b.place(cursor, shared + 2 * D * ROW);
        c.place(cursor, shared + (2 * D + N) * ROW);
        for (int r = 0; r < CHANNELS; ++r) write4(saved_at(saved, s, sub, r), *reinterpret_cast<Four*>(h[r]));
        Four in[CHANNEL_ROWS];
        for (int i = 0; i < CHANNEL_ROWS; ++i) in[i] = channels.v[i];
        group_sync();
        cursor.position += SUB;
        if (sub + 1 < s.subs) {
            channels.read(delta, u, cursor, at.d);
            b.read(B, cursor, s.states);
            c.read(C, cursor, s.states);
        }
        walk_output(lane, mine, mine + D * ROW, mine + 2 * D * ROW, mine + (2 * D + N) * ROW, A2, h);
        group_sync();
        cursor.position -= SUB;
        for (int i = 0; i < CHANNEL_ROWS; ++i) {
            Four out = read4(shared + D * ROW + cursor.cell + i * PASS * ROW);
            for (int k = 0; k < 4; ++k) out.at[k] = fmaf(skip[i], in[i].at[k], out.at[k]);
            if (cursor.row + i * PASS < at.d) write_row(y + cursor.channel_at + i * cursor.pass, cursor, out);
        }
        cursor.position += SUB;
    }
}

// Gradients. Those of A, D and the bias are partial sums, one row a (sample, span): (batch, spans, dim, states + 2).
// Those of B and C are one a block of channels.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_1d(const float* dy, const Input* u, const Input* delta, const float* bias_of, const float* A,
                const Input* B, const Input* C, const float* skip_of, float* saved, const float* adjoints, float* du,
                float* ddelta, float* dB, float* dC, float* sums, Sizes s) {
    constexpr int DY = 2 * D + 4;  // dy's rows: four more, in other banks than those of w
    constexpr int DB = DY + D + (IN_PLACE ? 0 : 2 * N);
    constexpr int ROWS = DB + 2 * N * PARTS;
    extern __shared__ float shared[];
    const Place at(s);
    const Lane lane;
    Cursor cursor(s, at, ROWS);
    cursor.position += (s.subs - 1) * SUB;
    float* mine = shared + lane.segment * segment_floats(ROWS);
    // States every STEPS positions.
    float* before = shared + SEGMENTS * segment_floats(ROWS) + threadIdx.x * STATES;
    const int part = IN_PLACE ? 0 : threadIdx.x % THREADS_A_SEGMENT / 32;
    float* dm = mine + (DB + part * 2 * N) * ROW;
    const long long to_block = (long long)at.block * (gridDim.x / s.spans / s.blocks) * s.states * s.length;
    Tile A2, g, sum_dA = {};
    float bias[CHANNEL_ROWS], skip[CHANNEL_ROWS], sum_skip[CHANNEL_ROWS] = {}, sum_bias[CHANNEL_ROWS] = {};
    read_decays(A, at, lane, s.states, A2);
    read_values(bias_of, at, cursor, bias);
    read_values(skip_of, at, cursor, skip);
    read_chunk(adjoints, s, at, lane, g);
    Loaded<Input> channels;
    LoadedStates b, c;
    Four gradient[CHANNEL_ROWS];
    channels.read(delta, u, cursor, at.d);
    read_rows(dy + cursor.channel_at, cursor, at.d, gradient);
    b.read(B, cursor, s.states);
    c.read(C, cursor, s.states);
    for (int sub = s.subs - 1; sub >= 0; --sub) {
        channels.place<true>(bias, cursor, shared, shared + D * ROW);
        for (int i = 0; i < CHANNEL_ROWS; ++i)
            write4(shared + DY * ROW + cursor.cell + i * PASS * ROW, gradient[i]);
        b.place(cursor, shared + (DY + D) * ROW);
        c.place(cursor, shared + (DY + D + N) * ROW);
        Tile h;
        for (int r = 0; r < CHANNELS; ++r) *reinterpret_cast<Four*>(h[r]) = read4(saved_at(saved, s, sub, r));
        group_sync();
        if (sub > 0) {
            cursor.position -= SUB;
            channels.read(delta, u, cursor, at.d);
            read_rows(dy + cursor.channel_at, cursor, at.d, gradient);
            b.read(B, cursor, s.states);
            c.read(C, cursor, s.states);
            cursor.position += SUB;
        }
#pragma unroll
        for (int q = 0; q < SUB / STEPS; ++q) {
            for (int r = 0; r < CHANNELS; ++r)
                write4(before + (q * CHANNELS + r) * THREADS * STATES, *reinterpret_cast<Four*>(h[r]));
            if (q < SUB / STEPS - 1) walk_states(lane, mine, mine + D * ROW, mine + (DY + D) * ROW, q * STEPS, A2, h);
        }
#pragma unroll 1
        for (int q = SUB / STEPS - 1; q >= 0; --q) {
            for (int r = 0; r < CHANNELS; ++r)
                *reinterpret_cast<Four*>(h[r]) = read4(before + (q * CHANNELS + r) * THREADS * STATES);
            walk_back(lane, mine, mine + D * ROW, mine + DY * ROW, mine + (DY + D) * ROW, mine + (DY + D + N) * ROW, dm,
                      dm + N * ROW, q * STEPS, A2, h, g, sum_dA);
        }
        group_sync();
        Four in[CHANNEL_ROWS], out[CHANNEL_ROWS];
        read_rows(u + cursor.channel_at, cursor, at.d, in);
        read_rows(dy + cursor.channel_at, cursor, at.d, out);
        for (int i = 0; i < CHANNEL_ROWS; ++i) {
            const float* cell = shared + cursor.cell + i * PASS * ROW;
            const Four steps = read4(cell), by_input = read4(cell + D * ROW), by_decay = read4(cell + DY * ROW);
            Four gradient_u, gradient_delta;
            for (int k = 0; k < 4; ++k) {
                gradient_u.at[k] = fmaf(steps.at[k], by_input.at[k], skip[i] * out[i].at[k]);
                const float slope = SOFTPLUS ? softplus_slope(steps.at[k]) : 1.0f;
                gradient_delta.at[k] = fmaf(in[i].at[k], by_input.at[k], by_decay.at[k]) * slope;
                sum_skip[i] = fmaf(out[i].at[k], in[i].at[k], sum_skip[i]);
                if (cursor.position + (WHOLE ? 0 : k) < s.length) sum_bias[i] += gradient_delta.at[k];
            }
            if (cursor.row + i * PASS < at.d) {
                write_row(du + cursor.channel_at + i * cursor.pass, cursor, gradient_u);
                write_row(ddelta + cursor.channel_at + i * cursor.pass, cursor, gradient_delta);
            }
        }
        for (int i = 0; i < STATE_ROWS; ++i) {
            const int n = cursor.row + i * PASS;
            if (n >= s.states) continue;
            for (int m = 0; m < 2; ++m) {
                Four sum = read4(shared + (DB + m * N + i * PASS) * ROW + cursor.cell);
                for (int p = 1; p < PARTS; ++p) {
                    const Four one = read4(shared + (DB + (2 * p + m) * N + i * PASS) * ROW + cursor.cell);
                    for (int k = 0; k < 4; ++k) sum.at[k] += one.at[k];
                }
                write_row((m ? dC : dB) + to_block + cursor.state_at + i * cursor.pass, cursor, sum);
            }
        }
        group_sync();
        cursor.position -= SUB;
    }

    // The block's sums over its segments, by way of the shared rows.
    const long long partial = ((long long)at.batch * s.spans + at.span) * s.dim + at.first;
    __syncthreads();
    for (int r = 0; r < CHANNELS; ++r)
        for (int j = 0; j < STATES; ++j)
            shared[(lane.segment * D + lane.channel[r]) * N + lane.state[j]] = sum_dA[r][j];
    float* vectors = shared + SEGMENTS * D * N;
    for (int i = 0; i < CHANNEL_ROWS; ++i) {
        for (int lanes = 1; lanes < SUB / 4; lanes *= 2) {
            sum_skip[i] += across(sum_skip[i], lanes);
            sum_bias[i] += across(sum_bias[i], lanes);
        }
        if (threadIdx.x % (SUB / 4) == 0) {
            vectors[cursor.segment * 2 * D + cursor.row + i * PASS] = sum_skip[i];
            vectors[(cursor.segment * 2 + 1) * D + cursor.row + i * PASS] = sum_bias[i];
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < D * N; index += THREADS) {
        float sum = 0.0f;
        for (int segment = 0; segment < SEGMENTS; ++segment) sum += shared[segment * D * N + index];
        const int row = index / N, n = index % N;
        if (row < at.d && n < s.states) sums[(partial + row) * (s.states + 2) + n] = sum;
    }
    for (int index = threadIdx.x; index < 2 * D; index += THREADS) {
        float sum = 0.0f;
        for (int segment = 0; segment < SEGMENTS; ++segment) sum += vectors[segment * 2 * D + index];
        const int row = index % D;
        if (row < at.d) sums[(partial + row) * (s.states + 2) + s.states + index / D] = sum;
    }
}
