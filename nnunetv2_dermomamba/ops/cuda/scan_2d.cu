// The scan of a map in four directions with its projections: summaries of chunks, the scan, its gradients. After
// walk.cuh, input.cuh and products.cuh.
//
// A block projects SUB positions of each of its segments at a time into shared rows and walks them. Each direction has
// its own blocks, and its own map or its own launch, so that sums need no atomics and repeat bit for bit. Compiled with
// -DWHOLE=<whether all D channels exist>.

struct Map {
    int height, width, d, rank, states;
    int spans;  // of SEGMENTS chunks a path
    int subs;   // blocks of SUB positions a chunk
    int first, directions;  // of a launch; one of later directions adds to what is there
};

constexpr int RANK = 8;         // of dt at most
// Floats from row to row of the weights in shared memory, and of dt_projs_weight: other banks.
constexpr int WEIGHT = D == 8 ? 8 : D + 8, LIFT_ROW = RANK + 4;
// Sub-blocks walked back from one kept state: states of two cost half the memory, and a projection and a walk more.
constexpr int RUN = D == 8 ? 1 : 2;
// Few channels: dt_projs_weight is multiplied into x_proj_weight, whose rows of dt become as many as there are
// channels, one or two eights of a product. What is projected is then the pre-activation of delta.
constexpr bool LIFTED = D <= 16;
constexpr int DT_ROWS = LIFTED ? D : RANK;
// The weights: rows of dt, of B and of C; dt_projs_weight as (D, LIFT_ROW) where it is apart; Ds.
constexpr int LIFT = (DT_ROWS + 2 * N) * WEIGHT, SKIP = LIFT + (LIFTED ? 0 : D * LIFT_ROW), WEIGHT_FLOATS = SKIP + D;

// Shared rows of a segment. Those of dy, and of what the backward pass sums, are its own.
constexpr int U = 0, DELTA = D, W = 2 * D, B_ROW = 3 * D, C_ROW = 3 * D + N;
constexpr int DT = LIFTED ? DELTA : 3 * D + 2 * N, ROWS = 3 * D + 2 * N + (LIFTED ? 0 : RANK);
constexpr int DDT = LIFTED ? W : ROWS;                       // gradients of DT's rows
constexpr int DY = (LIFTED ? ROWS : ROWS + RANK) + 4;  // four more than W modulo eight: in other banks
constexpr int SUMS = DY + D;
constexpr int BACKWARD_ROWS = SUMS + (IN_PLACE ? 0 : PARTS * 2 * N);

// A path's cells, in its own order.
struct Path {
    int height, width, length, last;
    bool column, reverse;

    __device__ __forceinline__ Path(const Map& map, int direction) {
        height = map.height;
        width = map.width;
        length = height * width;
        last = map.spans * SEGMENTS * map.subs * SUB - 1;
        column = direction & 1;
        reverse = direction >> 1;
    }
    __device__ __forceinline__ int cell(int step) const { return reverse ? last - step : step; }
};

// A thread's share of a map: four channels of two positions of its group's segments a sub-block.
struct MapShare {
    static constexpr int QUADS = D / 4 < 4 ? D / 4 : 4;  // of channels side by side
    int segment[2], column[2], channel[2];

    __device__ __forceinline__ MapShare() {
        for (int i = 0; i < 2; ++i) {
            const int index = threadIdx.x % GROUP + i * GROUP;
            column[i] = index / QUADS % SUB;
            const int rest_of = index / QUADS / SUB;
            channel[i] = 4 * (index % QUADS + rest_of % (D / 4 / QUADS) * QUADS);
            segment[i] = threadIdx.x / GROUP * GROUP_SEGMENTS + rest_of / (D / 4 / QUADS);
        }
    }
    __device__ __forceinline__ int cell(int rows, int i) const {
        return segment[i] * segment_floats(rows) + channel[i] * ROW + column[i];
    }
};

// Where a thread's COUNT shares of a sub-block are in the map: row (of a column-major path) or position, followed from
// sub-block to sub-block, of LENGTH positions, without division.
template <int COUNT, int LENGTH>
struct Cursor {
    int cell[COUNT], line[COUNT], across_lines[COUNT];  // cell = across_lines height + line, along columns

    template <typename F>
    __device__ __forceinline__ Cursor(const Path& path, F step_of) {
        for (int i = 0; i < COUNT; ++i) {
            cell[i] = path.cell(step_of(i));
            across_lines[i] = path.column ? cell[i] / path.height : 0;
            line[i] = cell[i] - across_lines[i] * path.height;
        }
    }
    // To the next sub-block along the path, or (back) to the one before.
    __device__ __forceinline__ void move(const Path& path, bool back) {
        const bool up = path.reverse == back;
        for (int i = 0; i < COUNT; ++i) {
            cell[i] += up ? LENGTH : -LENGTH;
            line[i] += up ? LENGTH : -LENGTH;
            if (path.column) {
                while (line[i] >= path.height) {
                    line[i] -= path.height;
                    ++across_lines[i];
                }
                while (line[i] < 0) {
                    line[i] += path.height;
                    --across_lines[i];
                }
            }
        }
    }
    // Position in the map, -1 where there is none.
    __device__ __forceinline__ int position(const Path& path, int i) const {
        const int at = path.column ? line[i] * path.width + across_lines[i] : cell[i];
        return (unsigned)cell[i] < (unsigned)path.length ? at : -1;
    }
};
typedef Cursor<2, SUB> MapCursor;

__device__ __forceinline__ MapCursor start(const MapShare& share, const Path& path, const Map& map, int span, int sub) {
    return MapCursor(path, [&](int i) {
        return (span * SEGMENTS + share.segment[i]) * map.subs * SUB + sub * SUB + share.column[i];
    });
}

// Four channels of a position as they are stored, in words of 32 bits: until they are widened nothing waits for their
// load, which it would if the compiler saw parts of words.
template <typename T>
struct alignas(4 * sizeof(T)) RawFour {
    unsigned words[sizeof(T)];

    __device__ __forceinline__ void set(int k, float x) { words[k] = __float_as_uint(x); }
    __device__ __forceinline__ void set(int k, unsigned short x) { words[k / 2] |= (unsigned)x << 16 * (k % 2); }
    __device__ __forceinline__ float at(int k) const {
        if (sizeof(T) == 4) return __uint_as_float(words[k]);
        return widen((Input)(words[k / 2] >> 16 * (k % 2)));
    }
};

template <typename T>
__device__ __forceinline__ RawFour<T> read_map(const T* map, int position, int channel, int d) {
    RawFour<T> v = {};
    if (position < 0) return v;
    const T* from = map + (long long)position * d + channel;
    if (WHOLE) return *reinterpret_cast<const RawFour<T>*>(from);
    for (int k = 0; k < 4; ++k)
        if (channel + k < d) v.set(k, from[k]);
    return v;
}

__device__ __forceinline__ void write_map(float* map, int position, int channel, int d, const Four& v) {
    if (position < 0) return;
    float* to = map + (long long)position * d + channel;
    if (WHOLE) return write4(to, v);
    for (int k = 0; k < 4; ++k)
        if (channel + k < d) to[k] = v.at[k];
}

__device__ __forceinline__ void write_rounded(Input* map, int position, int channel, int d, const Four& v) {
    if (position < 0) return;
    FourInputs rounded;
    for (int k = 0; k < 4; ++k) rounded.at[k] = narrow(v.at[k]);
    Input* to = map + (long long)position * d + channel;
    if (WHOLE) {
        *reinterpret_cast<FourInputs*>(to) = rounded;
        return;
    }
    for (int k = 0; k < 4; ++k)
        if (channel + k < d) to[k] = rounded.at[k];
}

// A thread's share of a sub-block of a map, on its way.
template <typename T>
struct LoadedMap {
    RawFour<T> v[2];
    __device__ __forceinline__ void read(const T* map, const MapShare& share, const int (&position)[2], int d) {
        for (int i = 0; i < 2; ++i) v[i] = read_map(map, position[i], share.channel[i], d);
    }
    __device__ __forceinline__ void read(const T* map, const MapShare& share, const Path& path, const MapCursor& cursor,
                                         int d) {
        read(map, share, {cursor.position(path, 0), cursor.position(path, 1)}, d);
    }
    __device__ __forceinline__ void place(const MapShare& share, float* shared, int rows, int first) const {
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 4; ++k) shared[share.cell(rows, i) + (first + k) * ROW] = v[i].at(k);
    }
};

// Four weights of a direction's row among those in shared memory, from channel c.
__device__ __forceinline__ Four read_weights(const float* x_proj, const float* dt_projs, const Map& map, int row,
                                             int c) {
    const auto of = [&](int source) {
        Four v = {};
        if (WHOLE) return read4(x_proj + source * D + c);
        for (int k = 0; k < 4; ++k)
            if (c + k < map.d) v.at[k] = x_proj[source * map.d + c + k];
        return v;
    };
    if (row >= DT_ROWS) {
        const int n = (row - DT_ROWS) % N;
        return n < map.states ? of(map.rank + (row - DT_ROWS) / N * map.states + n) : Four{};
    }
    if (!LIFTED) return row < map.rank ? of(row) : Four{};
    Four sum = {};
    if (row < map.d)
        for (int r = 0; r < map.rank; ++r) {
            const Four v = of(r);
            for (int k = 0; k < 4; ++k) sum.at[k] = fmaf(dt_projs[row * map.rank + r], v.at[k], sum.at[k]);
        }
    return sum;
}

// A direction's weights in shared memory, by COUNT threads. All are on their way before the first is written.
template <int COUNT = THREADS>
__device__ __forceinline__ void stage_weights(const float* x_proj, const float* dt_projs, const float* skip,
                                              const Map& map, int direction, float* weights) {
    constexpr int QUADS = (DT_ROWS + 2 * N) * D / 4, LIFTS = LIFTED ? 0 : D * RANK;
    Four quads[(QUADS + COUNT - 1) / COUNT];
    float lifts[(LIFTS + COUNT - 1) / COUNT + 1] = {};  // one more, since an array has a length
    x_proj += direction * (map.rank + 2 * map.states) * map.d;
    dt_projs += direction * map.d * map.rank;
#pragma unroll
    for (int first = 0; first < QUADS; first += COUNT) {
        const int index = first + threadIdx.x;
        if (index < QUADS)
            quads[first / COUNT] = read_weights(x_proj, dt_projs, map, index * 4 / D, index * 4 % D);
    }
#pragma unroll
    for (int first = 0; first < LIFTS; first += COUNT) {
        const int c = (first + threadIdx.x) / RANK, r = (first + threadIdx.x) % RANK;
        if (c < map.d && r < map.rank) lifts[first / COUNT] = dt_projs[c * map.rank + r];
    }
    for (int c = threadIdx.x; c < D; c += COUNT)
        weights[SKIP + c] = skip && c < map.d ? skip[direction * map.d + c] : 0.0f;
#pragma unroll
    for (int first = 0; first < QUADS; first += COUNT) {
        const int index = first + threadIdx.x;
        if (index < QUADS) write4(weights + index * 4 / D * WEIGHT + index * 4 % D, quads[first / COUNT]);
    }
#pragma unroll
    for (int first = 0; first < LIFTS; first += COUNT) {
        const int index = first + threadIdx.x;
        if (index < LIFTS) weights[LIFT + index / RANK * LIFT_ROW + index % RANK] = lifts[first / COUNT];
    }
}

// The rows of a warp's segments, and which of the warps that share them it is.
__device__ __forceinline__ float* of_warp(float* shared, int rows) {
    return shared + (int)(threadIdx.x / GROUP) * GROUP_SEGMENTS * segment_floats(rows);
}
__device__ __forceinline__ int warp_of_group() { return GROUP_WARPS > 1 ? threadIdx.x % GROUP / 32 : 0; }

// A thread's share of rows over time.
struct RowShare {
    Share share;
    int cell;
    __device__ __forceinline__ explicit RowShare(int rows) { cell = share.cell(rows); }
};

// Biases of the channels whose delta a thread computes: of its columns of a product, or of its rows.
struct Bias {
    float of[LIFTED ? D / 4 : CHANNEL_ROWS];
    __device__ __forceinline__ Bias(const Map& map, const float* bias, int direction) {
        const Share share;
        for (int i = 0; i < sizeof(of) / sizeof(float); ++i) {
            const int c = LIFTED ? i / 2 * 8 + 2 * lane_k() + i % 2 : share.row + i * PASS;
            of[i] = c < map.d ? bias[direction * map.d + c] : 0.0f;
        }
    }
};

// From rows of u those of delta (dt where that is apart), of B (unless C alone is wanted), C (unless B alone is) and,
// for the forward walk, w = delta u: a product of a segment's positions by channels and channels by rows, whose eights
// are shared out among a group's warps. Where nothing exists delta is what it is, but u and dy are 0, and so is every
// product with them: w, B, C, and all gradients.
template <bool WITH_B, bool WITH_C>
__device__ __forceinline__ void project(const Bias& bias, float* shared, const float* weights, int rows) {
    constexpr int TILES = (DT_ROWS + (WITH_B + WITH_C) * N) / 8, OWN = (TILES + GROUP_WARPS - 1) / GROUP_WARPS;
    constexpr int AHEAD = D < 64 ? D / 8 : 4;  // products whose left factors are in registers
    shared = of_warp(shared, rows);
    float sums[OWN][GROUP_SEGMENTS][4] = {}, rests[OWN][GROUP_SEGMENTS][4] = {};
    Left<HALF_INPUT> u[AHEAD][GROUP_SEGMENTS];
#pragma unroll 1
    for (int first = 0; first < D; first += 8 * AHEAD) {
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
#pragma unroll
            for (int s = 0; s < GROUP_SEGMENTS; ++s)
                u[k][s] = Left<HALF_INPUT>::across(shared + s * segment_floats(rows) + (U + first + 8 * k) * ROW, ROW);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int row = 8 * (warp_of_group() + i * GROUP_WARPS);
            if (row >= 8 * TILES) continue;
            const float* from = weights + (row < DT_ROWS || WITH_B ? row : row + N) * WEIGHT + first;
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                const auto by = Right<false>::pairs(from + 8 * k, WEIGHT);
#pragma unroll
                for (int s = 0; s < GROUP_SEGMENTS; ++s)
                    multiply(sums[i][s], LIFTED ? sums[i][s] : rests[i][s], u[k][s], by);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int row = 8 * (warp_of_group() + i * GROUP_WARPS);
        if (row >= 8 * TILES) continue;
        const int to = row < DT_ROWS ? DT + row : (WITH_B ? B_ROW : C_ROW) + row - DT_ROWS;
#pragma unroll
        for (int s = 0; s < GROUP_SEGMENTS; ++s) {
            float* at = shared + s * segment_floats(rows) + to * ROW;
            for (int k = 0; k < 4; ++k) {
                if (!LIFTED) sums[i][s][k] += rests[i][s][k];
                if (LIFTED && row < DT_ROWS) sums[i][s][k] = softplus(sums[i][s][k] + bias.of[2 * i + k % 2]);
            }
            store_across<false>(sums[i][s], at, ROW);
            if (LIFTED && row < DT_ROWS && WITH_B) {  // of u a lane has the same places as of delta
                for (int k = 0; k < 4; ++k) sums[i][s][k] *= u[i % AHEAD][s].high[k / 2 + k % 2 * 2];
                store_across<false>(sums[i][s], at + (W - DELTA) * ROW, ROW);
            }
        }
    }
}

// Rows of delta = softplus(dt_projs_weight dt + bias) and w from those of dt.
template <bool WITH_W>
__device__ __forceinline__ void lift(const RowShare& mine, const Bias& bias, const Map& map, const float* weights,
                                     float* shared) {
    float raw[CHANNEL_ROWS][4];
    for (int i = 0; i < CHANNEL_ROWS; ++i)
        for (int k = 0; k < 4; ++k) raw[i][k] = bias.of[i];
#pragma unroll 1
    for (int r = 0; r < map.rank; ++r) {
        const Four dt = read4(shared + mine.cell + (DT + r - mine.share.row) * ROW);
        for (int i = 0; i < CHANNEL_ROWS; ++i) {
            const float by = weights[LIFT + (mine.share.row + i * PASS) * LIFT_ROW + r];
            for (int k = 0; k < 4; ++k) raw[i][k] = fmaf(by, dt.at[k], raw[i][k]);
        }
    }
    for (int i = 0; i < CHANNEL_ROWS; ++i) {
        float* cell = shared + mine.cell + i * PASS * ROW;
        Four steps;
        for (int k = 0; k < 4; ++k) steps.at[k] = softplus(raw[i][k]);
        write4(cell + DELTA * ROW, steps);
        if (WITH_W) {
            Four w = read4(cell + U * ROW);
            for (int k = 0; k < 4; ++k) w.at[k] *= steps.at[k];
            write4(cell + W * ROW, w);
        }
    }
}

// All rows that a walk needs from those of u.
template <bool WITH_B, bool WITH_C>
__device__ __forceinline__ void make_rows(const RowShare& mine, const Bias& bias, const Map& map, const float* weights,
                                          float* shared, int rows) {
    group_sync();
    project<WITH_B, WITH_C>(bias, shared, weights, rows);
    group_sync();
    if (LIFTED) return;
    lift<WITH_B>(mine, bias, map, weights, shared);
    group_sync();
}

__device__ __forceinline__ void read_decays(const float* A, const Map& map, int direction, const Lane& lane, Tile& A2) {
    for (int r = 0; r < CHANNELS; ++r)
        for (int j = 0; j < STATES; ++j) {
            const int c = lane.channel[r], n = lane.state[j];
            const bool exists = c < map.d && n < map.states;
            A2[r][j] = exists ? A[(direction * map.d + c) * map.states + n] * LOG2E : 0.0f;
        }
}

// Which span of which path a block has: one of (batch, directions, spans).
struct Where {
    int span, direction, batch;
    long long number;  // of (batch, 4, spans)

    __device__ __forceinline__ explicit Where(const Map& map) {
        span = blockIdx.x % map.spans;
        direction = map.first + blockIdx.x / map.spans % map.directions;
        batch = blockIdx.x / map.spans / map.directions;
        number = ((long long)batch * 4 + direction) * map.spans + span;
    }
    // Of the first element of the batch's map, among maps of (batch, ...).
    __device__ __forceinline__ long long offset(const Map& map) const {
        return (long long)batch * map.height * map.width * map.d;
    }
    // The same among maps of (directions, batch, ...).
    __device__ __forceinline__ long long own_offset(const Map& map) const {
        const int batches = gridDim.x / map.spans / map.directions;
        return (long long)((direction - map.first) * batches + batch) * map.height * map.width * map.d;
    }
};

// Row of the first channel of a lane's chunk among the chunks' states (batch, 4, chunks, d, N).
__device__ __forceinline__ long long chunk_row(const Map& map, const Where& where, const Lane& lane) {
    return (where.number * SEGMENTS + lane.segment) * map.d;
}

__device__ __forceinline__ void read_chunk(const float* states, const Map& map, const Where& where, const Lane& lane,
                                           Tile& h) {
    states += chunk_row(map, where, lane) * N;
    for (int r = 0; r < CHANNELS; ++r)
        for (int j = 0; j < STATES; ++j)
            h[r][j] = lane.channel[r] < map.d ? states[lane.channel[r] * N + lane.state[j]] : 0.0f;
}

template <bool ADJOINT>
__device__ __forceinline__ void summarise(float* shared, const Input* x, const float* dy, const float* x_proj,
                                          const float* dt_projs, const float* bias_of, const float* A, float* state,
                                          float* total, const Map& map) {
    const Where where(map);
    const Path path(map, where.direction);
    const Lane lane;
    const MapShare share;
    const RowShare mine(ROWS);
    const Bias bias(map, bias_of, where.direction);
    float* weights = shared + SEGMENTS * segment_floats(ROWS);
    const float* rows = shared + lane.segment * segment_floats(ROWS);
    x += where.offset(map);
    if (ADJOINT) dy += where.offset(map);
    Tile A2, h = {};
    float sum[CHANNELS] = {};
    LoadedMap<Input> in;
    LoadedMap<float> out;
    MapCursor cursor = start(share, path, map, where.span, ADJOINT ? map.subs - 1 : 0);
    in.read(x, share, path, cursor, map.d);
    if (ADJOINT) out.read(dy, share, path, cursor, map.d);
    read_decays(A, map, where.direction, lane, A2);
    stage_weights(x_proj, dt_projs, nullptr, map, where.direction, weights);
    __syncthreads();
    for (int i = 0; i < map.subs; ++i) {
        in.place(share, shared, ROWS, U);
        if (ADJOINT) out.place(share, shared, ROWS, W);
        if (i + 1 < map.subs) {
            cursor.move(path, ADJOINT);
            in.read(x, share, path, cursor, map.d);
            if (ADJOINT) out.read(dy, share, path, cursor, map.d);
        }
        make_rows<!ADJOINT, ADJOINT>(mine, bias, map, weights, shared, ROWS);
        const float* by = rows + (ADJOINT ? C_ROW : B_ROW) * ROW;
        walk_summary<ADJOINT>(lane, rows + DELTA * ROW, rows + W * ROW, by, A2, h, sum);
        group_sync();
    }
    for (int r = 0; r < CHANNELS; ++r) {
        if (lane.channel[r] >= map.d) continue;
        const long long row = chunk_row(map, where, lane) + lane.channel[r];
        if (threadIdx.x / 2 % 2 == 0) total[row] = sum[r];
        for (int j = 0; j < STATES; ++j) state[row * N + lane.state[j]] = h[r][j];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    summary_2d(const Input* x, const float* x_proj, const float* dt_projs, const float* bias, const float* A,
               float* state, float* total, Map map) {
    extern __shared__ float shared[];
    summarise<false>(shared, x, nullptr, x_proj, dt_projs, bias, A, state, total, map);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    adjoint_2d(const Input* x, const float* dy, const float* x_proj, const float* dt_projs, const float* bias,
               const float* A, float* state, float* total, Map map) {
    extern __shared__ float shared[];
    summarise<true>(shared, x, dy, x_proj, dt_projs, bias, A, state, total, map);
}

// Runs of RUN sub-blocks a chunk.
__device__ __forceinline__ int runs_of(const Map& map) { return (map.subs + RUN - 1) / RUN; }

// What the backward pass starts from: a thread's states before every run, as (batch, 4, spans, runs, CHANNELS, THREADS,
// STATES).
__device__ __forceinline__ long long kept_at(const Map& map, const Where& where, int run, int r) {
    return (((where.number * runs_of(map) + run) * CHANNELS + r) * THREADS + threadIdx.x) * STATES;
}

// y of each direction: (4, batch, height, width, d). Without ``kept``, no states are.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    forward_2d(const Input* x, const float* x_proj, const float* dt_projs, const float* bias_of, const float* A,
               const float* skip, const float* starts, float* kept, float* y, Map map) {
    extern __shared__ float shared[];
    const Where where(map);
    const Path path(map, where.direction);
    const Lane lane;
    const MapShare share;
    const RowShare mine(ROWS);
    const Bias bias(map, bias_of, where.direction);
    float* weights = shared + SEGMENTS * segment_floats(ROWS);
    float* rows = shared + lane.segment * segment_floats(ROWS);
    x += where.offset(map);
    y += where.own_offset(map);
    Tile A2, h;
    LoadedMap<Input> in;
    MapCursor cursor = start(share, path, map, where.span, 0);
    in.read(x, share, path, cursor, map.d);
    read_decays(A, map, where.direction, lane, A2);
    read_chunk(starts, map, where, lane, h);
    stage_weights(x_proj, dt_projs, skip, map, where.direction, weights);
    __syncthreads();
#pragma unroll 1
    for (int sub = 0; sub < map.subs; ++sub) {
        if (kept && sub % RUN == 0)
            for (int r = 0; r < CHANNELS; ++r) write4(kept + kept_at(map, where, sub / RUN, r), states_of(h[r]));
        in.place(share, shared, ROWS, U);
        const int position[2] = {cursor.position(path, 0), cursor.position(path, 1)};
        cursor.move(path, false);
        if (sub + 1 < map.subs) in.read(x, share, path, cursor, map.d);
        make_rows<true, true>(mine, bias, map, weights, shared, ROWS);
        walk_output(lane, rows + DELTA * ROW, rows + W * ROW, rows + B_ROW * ROW, rows + C_ROW * ROW, A2, h);
        group_sync();
        for (int i = 0; i < 2; ++i) {
            const int channel = share.channel[i];
            const Four by = read4(weights + SKIP + channel);
            const float* cell = shared + share.cell(ROWS, i);
            Four out;
            for (int k = 0; k < 4; ++k) out.at[k] = fmaf(by.at[k], cell[(U + k) * ROW], cell[(W + k) * ROW]);
            write_map(y, position[i], channel, map.d, out);
        }
        group_sync();
    }
}

// Sums of a warp's products over positions: gradients of the projections' rows (B, C, dt) and, where it is apart, of
// dt_projs_weight.
constexpr int COLUMN_TILES = D == 8 ? 1 : 2;  // of eight channels a warp
struct WeightSums {
    float rows[3][COLUMN_TILES][4] = {};
    float lift[4] = {};
};

// What follows a sub-block's walk back: gradients of dt, of x and of the weights from those of delta, w, B and C.
__device__ __forceinline__ void products_back(const float* weights, float* shared, WeightSums& sums) {
    const int own = warp_of_group() * COLUMN_TILES * 8;  // of the channels
    shared = of_warp(shared, BACKWARD_ROWS);
    if (!LIFTED && warp_of_group() == 0) {  // ddt = ddelta dt_projs_weight, by positions
        float ddt[2][4] = {}, rests[2][4] = {};
#pragma unroll(D < 64 ? D / 8 : 4)
        for (int k = 0; k < D / 8; ++k)
            multiply(ddt[k % 2], rests[k % 2], Left<false>::across(shared + (W + 8 * k) * ROW, ROW),
                     Right<false>::across(weights + LIFT + 8 * k * LIFT_ROW, LIFT_ROW));
        for (int i = 0; i < 4; ++i) ddt[0][i] += ddt[1][i] + (rests[0][i] + rests[1][i]);
        store_across<false>(ddt[0], shared + DDT * ROW, ROW);
    }
    if (!LIFTED) group_sync();
    // dx += (dB, dC, ddt) x_proj_weight, by positions.
    float dx[GROUP_SEGMENTS][COLUMN_TILES][4] = {}, rests[GROUP_SEGMENTS][COLUMN_TILES][4] = {};
#pragma unroll
    for (int k = 0; k < 2 * N + DT_ROWS; k += 8) {
        const int from = k < 2 * N ? DT_ROWS + k : k - 2 * N, row = k < 2 * N ? B_ROW + k : DDT + k - 2 * N;
        Right<false> by[COLUMN_TILES];
        for (int n = 0; n < COLUMN_TILES; ++n)
            by[n] = Right<false>::across(weights + from * WEIGHT + own + n * 8, WEIGHT);
        for (int s = 0; s < GROUP_SEGMENTS; ++s) {
            const auto a = Left<false>::across(shared + s * segment_floats(BACKWARD_ROWS) + row * ROW, ROW);
            for (int n = 0; n < COLUMN_TILES; ++n) multiply(dx[s][n], rests[s][n], a, by[n]);
        }
    }
    for (int s = 0; s < GROUP_SEGMENTS; ++s)
        for (int n = 0; n < COLUMN_TILES; ++n) {
            for (int i = 0; i < 4; ++i) dx[s][n][i] += rests[s][n][i];
            store_across<true>(dx[s][n], shared + s * segment_floats(BACKWARD_ROWS) + (DELTA + own + n * 8) * ROW, ROW);
        }
    // Sums over positions: a warp has COLUMN_TILES of the channels, and one of 16 for dt_projs_weight.
#pragma unroll
    for (int s = 0; s < GROUP_SEGMENTS; ++s) {
        const float* rows = shared + s * segment_floats(BACKWARD_ROWS);
#pragma unroll
        for (int k = 0; k < SUB; k += 8) {
            Right<HALF_INPUT> u[COLUMN_TILES];
            for (int n = 0; n < COLUMN_TILES; ++n)
                u[n] = Right<HALF_INPUT>::along(rows + (U + own + n * 8) * ROW + k, ROW);
            for (int m = 0; m < 3; ++m) {
                const auto a =
                    Left<false>::along(rows + (m < 2 ? B_ROW + m * N : DDT) * ROW + k, ROW, m < 2 ? N : DT_ROWS);
                for (int n = 0; n < COLUMN_TILES; ++n) multiply(sums.rows[m][n], sums.rows[m][n], a, u[n]);
            }
            if (LIFTED) continue;
            multiply(sums.lift, sums.lift, Left<false>::along(rows + (W + own) * ROW + k, ROW),
                     Right<false>::along(rows + DT * ROW + k, ROW));
        }
    }
}

// dx likewise, and a block's own partial sums of the parameters' gradients: (batch, spans, 4, ...), dt's in
// ``ddt_projs`` where the weights are LIFTED, which is then (batch, spans, 4, d, d). The launch of the last direction,
// which completes dx, writes it to ``rounded`` instead, if that is given.
extern "C" __global__ void __launch_bounds__(THREADS, D == 8 ? 3 : 1)
    backward_2d(const float* dy, const Input* x, const float* x_proj, const float* dt_projs, const float* bias_of,
                const float* A, const float* skip, const float* kept, const float* adjoints, float* dx,
                Input* rounded, float* dx_proj, float* ddt_projs, float* dbias, float* dA, float* dskip, Map map) {
    extern __shared__ float shared[];
    const Where where(map);
    const Path path(map, where.direction);
    const Lane lane;
    const MapShare share;
    const RowShare mine(BACKWARD_ROWS);
    const Bias bias(map, bias_of, where.direction);
    float* weights = shared + SEGMENTS * segment_floats(BACKWARD_ROWS);
    float* before = weights + WEIGHT_FLOATS + threadIdx.x * STATES;  // states every STEPS positions of a run
    float* rows = shared + lane.segment * segment_floats(BACKWARD_ROWS);
    float* dm = rows + (IN_PLACE ? B_ROW : SUMS + warp_of_group() * 2 * N) * ROW;
    x += where.offset(map);
    dy += where.offset(map);
    dx += where.own_offset(map);
    if (map.first + map.directions < 4) rounded = nullptr;
    if (rounded) rounded += where.offset(map);
    Tile A2, h, g, sum_dA = {};
    float sum_bias[CHANNEL_ROWS] = {}, sum_skip[CHANNEL_ROWS] = {};
    WeightSums sums;
    read_decays(A, map, where.direction, lane, A2);
    read_chunk(adjoints, map, where, lane, g);
    stage_weights(x_proj, dt_projs, skip, map, where.direction, weights);
    __syncthreads();
    // A run is walked forward, its states kept, and then back; the last sub-block's rows serve both walks.
    int run = (map.subs - 1) / RUN, step = 0;
    MapCursor cursor = start(share, path, map, where.span, RUN * run);
    LoadedMap<Input> in;
    LoadedMap<float> out;
    in.read(x, share, path, cursor, map.d);
    out.read(dy, share, path, cursor, map.d);
#pragma unroll 1
    while (run >= 0) {
        const int count = min(RUN, map.subs - RUN * run), second = count == 2 && step == 1;
        const bool forth = RUN == 1 || step < count, back = RUN == 1 || step >= count - 1;
        const bool last = RUN == 1 || step == 2 * count - 2;
        float* entered = before + second * (SUB / STEPS) * CHANNELS * THREADS * STATES;
        if (RUN == 1 || step == 0)
            for (int r = 0; r < CHANNELS; ++r) {
                const Four from = read4(kept + kept_at(map, where, run, r));
                for (int j = 0; j < STATES; ++j) h[r][j] = from.at[j];
            }
        in.place(share, shared, BACKWARD_ROWS, U);
        if (back) out.place(share, shared, BACKWARD_ROWS, DY);
        const int position[2] = {cursor.position(path, 0), cursor.position(path, 1)};
        cursor.move(path, last || step == 1);
        if (RUN == 2 && last) cursor.move(path, true);
        if (!back) {
            in.read(x, share, path, cursor, map.d);
            out.read(dy, share, path, cursor, map.d);
        }
        make_rows<true, true>(mine, bias, map, weights, shared, BACKWARD_ROWS);
        if (forth) {
#pragma unroll
            for (int q = 0; q < SUB / STEPS; ++q) {
                for (int r = 0; r < CHANNELS; ++r)
                    write4(entered + (q * CHANNELS + r) * THREADS * STATES, states_of(h[r]));
                if (q < SUB / STEPS - 1 || !back)
                    walk_states(lane, rows + DELTA * ROW, rows + W * ROW, rows + B_ROW * ROW, q * STEPS, A2, h);
            }
        }
        if (!back) {
            group_sync();
            ++step;
            continue;
        }
        for (int i = 0; i < CHANNEL_ROWS; ++i) {
            const float* cell = shared + mine.cell + i * PASS * ROW;
            const Four in = read4(cell + U * ROW), out = read4(cell + DY * ROW);
            for (int k = 0; k < 4; ++k) sum_skip[i] = fmaf(out.at[k], in.at[k], sum_skip[i]);
        }
        group_sync();  // before dy is written over
#pragma unroll 1
        for (int q = SUB / STEPS - 1; q >= 0; --q) {
            for (int r = 0; r < CHANNELS; ++r) {
                const Four from = read4(entered + (q * CHANNELS + r) * THREADS * STATES);
                for (int j = 0; j < STATES; ++j) h[r][j] = from.at[j];
            }
            walk_back(lane, rows + DELTA * ROW, rows + W * ROW, rows + DY * ROW, rows + B_ROW * ROW,
                      rows + C_ROW * ROW, dm, dm + N * ROW, q * STEPS, A2, h, g, sum_dA);
        }
        group_sync();
        // Gradients of the pre-activations over w, those of x that bypass the projections over delta. The former are 0
        // where nothing exists: u is, and the adjoint or the state.
        for (int i = 0; i < CHANNEL_ROWS; ++i) {
            float* cell = shared + mine.cell + i * PASS * ROW;
            const Four in = read4(cell + U * ROW), steps = read4(cell + DELTA * ROW);
            const Four by_input = read4(cell + W * ROW), by_decay = read4(cell + DY * ROW);
            Four ddelta, direct;
            for (int k = 0; k < 4; ++k) {
                ddelta.at[k] = fmaf(in.at[k], by_input.at[k], by_decay.at[k]) * softplus_slope(steps.at[k]);
                sum_bias[i] += ddelta.at[k];
                direct.at[k] = steps.at[k] * by_input.at[k];
            }
            write4(cell + W * ROW, ddelta);
            write4(cell + DELTA * ROW, direct);
        }
        if (!IN_PLACE) {
            for (int i = 0; i < STATE_ROWS; ++i) {
                if (mine.share.row + i * PASS >= N) continue;
                for (int m = 0; m < 2; ++m) {
                    float* cell = shared + mine.cell + (m * N + i * PASS) * ROW;
                    Four sum = {};
                    for (int p = 0; p < PARTS; ++p) {
                        const Four one = read4(cell + (SUMS + p * 2 * N) * ROW);
                        for (int k = 0; k < 4; ++k) sum.at[k] += one.at[k];
                    }
                    write4(cell + B_ROW * ROW, sum);
                }
            }
        }
        LoadedMap<float> given, earlier = {};  // dy again, for the walk wrote over it, and dx
        given.read(dy, share, position, map.d);
        if (map.first) earlier.read(dx, share, position, map.d);
        in.read(x, share, path, cursor, map.d);
        if (RUN == 1 || !last) out.read(dy, share, path, cursor, map.d);
        group_sync();
        products_back(weights, shared, sums);
        group_sync();
        for (int i = 0; i < 2; ++i) {
            const int channel = share.channel[i];
            const Four by = read4(weights + SKIP + channel);
            const float* cell = shared + share.cell(BACKWARD_ROWS, i);
            Four out;
            for (int k = 0; k < 4; ++k)
                out.at[k] = earlier.v[i].at(k) + fmaf(by.at[k], given.v[i].at(k), cell[(DELTA + k) * ROW]);
            if (rounded)
                write_rounded(rounded, position[i], channel, map.d, out);
            else
                write_map(dx, position[i], channel, map.d, out);
        }
        group_sync();
        run -= last;
        step = last ? 0 : step + 1;
    }

    // The block's sums, by way of the shared rows.
    __syncthreads();
    const long long partial = ((long long)where.batch * map.spans + where.span) * 4 + where.direction;
    const int group = threadIdx.x / GROUP, warp = warp_of_group();
    constexpr int GROUPS = THREADS / GROUP, PROJECTIONS = (2 * N + DT_ROWS) * D;
    constexpr int PER_GROUP = PROJECTIONS + (LIFTED ? 0 : D * RANK);
    float* own = shared + group * PER_GROUP;
    for (int n = 0; n < COLUMN_TILES; ++n)
        for (int m = 0; m < 3; ++m)
            each_pair(sums.rows[m][n], [&](int row, int c, float a, float b) {
                if (m < 2 || row < DT_ROWS) write2(own + (m * N + row) * D + (warp * COLUMN_TILES + n) * 8 + c, a, b);
            });
    if (!LIFTED)
        each_pair(sums.lift, [&](int c, int r, float a, float b) {
            write2(own + PROJECTIONS + (warp * 16 + c) * RANK + r, a, b);
        });
    __syncthreads();
    for (int index = threadIdx.x; index < PER_GROUP; index += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < GROUPS; ++i) sum += shared[i * PER_GROUP + index];
        if (index < PROJECTIONS) {
            const int row = index / D, c = index % D, n = row % N, low = row - 2 * N;
            if (c >= map.d) continue;
            if (LIFTED && low >= 0) {
                if (low < map.d) ddt_projs[(partial * map.d + low) * map.d + c] = sum;
            } else if (low >= 0 ? low < map.rank : n < map.states) {
                const int to = low >= 0 ? low : map.rank + row / N * map.states + n;
                dx_proj[(partial * (map.rank + 2 * map.states) + to) * map.d + c] = sum;
            }
        } else {
            const int c = (index - PROJECTIONS) / RANK, r = index % RANK;
            if (c < map.d && r < map.rank) ddt_projs[(partial * map.d + c) * map.rank + r] = sum;
        }
    }
    __syncthreads();
    float* vectors = shared + SEGMENTS * D * N;
    for (int r = 0; r < CHANNELS; ++r)
        for (int j = 0; j < STATES; ++j)
            shared[(lane.segment * D + lane.channel[r]) * N + lane.state[j]] = sum_dA[r][j];
    for (int i = 0; i < CHANNEL_ROWS; ++i) {
        for (int lanes = 1; lanes < SUB / 4; lanes *= 2) {
            sum_skip[i] += across(sum_skip[i], lanes);
            sum_bias[i] += across(sum_bias[i], lanes);
        }
        if (mine.share.quad == 0) {
            vectors[mine.share.segment * 2 * D + mine.share.row + i * PASS] = sum_skip[i];
            vectors[(mine.share.segment * 2 + 1) * D + mine.share.row + i * PASS] = sum_bias[i];
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < D * N; index += THREADS) {
        float sum = 0.0f;
        for (int segment = 0; segment < SEGMENTS; ++segment) sum += shared[segment * D * N + index];
        const int row = index / N, n = index % N;
        if (row < map.d && n < map.states) dA[(partial * map.d + row) * map.states + n] = sum;
    }
    for (int index = threadIdx.x; index < 2 * D; index += THREADS) {
        float sum = 0.0f;
        for (int segment = 0; segment < SEGMENTS; ++segment) sum += vectors[segment * 2 * D + index];
        if (index % D < map.d) (index < D ? dskip : dbias)[partial * map.d + index % D] = sum;
    }
    __syncthreads();
}

// Sums of what the four directions wrote, (4, size), an element a thread.
__device__ __forceinline__ float sum_directions(const float* maps, long long i, long long size) {
    return maps[i] + maps[i + size] + (maps[i + 2 * size] + maps[i + 3 * size]);
}

extern "C" __global__ void sum_outputs(const float* maps, float* to, long long size) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) to[i] = sum_directions(maps, i, size);
}

extern "C" __global__ void sum_gradients(const float* maps, Input* to, long long size) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) to[i] = narrow(sum_directions(maps, i, size));
}

// Blocks' partial sums of the parameters' gradients: arrays of (parts, size), to be (size) each.
struct Partial {
    const float* from;
    float* to;
    int size;
};
struct Partials {
    Partial of[5];
};

// A block has 8 adjacent sums, which share a sector of memory, and a power of two of threads for each.
extern "C" __global__ void __launch_bounds__(1024) sum_parts(Partials arrays, int parts) {
    extern __shared__ float shared[];
    const int first = threadIdx.x / 8, sharers = blockDim.x / 8;
    int at = blockIdx.x * 8 + threadIdx.x % 8, k = 0;
    while (k < 4 && at >= arrays.of[k].size) at -= arrays.of[k++].size;
    const Partial& array = arrays.of[k];
    const bool exists = at < array.size;
    float sum = 0.0f;
#pragma unroll 8
    for (int part = first; part < parts; part += sharers)
        if (exists) sum += array.from[(long long)part * array.size + at];
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = sharers / 2; half; half /= 2) {
        if (first < half) shared[threadIdx.x] += shared[threadIdx.x + half * 8];
        __syncthreads();
    }
    if (first == 0 && exists) array.to[at] = shared[threadIdx.x];
}
