// What the CUDA scans of sequences and of maps share: the threads' tile, the serial walks, sums over lanes.
//
// A block walks SEGMENTS adjacent chunks of a sequence side by side, SUB positions of each at a time, with the states
// in registers. What the steps need lies in shared memory as rows over time: step sizes delta and w = delta u of D
// channels, B and C of N = 16 states. A thread holds CHANNELS x STATES = 2 x 4 states of one segment; four lanes side
// by side hold a channel's 16. It reads four steps of a row at once, and does four steps before anything passes
// between lanes.
//
// Which of its two channels and four states comes first differs between lanes ("slots"), so that a sum over lanes
// always sends the same slots away and keeps the others: an exchange is a shuffle and an addition, nothing is selected.
//
// Compiled with -DD=<channels: 8, 16, 32, 64 or 128>.

constexpr int N = 16;
constexpr int CHANNELS = 2;
constexpr int STATES = 4;
constexpr int STEPS = 4;   // done at once
constexpr int SUB = 16;    // positions of a segment in shared memory
constexpr int ROW = SUB + 4;  // floats from row to row: adjacent rows start in different banks
constexpr int THREADS_A_SEGMENT = D / CHANNELS * (N / STATES);
constexpr int SEGMENTS = THREADS_A_SEGMENT < 64 ? 128 / THREADS_A_SEGMENT : 1;
constexpr int THREADS = THREADS_A_SEGMENT * SEGMENTS;
// Threads that share shared rows: the warps of a segment, or the segments of a warp.
constexpr int GROUP = THREADS_A_SEGMENT > 32 ? THREADS_A_SEGMENT : 32;
constexpr int GROUP_SEGMENTS = GROUP / THREADS_A_SEGMENT;
constexpr int GROUP_WARPS = GROUP / 32;
// Partial sums over channels of dB and dC: one for each warp of a segment.
constexpr int PARTS = GROUP_WARPS;
constexpr bool IN_PLACE = GROUP == 32;  // a segment is one warp's: dB and dC over B and C

constexpr float LN2 = 0.6931471805599453f;

// max(x, 0) + log1p(exp(-|x|)), log1p(t) as t times a polynomial of degree 8 with the least relative error on [0, 1],
// 3e-8: tiny results stay relatively exact.
__device__ __forceinline__ float softplus(float x) {
    const float t = exp2_fast(fabsf(x) * -LOG2E);
    float p = fmaf(t, 0.0052326927f, -0.0295052325f);
    p = fmaf(t, p, 0.0782259417f);
    p = fmaf(t, p, -0.136632449f);
    p = fmaf(t, p, 0.191060064f);
    p = fmaf(t, p, -0.248429821f);
    p = fmaf(t, p, 0.333190968f);
    p = fmaf(t, p, -0.499994931f);
    p = fmaf(t, p, 1.0f);
    return fmaf(t, p, fmaxf(x, 0.0f));
}

// Derivative of softplus from its value, 1 - exp(-delta), by its series where that would cancel.
__device__ __forceinline__ float softplus_slope(float delta) {
    const float series =
        delta * (1.0f - delta * (0.5f - delta * (1.0f / 6 - delta * (1.0f / 24 - delta * (1.0f / 120)))));
    return delta < 0.1f ? series : 1.0f - exp2_fast(delta * -LOG2E);
}

__device__ __forceinline__ void group_sync() {
    if (GROUP == 32)
        __syncwarp();
    else
        __syncthreads();
}

// Where a thread's states are: its segment, its two channels and its four states, by slot.
struct Lane {
    int segment;
    int group;  // of channels
    unsigned odd;    // all ones in the lanes that keep the second of two in sums over states, else 0
    unsigned third;  // the same in sums over eight groups of channels
    int channel[CHANNELS];
    int state[STATES];

    __device__ __forceinline__ Lane() {
        const int s = threadIdx.x % THREADS_A_SEGMENT;
        segment = threadIdx.x / THREADS_A_SEGMENT;
        group = s / 4;
        odd = s >> 1 & 1 ? ~0u : 0u;
        third = group >> 2 & 1 ? ~0u : 0u;
        for (int r = 0; r < CHANNELS; ++r) channel[r] = CHANNELS * group + (r ^ (s & 1));
        for (int j = 0; j < STATES; ++j) state[j] = (s & 3) + 4 * (j ^ (group & 3));
    }
};

typedef float Tile[CHANNELS][STATES];

__device__ __forceinline__ Four states_of(const float (&row)[STATES]) { return Four{row[0], row[1], row[2], row[3]}; }

// Floats of a segment's rows: neighbours half the banks apart.
__device__ constexpr int segment_floats(int rows) { return rows * ROW + (rows * ROW % 32 ? 0 : 16); }

// A thread's share of a segment's rows: four positions of every PASS-th row.
constexpr int PASS = THREADS_A_SEGMENT / (SUB / 4);
constexpr int CHANNEL_ROWS = D / PASS;
constexpr int STATE_ROWS = N > PASS ? N / PASS : 1;

struct Share {
    int segment, row, quad;
    __device__ __forceinline__ Share() {
        const int index = threadIdx.x % GROUP;
        quad = index % (SUB / 4);
        segment = threadIdx.x / GROUP * GROUP_SEGMENTS + index / (SUB / 4) % GROUP_SEGMENTS;
        row = index / (SUB / 4) / GROUP_SEGMENTS;
        if (GROUP_SEGMENTS == 1) row += row % 2 * 4 - row % 8 + row % 8 / 2;  // 0, 4, 1, 5, ...: other banks
    }
    __device__ __forceinline__ int cell(int rows) const {
        return segment * segment_floats(rows) + row * ROW + quad * 4;
    }
};

// ``a`` where ``mask`` is ones, ``b`` where it is 0: of a ?: with shuffles behind it the compiler makes a branch.
__device__ __forceinline__ float choose(unsigned mask, float a, float b) {
    return __uint_as_float((__float_as_uint(a) & mask) | (__float_as_uint(b) & ~mask));
}

__device__ __forceinline__ float across(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// A chunk's summary: the state it reaches from zero (ADJOINT: the adjoint that it hands on), and its sum of steps.
template <bool ADJOINT>
__device__ __forceinline__ void walk_summary(const Lane& lane, const float* delta, const float* v, const float* m,
                                             const Tile& A2, Tile& h, float (&total)[CHANNELS]) {
#pragma unroll
    for (int q = 0; q < SUB / STEPS; ++q) {
        const int at = (ADJOINT ? SUB / STEPS - 1 - q : q) * STEPS;
        Four step[CHANNELS], value[CHANNELS], by[STATES];
        for (int r = 0; r < CHANNELS; ++r) {
            step[r] = read4(delta + lane.channel[r] * ROW + at);
            value[r] = read4(v + lane.channel[r] * ROW + at);
        }
        for (int j = 0; j < STATES; ++j) by[j] = read4(m + lane.state[j] * ROW + at);
        for (int i = 0; i < STEPS; ++i) {
            const int t = ADJOINT ? STEPS - 1 - i : i;
            for (int r = 0; r < CHANNELS; ++r) {
                total[r] += step[r].at[t];
                for (int j = 0; j < STATES; ++j) {
                    const float decay = exp2_fast(step[r].at[t] * A2[r][j]);
                    if (ADJOINT)
                        h[r][j] = decay * fmaf(value[r].at[t], by[j].at[t], h[r][j]);
                    else
                        h[r][j] = fmaf(decay, h[r][j], value[r].at[t] * by[j].at[t]);
                }
            }
        }
    }
}

// SUB steps from states h; writes y = <C, h> over w.
__device__ __forceinline__ void walk_output(const Lane& lane, const float* delta, float* w, const float* B,
                                            const float* C, const Tile& A2, Tile& h) {
#pragma unroll
    for (int q = 0; q < SUB / STEPS; ++q) {
        const int at = q * STEPS;
        Four step[CHANNELS], value[CHANNELS], b[STATES], c[STATES];
        for (int r = 0; r < CHANNELS; ++r) {
            step[r] = read4(delta + lane.channel[r] * ROW + at);
            value[r] = read4(w + lane.channel[r] * ROW + at);
        }
        for (int j = 0; j < STATES; ++j) {
            b[j] = read4(B + lane.state[j] * ROW + at);
            c[j] = read4(C + lane.state[j] * ROW + at);
        }
        float y[CHANNELS][STEPS] = {};
        for (int t = 0; t < STEPS; ++t)
            for (int r = 0; r < CHANNELS; ++r)
                for (int j = 0; j < STATES; ++j) {
                    const float decay = exp2_fast(step[r].at[t] * A2[r][j]);
                    h[r][j] = fmaf(decay, h[r][j], value[r].at[t] * b[j].at[t]);
                    y[r][t] = fmaf(c[j].at[t], h[r][j], y[r][t]);
                }
        // Of its channel pair a lane keeps slot 0, of four steps two.
        float kept[2];
        for (int t = 0; t < STEPS; ++t) y[0][t] += across(y[1][t], 1);
        for (int t = 0; t < 2; ++t) {
            const float sent = choose(lane.odd, y[0][t], y[0][t + 2]);
            kept[t] = choose(lane.odd, y[0][t + 2], y[0][t]) + across(sent, 2);
        }
        __syncwarp();  // every lane has read w
        float* to = w + lane.channel[0] * ROW + at + (lane.odd & 2);
        to[0] = kept[0];
        to[1] = kept[1];
    }
}

// STEPS steps from h without results.
__device__ __forceinline__ void walk_states(const Lane& lane, const float* delta, const float* w, const float* B,
                                            int at, const Tile& A2, Tile& h) {
    Four step[CHANNELS], value[CHANNELS], b[STATES];
    for (int r = 0; r < CHANNELS; ++r) {
        step[r] = read4(delta + lane.channel[r] * ROW + at);
        value[r] = read4(w + lane.channel[r] * ROW + at);
    }
    for (int j = 0; j < STATES; ++j) b[j] = read4(B + lane.state[j] * ROW + at);
    for (int t = 0; t < STEPS; ++t)
        for (int r = 0; r < CHANNELS; ++r)
            for (int j = 0; j < STATES; ++j)
                h[r][j] = fmaf(exp2_fast(step[r].at[t] * A2[r][j]), h[r][j], value[r].at[t] * b[j].at[t]);
}

// STEPS steps back: from the states h before them and the adjoint g behind them to the adjoint before them.
//
// Writes the gradient of w over w, that of delta through the decays over dy, and those of B and C, summed over the
// channels of a warp, to dB and dC, which may be B and C themselves where a segment is within one warp.
__device__ __forceinline__ void walk_back(const Lane& lane, const float* delta, float* w, float* dy, const float* B,
                                          const float* C, float* dB, float* dC, int at, const Tile& A2, const Tile& h0,
                                          Tile& g, Tile& dA) {
    Four step[CHANNELS], value[CHANNELS], b[STATES];
    for (int r = 0; r < CHANNELS; ++r) {
        step[r] = read4(delta + lane.channel[r] * ROW + at);
        value[r] = read4(w + lane.channel[r] * ROW + at);
    }
    for (int j = 0; j < STATES; ++j) b[j] = read4(B + lane.state[j] * ROW + at);
    float h[STEPS + 1][CHANNELS][STATES], decay[STEPS][CHANNELS][STATES];
    for (int r = 0; r < CHANNELS; ++r)
        for (int j = 0; j < STATES; ++j) h[0][r][j] = h0[r][j];
    for (int t = 0; t < STEPS; ++t)
        for (int r = 0; r < CHANNELS; ++r)
            for (int j = 0; j < STATES; ++j) {
                decay[t][r][j] = exp2_fast(step[r].at[t] * A2[r][j]);
                h[t + 1][r][j] = fmaf(decay[t][r][j], h[t][r][j], value[r].at[t] * b[j].at[t]);
            }
    Four out[CHANNELS], c[STATES];
    for (int r = 0; r < CHANNELS; ++r) out[r] = read4(dy + lane.channel[r] * ROW + at);
    for (int j = 0; j < STATES; ++j) c[j] = read4(C + lane.state[j] * ROW + at);
    float dw[CHANNELS][STEPS] = {}, ddecay[CHANNELS][STEPS] = {}, db[STATES][STEPS] = {}, dc[STATES][STEPS] = {};
    for (int i = 0; i < STEPS; ++i) {
        const int t = STEPS - 1 - i;
        for (int r = 0; r < CHANNELS; ++r)
            for (int j = 0; j < STATES; ++j) {
                const float adjoint = fmaf(c[j].at[t], out[r].at[t], g[r][j]);
                dc[j][t] = fmaf(out[r].at[t], h[t + 1][r][j], dc[j][t]);
                db[j][t] = fmaf(adjoint, value[r].at[t], db[j][t]);
                dw[r][t] = fmaf(adjoint, b[j].at[t], dw[r][t]);
                g[r][j] = adjoint * decay[t][r][j];
                const float through = g[r][j] * h[t][r][j];
                ddecay[r][t] = fmaf(through, A2[r][j], ddecay[r][t]);
                dA[r][j] = fmaf(through, step[r].at[t], dA[r][j]);
            }
    }
    // Sums over states: a lane keeps slot 0 of its channels, and one of the two quantities.
    Four kept;
    for (int t = 0; t < STEPS; ++t) {
        dw[0][t] += across(dw[1][t], 1);
        ddecay[0][t] = (ddecay[0][t] + across(ddecay[1][t], 1)) * LN2;
        const float sent = choose(lane.odd, dw[0][t], ddecay[0][t]);
        kept.at[t] = choose(lane.odd, ddecay[0][t], dw[0][t]) + across(sent, 2);
    }
    __syncwarp();  // every lane has read what is written over
    write4(w + (lane.odd & (unsigned)(dy - w)) + lane.channel[0] * ROW + at, kept);
    // Sums over a warp's channels: a lane keeps slots 0 and 1 of its states, then slot 0, then one of the two.
    for (int t = 0; t < STEPS; ++t) {
        for (int j = 0; j < 2; ++j) {
            db[j][t] += across(db[j + 2][t], 8);
            dc[j][t] += across(dc[j + 2][t], 8);
        }
        db[0][t] += across(db[1][t], 4);
        dc[0][t] += across(dc[1][t], 4);
    }
    Four db0, dc0;
    for (int t = 0; t < STEPS; ++t) {
        db0.at[t] = db[0][t];
        dc0.at[t] = dc[0][t];
    }
    if (D == 8) {
        write4(dB + lane.state[0] * ROW + at, db0);
        write4(dC + lane.state[0] * ROW + at, dc0);
    } else {
        for (int t = 0; t < STEPS; ++t) {
            const float sent = choose(lane.third, db0.at[t], dc0.at[t]);
            kept.at[t] = choose(lane.third, dc0.at[t], db0.at[t]) + across(sent, 16);
        }
        write4(dB + (lane.third & (unsigned)(dC - dB)) + lane.state[0] * ROW + at, kept);
    }
}

// What enters each chunk from the summaries of the chunks before it (reversed: behind it), in place.
//
// state: (batch, chunks, rows, N); total, sums of step sizes: (batch, chunks, rows); A: (directions, rows, states), a
// sequence's being that of its number modulo ``directions``.
// A block has 32 states of rows. Each of its warps has AHEAD chunks of a round, all loaded at once; what enters its
// first follows from what the warps before it hand on.
extern "C" __global__ void __launch_bounds__(512)
    combine(float* state, const float* total, const float* A, int rows, int chunks, int states, int directions,
            int reversed, int count) {
    extern __shared__ float shared[];
    constexpr int AHEAD = 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool exists = blockIdx.x * 32 + lane < count;
    const int index = exists ? blockIdx.x * 32 + lane : count - 1;
    const int batch = index / (rows * N), cell = index % (rows * N), row = cell / N, n = cell % N;
    const float A2 = n < states ? A[(batch % directions * rows + row) * states + n] * LOG2E : 0.0f;
    float *states_of_warps = shared, *decays_of_warps = shared + blockDim.x;
    float enters = 0.0f;  // a round
    for (int round = 0; round < chunks; round += warps * AHEAD) {
        const int first = round + warp * AHEAD;
        const auto chunk_at = [&](int i) {
            const int at = min(first + i, chunks - 1);
            return (long long)batch * chunks + (reversed ? chunks - 1 - at : at);
        };
        float reached[AHEAD], decay[AHEAD], carried = 0.0f, through = 1.0f;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            reached[i] = state[chunk_at(i) * rows * N + cell];
            decay[i] = exp2_fast(total[chunk_at(i) * rows + row] * A2);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (first + i < chunks) {
                carried = fmaf(decay[i], carried, reached[i]);
                through *= decay[i];
            }
        }
        states_of_warps[threadIdx.x] = carried;
        decays_of_warps[threadIdx.x] = through;
        __syncthreads();  // also: every warp has loaded the last chunk before one writes it
        for (int w = 0; w < warps; ++w) {
            if (w == warp) carried = enters;
            enters = fmaf(decays_of_warps[w * 32 + lane], enters, states_of_warps[w * 32 + lane]);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (exists && first + i < chunks) state[chunk_at(i) * rows * N + cell] = carried;
            carried = fmaf(decay[i], carried, reached[i]);
        }
        __syncthreads();
    }
}
