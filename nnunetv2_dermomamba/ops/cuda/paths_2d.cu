// The scan of a map of up to 16 channels, forward, of so many maps that whole paths fill a GPU: without summaries, so
// that nothing is projected twice. After scan_2d.cu.
//
// A block of two warps walks a path, PATH_SUB positions at a time. A thread holds one channel and 2 or 4 of its states,
// a quarter or half of what it holds in the other kernels, for else there would be too few threads.

#if D <= 16

constexpr int PATH_THREADS = 64, PATH_SUB = 32;
constexpr int PATH_ROW = PATH_SUB + 4;
constexpr int PATH_STATES = D * N / PATH_THREADS;
constexpr int LANES = N / PATH_STATES;  // of a channel
constexpr int PATH_FLOATS = ROWS * PATH_ROW;
constexpr int PATH_SHARES = PATH_SUB * D / 4 / PATH_THREADS;  // of four channels of a position a thread
constexpr int PATH_UNITS = PATH_SUB / 8 / (PATH_THREADS / 32);  // of eight positions a warp

// Where a thread's states are. Those of a slot lie in different banks, and a slot is one of the backward kernel's.
// Of four lanes side by side two have one channel and the other two have its neighbour, with the same states: four
// floats a lane are read in half the time where four lanes want no more than two different places.
struct PathLane {
    int channel, index, slot[PATH_STATES], state[PATH_STATES];
    int group, part;  // of channels, of four lanes: as in Lane

    __device__ __forceinline__ PathLane() {
        const int lane = threadIdx.x % 32;
        index = (lane & 1) + (lane >> 1 & (LANES - 2));
        channel = threadIdx.x / 32 * (32 / LANES) + lane / (2 * LANES) * 2 + (lane >> 1 & 1);
        group = channel / CHANNELS;
        part = index % 4;
        for (int j = 0; j < PATH_STATES; ++j) {
            slot[j] = j * (LANES / 4) + index / 4;
            state[j] = part + 4 * (slot[j] ^ (group & 3));
        }
    }
};

// A thread's share of a sub-block of a path.
struct PathShare {
    int column[PATH_SHARES], channel[PATH_SHARES];
    __device__ __forceinline__ PathShare() {
        for (int i = 0; i < PATH_SHARES; ++i) {
            const int index = threadIdx.x + i * PATH_THREADS;
            column[i] = index / (D / 4);
            channel[i] = index % (D / 4) * 4;
        }
    }
    __device__ __forceinline__ int cell(int i) const { return channel[i] * PATH_ROW + column[i]; }
};

// A direction's weights as a warp's products read them: rows of delta's pre-activations, of B and of C.
struct PathWeights {
    Left<false> rows[3][D / 8];
    float bias[2];
    __device__ __forceinline__ PathWeights(const float* weights, const float* bias_of, int d) {
        for (int tile = 0; tile < 3; ++tile)
            for (int k = 0; k < D / 8; ++k)
                rows[tile][k] = Left<false>::pairs(weights + (tile ? DT_ROWS + (tile - 1) * N : 0) * WEIGHT + 8 * k,
                                                   WEIGHT, tile ? N : DT_ROWS);
        for (int i = 0; i < 2; ++i) {
            const int c = tile_row() + 8 * i;
            bias[i] = c < d ? bias_of[c] : 0.0f;
        }
    }
};

// Rows of delta and w = delta u, of B and C, from those of u.
__device__ __forceinline__ void project_path(const PathWeights& by, float* shared) {
#pragma unroll
    for (int unit = 0; unit < PATH_UNITS; ++unit) {
        const int column = (threadIdx.x / 32 * PATH_UNITS + unit) * 8;
        float sums[3][4] = {};
        for (int k = 0; k < D / 8; ++k) {
            const auto u = Right<HALF_INPUT>::across(shared + (U + 8 * k) * PATH_ROW + column, PATH_ROW);
            for (int tile = 0; tile < 3; ++tile) multiply(sums[tile], sums[tile], by.rows[tile][k], u);
        }
        each_pair(sums[1], [&](int n, int t, float a, float b) {
            write2(shared + (B_ROW + n) * PATH_ROW + column + t, a, b);
        });
        each_pair(sums[2], [&](int n, int t, float a, float b) {
            write2(shared + (C_ROW + n) * PATH_ROW + column + t, a, b);
        });
        each_pair(sums[0], [&](int c, int t, float a, float b) {
            if (c >= D) return;
            float* to = shared + c * PATH_ROW + column + t;
            const float step = softplus(a + by.bias[c / 8]), next = softplus(b + by.bias[c / 8]);
            write2(to + DELTA * PATH_ROW, step, next);
            write2(to + W * PATH_ROW, step * to[U * PATH_ROW], next * to[U * PATH_ROW + 1]);
        });
    }
}

typedef float PathTile[PATH_STATES];

// SUB steps from states h; writes y = <C, h> over w. Nothing is exchanged or written before the last step, so that rows
// are read ahead.
__device__ __forceinline__ void walk_path(const PathLane& lane, float* rows, const PathTile& A2, PathTile& h) {
    const float* of_channel = rows + lane.channel * PATH_ROW;
    float y[SUB] = {};
#pragma unroll
    for (int at = 0; at < SUB; at += STEPS) {
        const Four step = read4(of_channel + DELTA * PATH_ROW + at), value = read4(of_channel + W * PATH_ROW + at);
        Four b[PATH_STATES], c[PATH_STATES];
        for (int j = 0; j < PATH_STATES; ++j) {
            b[j] = read4(rows + (B_ROW + lane.state[j]) * PATH_ROW + at);
            c[j] = read4(rows + (C_ROW + lane.state[j]) * PATH_ROW + at);
        }
        for (int t = 0; t < STEPS; ++t)
            for (int j = 0; j < PATH_STATES; ++j) {
                h[j] = fmaf(exp2_fast(step.at[t] * A2[j]), h[j], value.at[t] * b[j].at[t]);
                y[at + t] = fmaf(c[j].at[t], h[j], y[at + t]);
            }
    }
    // Sums over states: a lane keeps half of the steps, then half of those, and so on.
    constexpr int KEPT = SUB / LANES;
#pragma unroll
    for (int lanes = LANES / 2, half = SUB / 2; lanes; lanes /= 2, half /= 2) {
        const unsigned late = lane.index & lanes ? ~0u : 0u;
        for (int t = 0; t < half; ++t) {
            const float sent = choose(late, y[t], y[t + half]);
            y[t] = choose(late, y[t + half], y[t]) + across(sent, lanes > 1 ? 2 * lanes : 1);
        }
    }
    __syncwarp();  // every lane has read w
    float* to = rows + (W + lane.channel) * PATH_ROW + lane.index * KEPT;
    for (int t = 0; t < KEPT; t += 2) write2(to + t, y[t], y[t + 1]);
}

// Where a path is among the chunks of the backward pass, and where its states belong that those start from.
struct PathStates {
    float *of_path, *to;  // null where none are kept, or no more
    int chunk, sub;

    __device__ __forceinline__ PathStates(float* kept, const Map& map, int path, const PathLane& lane) {
        const int r = (lane.channel ^ lane.part) & 1, thread = 4 * lane.group + lane.part;
        of_path = kept;
        if (kept)
            of_path += (((long long)path * map.spans * runs_of(map) * CHANNELS + r) * THREADS + thread) * STATES;
        to = of_path;
        chunk = sub = 0;
    }

    __device__ __forceinline__ void keep(const Map& map, const PathLane& lane, const PathTile& h) {
        if (to && sub % RUN == 0) {
            for (int j = 0; j < PATH_STATES; ++j) to[lane.slot[j]] = h[j];
            to += CHANNELS * THREADS * STATES;
        }
        if (++sub == map.subs) {
            sub = 0;
            ++chunk;
            to = nullptr;
            if (of_path && chunk < map.spans * SEGMENTS)
                to = of_path + ((long long)(chunk / SEGMENTS) * runs_of(map) * CHANNELS * THREADS +
                                chunk % SEGMENTS * THREADS_A_SEGMENT) * STATES;
        }
    }
};

// As forward_2d, a block a path: of (batch, 4).
extern "C" __global__ void __launch_bounds__(PATH_THREADS, 6)
    forward_paths_2d(const Input* x, const float* x_proj, const float* dt_projs, const float* bias_of, const float* A,
                     const float* skip, float* kept, float* y, Map map) {
    extern __shared__ float shared[];
    const int direction = blockIdx.x % 4, batch = blockIdx.x / 4, batches = gridDim.x / 4;
    const Path path(map, direction);
    const PathLane lane;
    const PathShare share;
    float* weights = shared + 2 * PATH_FLOATS;
    stage_weights<PATH_THREADS>(x_proj, dt_projs, skip, map, direction, weights);
    PathTile A2, h = {};
    for (int j = 0; j < PATH_STATES; ++j) {
        const bool exists = lane.channel < map.d && lane.state[j] < map.states;
        A2[j] = exists ? A[(direction * map.d + lane.channel) * map.states + lane.state[j]] * LOG2E : 0.0f;
    }
    x += (long long)batch * path.length * map.d;
    y += ((long long)direction * batches + batch) * path.length * map.d;
    Cursor<PATH_SHARES, PATH_SUB> cursor(path, [&](int i) { return share.column[i]; });
    RawFour<Input> in[PATH_SHARES];
    const auto read = [&]() {
        for (int i = 0; i < PATH_SHARES; ++i) in[i] = read_map(x, cursor.position(path, i), share.channel[i], map.d);
    };
    read();
    __syncthreads();
    const PathWeights by(weights, bias_of + direction * map.d, map.d);
    PathStates states(kept, map, blockIdx.x, lane);
#pragma unroll 1
    for (int first = 0; first <= path.last; first += PATH_SUB) {
        // in turn: while results leave the one half, u fills the other
        float* rows = shared + first / PATH_SUB % 2 * PATH_FLOATS;
        int position[PATH_SHARES];
        for (int i = 0; i < PATH_SHARES; ++i) {
            position[i] = cursor.position(path, i);
            for (int k = 0; k < 4; ++k) rows[share.cell(i) + (U + k) * PATH_ROW] = in[i].at(k);
        }
        cursor.move(path, false);
        read();
        __syncthreads();
        project_path(by, rows);
        __syncthreads();
#pragma unroll 1
        for (int half = 0; half < PATH_SUB; half += SUB) {
            states.keep(map, lane, h);
            walk_path(lane, rows + half, A2, h);
        }
        __syncthreads();
        for (int i = 0; i < PATH_SHARES; ++i) {
            const Four by_input = read4(weights + SKIP + share.channel[i]);
            const float* cell = rows + share.cell(i);
            Four out;
            for (int k = 0; k < 4; ++k)
                out.at[k] = fmaf(by_input.at[k], cell[(U + k) * PATH_ROW], cell[(W + k) * PATH_ROW]);
            write_map(y, position[i], share.channel[i], map.d, out);
        }
    }
}

#endif
