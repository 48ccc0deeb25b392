// The convolution of CBAM's spatial gate: two channels, 7 x 7, "same" padding, to one channel; maps in PyTorch's usual
// order (batch, channel, height, width). After four.cuh, input.cuh and map_tiles.cuh. Compiled with -DROWS=<rows of
// results a thread>.
//
// A block makes tiles of HIGH x WIDE positions, each of its threads ROWS x 4 of them. A tile's plane is in shared
// memory as float32, with what the convolution reaches around it, 0 outside the map. A thread reads every row of its
// part once and uses it for as many rows of results as it reaches.

extern __shared__ float shared[];

constexpr int THREADS = 128, ACROSS = 8;  // of a block, and of them beside each other
constexpr int SIDE = 7, TAPS = SIDE * SIDE;
constexpr int WIDE = ACROSS * 4, HIGH = THREADS / ACROSS * ROWS;
constexpr int LEFT = 4, ROW_QUADS = WIDE / 4 + 2;  // a plane begins 4 columns before its tile, not 3: aligned quads
constexpr int PITCH = ROW_QUADS * 4, QUADS = (HIGH + SIDE - 1) * ROW_QUADS, PLANE = QUADS * 4;
constexpr int TAP_QUADS = (TAPS + 3) / 4;   // of one channel
constexpr int SCRATCH_PITCH = THREADS + 2;  // two threads a tap read different banks

struct Tile : MapTile<HIGH, WIDE> {
    using MapTile::MapTile;

    // Of the calling thread's part.
    __device__ __forceinline__ int row() const { return top + threadIdx.x / ACROSS * ROWS; }
    __device__ __forceinline__ int column() const { return left + threadIdx.x % ACROSS * 4; }
};

// Four positions of a row from ``column``, a multiple of 4; 0 outside the map. ALIGNED: the width is a multiple of 4,
// too.
template <bool ALIGNED>
__device__ __forceinline__ FourInputs read_inside(const Input* channel, const Sizes& map, int row, int column) {
    FourInputs quad = {};
    if ((unsigned)row >= (unsigned)map.height) return quad;
    const Input* at = channel + (long long)row * map.width + column;
    if (ALIGNED) {
        if ((unsigned)column < (unsigned)map.width) quad = *reinterpret_cast<const FourInputs*>(at);
    } else {
        for (int k = 0; k < 4; ++k)
            if ((unsigned)(column + k) < (unsigned)map.width) quad.at[k] = at[k];
    }
    return quad;
}

__device__ __forceinline__ void write_inside(Input* channel, const Sizes& map, int row, int column,
                                             const float* values) {
    if (row >= map.height) return;
    Input* at = channel + (long long)row * map.width + column;
    FourInputs quad;
    for (int k = 0; k < 4; ++k) quad.at[k] = narrow(values[k]);
    if (map.width % 4 == 0) {
        if (column < map.width) *reinterpret_cast<FourInputs*>(at) = quad;
    } else {
        for (int k = 0; k < 4; ++k)
            if (column + k < map.width) at[k] = quad.at[k];
    }
}

// All of a thread's reads are under way before the first is waited for.
template <bool ALIGNED>
__device__ __forceinline__ void stage_quads(const Input* channel, const Sizes& map, const Tile& tile, float* plane) {
    constexpr int SHARE = (QUADS + THREADS - 1) / THREADS;
    FourInputs quads[SHARE];
#pragma unroll
    for (int n = 0; n < SHARE; ++n) {
        const int i = threadIdx.x + n * THREADS;
        const int row = tile.top - SIDE / 2 + i / ROW_QUADS, column = tile.left - LEFT + i % ROW_QUADS * 4;
        quads[n] = read_inside<ALIGNED>(channel, map, row, column);
    }
#pragma unroll
    for (int n = 0; n < SHARE; ++n) {
        const int i = threadIdx.x + n * THREADS;
        if (i < QUADS) write4(plane + i * 4, widen4(quads[n].at));
    }
}

// A tile's plane of one channel.
__device__ __forceinline__ void stage(const Input* channel, const Sizes& map, const Tile& tile, float* plane) {
    if (map.width % 4 == 0)
        stage_quads<true>(channel, map, tile, plane);
    else
        stage_quads<false>(channel, map, tile, plane);
}

// Calls ``use(position, tap, value)`` for each of the thread's ROWS x 4 positions and every tap.
template <typename F>
__device__ __forceinline__ void walk(const float* plane, F use) {
    const float* from = plane + threadIdx.x / ACROSS * ROWS * PITCH + threadIdx.x % ACROSS * 4;
#pragma unroll
    for (int down = 0; down < ROWS + SIDE - 1; ++down) {
        float line[12];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const Four quad = read4(from + down * PITCH + k * 4);
            for (int i = 0; i < 4; ++i) line[k * 4 + i] = quad.at[i];
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (down < row || down >= row + SIDE) continue;
#pragma unroll
            for (int j = 0; j < SIDE; ++j)
#pragma unroll
                for (int column = 0; column < 4; ++column)
                    use(row * 4 + column, (down - row) * SIDE + j, line[column + j + LEFT - SIDE / 2]);
        }
    }
}

// Weights of both channels, each from a quad of its own.
__device__ __forceinline__ void stage_taps(const float* weights, float* taps) {
    for (int i = threadIdx.x; i < 2 * TAPS; i += THREADS) taps[i / TAPS * TAP_QUADS * 4 + i % TAPS] = weights[i];
}

// Adds the convolution of one channel to the thread's sums. FLIP: by the reversed taps, which gives the gradient of
// what the taps were applied to.
template <bool FLIP>
__device__ __forceinline__ void convolve(const float* plane, const float* taps, float (&sums)[ROWS * 4]) {
    Four by[TAP_QUADS];
#pragma unroll
    for (int i = 0; i < TAP_QUADS; ++i) by[i] = read4(taps + i * 4);
    walk(plane, [&](int position, int tap, float value) {
        const int at = FLIP ? TAPS - 1 - tap : tap;
        sums[position] = fmaf(value, by[at / 4].at[at % 4], sums[position]);
    });
}

__device__ __forceinline__ void write_part(Input* channel, const Sizes& map, const Tile& tile,
                                           const float (&sums)[ROWS * 4]) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
        write_inside(channel, map, tile.row() + row, tile.column(), sums + row * 4);
}

// The sums of a thread's part of a tile, from both channels of its map.
__device__ __forceinline__ void convolve_both(const Input* const (&channels)[2], const float* weights,
                                              const Tile& tile, const Sizes& map, float (&sums)[ROWS * 4]) {
    float* taps = shared;
    float* planes = taps + 2 * TAP_QUADS * 4;
    stage_taps(weights, taps);
    for (int channel = 0; channel < 2; ++channel) stage(channels[channel], map, tile, planes + channel * PLANE);
    __syncthreads();
#pragma unroll 1
    for (int channel = 0; channel < 2; ++channel)
        convolve<false>(planes + channel * PLANE, taps + channel * TAP_QUADS * 4, sums);
}

// x: (batch, 2, height, width); weights: (2, 7, 7); y: (batch, 1, height, width). A block for every tile.
extern "C" __global__ void __launch_bounds__(THREADS, 5)
    gate_forward(const Input* x, const float* weights, Input* y, Sizes map) {
    const Tile tile(blockIdx.x, map);
    x += tile.batch * 2 * map.positions();
    float sums[ROWS * 4] = {};
    convolve_both({x, x + map.positions()}, weights, tile, map, sums);
    write_part(y + tile.batch * map.positions(), map, tile, sums);
}

// For inference sigmoid(batch_norm(convolution)) of two channels apart, (batch, height, width) each; of one float each
// BatchNorm's weight, bias, running mean and running variance.
extern "C" __global__ void __launch_bounds__(THREADS, 5)
    gate_inference(const Input* maximum, const Input* mean, const float* weights, const float* scale,
                   const float* offset, const float* center, const float* variance, float eps, Input* y, Sizes map) {
    const Tile tile(blockIdx.x, map);
    const long long first = tile.batch * map.positions();
    float sums[ROWS * 4] = {};
    convolve_both({maximum + first, mean + first}, weights, tile, map, sums);
    const float by = *scale / sqrtf(*variance + eps);
    for (int i = 0; i < ROWS * 4; ++i) sums[i] = sigmoid(fmaf(sums[i] - *center, by, *offset));
    write_part(y + first, map, tile, sums);
}

// A tile of dx.
__device__ __forceinline__ void input_gradient(const Tile& tile, const Input* dy, const float* weights, Input* dx,
                                               const Sizes& map) {
    float* taps = shared;
    float* plane = taps + 2 * TAP_QUADS * 4;
    stage_taps(weights, taps);
    stage(dy + tile.batch * map.positions(), map, tile, plane);
#pragma unroll 1
    for (int channel = 0; channel < 2; ++channel) {
        __syncthreads();  // before each, or the compiler keeps the plane's rows in more registers than there are
        float sums[ROWS * 4] = {};
        convolve<true>(plane, taps + channel * TAP_QUADS * 4, sums);
        write_part(dx + (tile.batch * 2 + channel) * map.positions(), map, tile, sums);
    }
}

// A tile's plane of ``channel``, and dy at the thread's own positions.
template <bool ALIGNED>
__device__ __forceinline__ void stage_factors(const Input* dy, const Input* channel, const Sizes& map, const Tile& tile,
                                              float* plane, float (&by)[ROWS * 4]) {
    FourInputs quads[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
        quads[row] = read_inside<ALIGNED>(dy, map, tile.row() + row, tile.column());
    stage_quads<ALIGNED>(channel, map, tile, plane);
#pragma unroll
    for (int i = 0; i < ROWS * 4; ++i) by[i] = widen(quads[i / 4].at[i % 4]);
}

// Two rows of a walker's part of the weights' gradients: every ``walkers``-th tile, one channel. The threads keep sums
// of all taps in registers; in the end two of them add up those of one tap.
__device__ __forceinline__ void weight_gradient(int walker, int channel, int walkers, int tiles, const Input* dy,
                                                const Input* x, float* parts, const Sizes& map) {
    float own[TAPS] = {};
#pragma unroll 1
    for (int index = walker; index < tiles; index += walkers) {
        const Tile tile(index, map);
        const Input* gradient = dy + tile.batch * map.positions();
        const Input* from = x + (tile.batch * 2 + channel) * map.positions();
        float by[ROWS * 4];
        if (map.width % 4 == 0)
            stage_factors<true>(gradient, from, map, tile, shared, by);
        else
            stage_factors<false>(gradient, from, map, tile, shared, by);
        __syncthreads();
        walk(shared, [&](int position, int tap, float value) { own[tap] = fmaf(value, by[position], own[tap]); });
        __syncthreads();
    }
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) shared[tap * SCRATCH_PITCH + threadIdx.x] = own[tap];
    __syncthreads();
    if (threadIdx.x < 2 * TAPS) {
        const int tap = threadIdx.x / 2, first = threadIdx.x % 2;
        float sum = 0.0f;
#pragma unroll 8
        for (int i = first; i < THREADS; i += 2) sum += shared[tap * SCRATCH_PITCH + i];
        parts[((walker * 2 + first) * 2 + channel) * TAPS + tap] = sum;
    }
}

// dx: (batch, 2, height, width); parts: (2 walkers, 2, 7, 7), whose sum is the weights' gradient. Blocks that walk over
// tiles for it come first, two (one of each channel) a walker, since they take longest; then one for every tile of dx.
extern "C" __global__ void __launch_bounds__(THREADS, 5)
    gate_backward(const Input* dy, const Input* x, const float* weights, Input* dx, float* parts, int walkers,
                  int tiles, Sizes map) {
    const int index = blockIdx.x;
    if (index < 2 * walkers)
        weight_gradient(index / 2, index % 2, walkers, tiles, dy, x, parts, map);
    else
        input_gradient(Tile(index - 2 * walkers, map), dy, weights, dx, map);
}
