// 3 x 3 convolution with "same" padding of maps (batch, height, width, channel) of 16 bits, on the tensor cores; summed
// in float32. After four.cuh, input.cuh and map_tiles.cuh. Compiled with -DFROM=<channels>, -DTO=<channels of results>,
// 16 or 32.
//
// Blocks walk over tiles of HIGH x WIDE positions. While one is computed the next one's maps are on their way to shared
// memory, with a border of one position where the convolution reaches around the tile, 0 outside the map. A warp makes
// a row of a tile. Weights are in shared memory as the tensor cores' lanes want them.

extern __shared__ float shared[];

constexpr int WARPS = 12, THREADS = WARPS * 32;
constexpr int HIGH = WARPS, WIDE = 32;
constexpr int SIDE = 3, TAPS = SIDE * SIDE;
constexpr int WEIGHTS = TAPS * FROM * TO;

struct Tile : MapTile<HIGH, WIDE> {
    using MapTile::MapTile;

    __device__ __forceinline__ bool has_row(int row, const Sizes& map) const {
        return (unsigned)(top + row) < (unsigned)map.height;
    }
    __device__ __forceinline__ bool has_column(int column, const Sizes& map) const {
        return (unsigned)(left + column) < (unsigned)map.width;
    }
    // The place in the maps of the tile's first position in a row.
    __device__ __forceinline__ long long place(int row, const Sizes& map) const {
        return ((long long)batch * map.height + top + row) * map.width + left;
    }
};

__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// Shared memory as values of 16 bits; what is in it has its place as an offset.
__device__ __forceinline__ Input* values() { return reinterpret_cast<Input*>(shared); }

#ifndef EMULATED
__device__ __forceinline__ unsigned address(int offset) {
    unsigned first;
    asm("{.reg .u64 at; cvta.to.shared.u64 at, %1; cvt.u32.u64 %0, at;}" : "=r"(first) : "l"(shared));
    return first + offset * 2;
}
#endif

// Sixteen bytes to shared memory, which come later; 0 if not ``there``.
__device__ __forceinline__ void fetch(int to, const Input* from, bool there) {
#ifdef EMULATED
    for (int i = 0; i < 8; ++i) values()[to + i] = there ? from[i] : 0;
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#endif
}
// Closes the group of what has been fetched since the one before.
__device__ __forceinline__ void close_group() {
#ifndef EMULATED
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all groups but the last are there.
__device__ __forceinline__ void await_all_but_one() {
#ifndef EMULATED
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

// A tile's positions in shared memory, BORDER around it, each of units of eight channels. Where a unit is depends on
// the column: of eight columns side by side the same unit can be read at once. Sixteen columns further it is at the
// same place, and unit ``u ^ n`` is at the offset of u, ^ 8 n.
template <int CHANNELS, int BORDER>
struct Positions {
    static constexpr int ROWS = HIGH + 2 * BORDER, ACROSS = WIDE + 2 * BORDER, UNITS = CHANNELS / 8;
    static constexpr int PITCH = ACROSS * CHANNELS, SIZE = ROWS * PITCH;
    int first;

    // Row and column of the tile.
    __device__ __forceinline__ int at(int row, int column, int unit) const {
        const unsigned across = column + BORDER, turn = across * UNITS / 8 % UNITS;
        return first + (row + BORDER) * PITCH + across * CHANNELS + (unit ^ turn) * 8;
    }
    // A warp after the other takes 32 units of a row.
    __device__ __forceinline__ void fetch_from(const Input* maps, const Tile& tile, const Sizes& map) const {
        constexpr int TURNS = (ACROSS * UNITS + 31) / 32;
#pragma unroll
        for (int n = 0; n < (ROWS * TURNS + WARPS - 1) / WARPS; ++n) {
            const int turn = warp() + n * WARPS, row = turn / TURNS - BORDER, i = turn % TURNS * 32 + lane();
            const int column = i / UNITS - BORDER, unit = i % UNITS;
            if (turn >= ROWS * TURNS || i >= ACROSS * UNITS) continue;
            const bool there = tile.has_row(row, map) && tile.has_column(column, map);
            const Input* from = maps + (tile.place(row, map) + column) * CHANNELS + unit * 8;
            fetch(at(row, column, unit), there ? from : maps, there);
        }
    }
};

// Four blocks of 8 x 8 values, of which lane l says where row l % 8 of block l / 8 is. It gets of each block two values
// that are neighbours in row l / 4 or, TRANSPOSED, in column l / 4.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_blocks(unsigned (&blocks)[4], int row) {
#ifdef EMULATED
    emulated_load_blocks(blocks, values() + row, TRANSPOSED);
#else
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                     : "r"(address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                     : "r"(address(row))
                     : "memory");
#endif
}

// c[16][8] += a[16][16] b[16][8]. A lane has of c two neighbours in rows lane / 4 and 8 further down; of a the blocks
// (upper rows, lower k), (lower, lower), (upper, upper), (lower, upper); of b lower and upper k.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
#ifdef EMULATED
    emulated_multiply(c, a, b, [](Input value) { return widen(value); });
#else
#define MULTIPLY(TYPE)                                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (INPUT == 1)
        MULTIPLY("f16");
    else
        MULTIPLY("bf16");
#undef MULTIPLY
#endif
}

struct alignas(16) Quad {
    unsigned at[4];
};

// A convolution of K channels to N by weights in shared memory: for each tap, 16 k and two blocks of eight n, a quad a
// lane. A lane's pairs of all blocks of n are side by side in memory.
template <int K, int N>
struct Product {
    static constexpr int BLOCKS = N / 8;

    // FLIP: as the gradient of what the weights (K, N, 3, 3) were applied to; else they are (N, K, 3, 3).
    template <bool FLIP>
    static __device__ __forceinline__ void stage_weights(const float* weights) {
        for (int i = threadIdx.x; i < WEIGHTS; i += THREADS) {
            const int odd = i % 2, part = i / 2 % 4, lane = i / 8 % 32, pair = i / 256 % (BLOCKS / 2);
            const int sixteen = i / 256 / (BLOCKS / 2) % (K / 16), tap = i / 256 / (BLOCKS / 2) / (K / 16);
            const int k = sixteen * 16 + part % 2 * 8 + lane % 4 * 2 + odd;
            const int block = pair * 2 + part / 2, column = lane / 4;
            const int n = column / 2 * 2 * BLOCKS + block * 2 + column % 2;
            values()[i] = narrow(FLIP ? weights[(k * N + n) * TAPS + TAPS - 1 - tap] : weights[(n * K + k) * TAPS + tap]);
        }
    }
    // The warp's row of a tile.
    static __device__ __forceinline__ void row(const Positions<K, 1>& from, Input* to, const Tile& tile,
                                               const Sizes& map) {
        const Quad* weights = reinterpret_cast<const Quad*>(shared);
        float sums[2][BLOCKS][4] = {};
        int at[SIDE];
        for (int j = 0; j < SIDE; ++j) at[j] = from.at(warp() - 1, lane() % 16 + j - 1, lane() / 16);
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap)
#pragma unroll
            for (int k = 0; k < K / 16; ++k) {
                unsigned a[2][4];
                for (int half = 0; half < 2; ++half)
                    load_blocks<false>(a[half], (at[tap % SIDE] ^ k * 16) + tap / SIDE * from.PITCH + half * 16 * K);
#pragma unroll
                for (int pair = 0; pair < BLOCKS / 2; ++pair) {
                    const Quad b = weights[((tap * (K / 16) + k) * (BLOCKS / 2) + pair) * 32 + lane()];
                    for (int half = 0; half < 2; ++half)
                        for (int i = 0; i < 2; ++i) multiply(sums[half][pair * 2 + i], a[half], b.at + i * 2);
                }
            }
        if (tile.has_row(warp(), map)) write_row(sums, to + tile.place(warp(), map) * N, tile, map);
    }

private:
    static __device__ __forceinline__ void write_row(const float (&sums)[2][BLOCKS][4], Input* to, const Tile& tile,
                                                     const Sizes& map) {
        struct alignas(4 * BLOCKS) Run {
            Input at[2 * BLOCKS];
        };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = i * 8 + lane() / 4;
            if (!tile.has_column(column, map)) continue;
            Run run;
            for (int k = 0; k < 2 * BLOCKS; ++k) run.at[k] = narrow(sums[i / 2][k / 2][i % 2 * 2 + k % 2]);
            *reinterpret_cast<Run*>(to + column * N + lane() % 4 * 2 * BLOCKS) = run;
        }
    }
};

// The warp's part of the weights' gradient, in registers over all tiles: one of three rows of taps, of the tiles' half
// rows one of SUBSETS.
struct WeightGradient {
    static constexpr int SUBSETS = WARPS / SIDE, FROM_BLOCKS = FROM / 8, TO_PAIRS = TO / 16;
    float sums[SIDE][TO_PAIRS][FROM_BLOCKS][4] = {};

    static __device__ __forceinline__ int tap_row() { return warp() % SIDE; }
    static __device__ __forceinline__ int subset() { return warp() / SIDE; }

    __device__ __forceinline__ void add(const Positions<TO, 1>& dy, const Positions<FROM, 0>& x) {
        const int odd = lane() / 8 % 2, upper = lane() / 16;
        const int x_at = x.at(0, lane() % 16, upper);
        int dy_at[SIDE];
        for (int j = 0; j < SIDE; ++j)
            dy_at[j] = dy.at(1 - tap_row(), upper * 8 + lane() % 8 + 1 - j, odd);
#pragma unroll 2
        for (int half = subset(); half < HIGH * 2; half += SUBSETS) {
            const int row = half / 2, column = half % 2 * 16;
            unsigned b[FROM_BLOCKS / 2][4];
            for (int pair = 0; pair < FROM_BLOCKS / 2; ++pair)
                load_blocks<true>(b[pair], (x_at ^ pair * 16) + row * x.PITCH + column * FROM);
#pragma unroll
            for (int j = 0; j < SIDE; ++j)
                for (int m = 0; m < TO_PAIRS; ++m) {
                    unsigned a[4];
                    load_blocks<true>(a, (dy_at[j] ^ m * 16) + row * dy.PITCH + column * TO);
                    for (int n = 0; n < FROM_BLOCKS; ++n) multiply(sums[j][m][n], a, b[n / 2] + n % 2 * 2);
                }
        }
    }
    // parts: (blocks * SUBSETS, TO, FROM, 3, 3)
    __device__ __forceinline__ void write(float* parts) const {
        parts += (long long)(blockIdx.x * SUBSETS + subset()) * WEIGHTS + tap_row() * SIDE;
#pragma unroll
        for (int tap = 0; tap < SIDE; ++tap)
            for (int m = 0; m < TO_PAIRS; ++m)
                for (int n = 0; n < FROM_BLOCKS; ++n)
                    for (int i = 0; i < 4; ++i) {
                        const int to = (m * 2 + i / 2) * 8 + lane() / 4;
                        const int from = n * 8 + lane() % 4 * 2 + i % 2;
                        parts[(to * FROM + from) * TAPS + tap] = sums[tap][m][n][i];
                    }
    }
};

// Calls ``fetch_tile(tile, buffer)`` for every tile of the block before ``use(tile, buffer)``, one ahead.
template <typename F, typename G>
__device__ __forceinline__ void walk_tiles(int tiles, const Sizes& map, F fetch_tile, G use) {
    Tile tile(blockIdx.x, map);
    fetch_tile(tile, 0);
    close_group();
    for (int index = blockIdx.x, buffer = 0; index < tiles; index += gridDim.x, buffer ^= 1) {
        const Tile next(index + gridDim.x, map);
        if (index + gridDim.x < tiles) fetch_tile(next, buffer ^ 1);
        close_group();
        await_all_but_one();
        __syncthreads();
        use(tile, buffer);
        __syncthreads();
        tile = next;
    }
}

// x: (batch, height, width, FROM); weights: (TO, FROM, 3, 3); y: (batch, height, width, TO).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    convolution_forward(const Input* x, const float* weights, Input* y, int tiles, Sizes map) {
    typedef Positions<FROM, 1> Around;
    typedef Product<FROM, TO> Convolution;
    Convolution::stage_weights<false>(weights);
    const auto around = [&](int buffer) { return Around{WEIGHTS + buffer * Around::SIZE}; };
    walk_tiles(
        tiles, map, [&](const Tile& tile, int buffer) { around(buffer).fetch_from(x, tile, map); },
        [&](const Tile& tile, int buffer) { Convolution::row(around(buffer), y, tile, map); });
}

// dy: (batch, height, width, TO); x and dx: (batch, height, width, FROM); parts: those of ``WeightGradient``.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    convolution_backward(const Input* dy, const Input* x, const float* weights, Input* dx, float* parts, int tiles,
                         Sizes map) {
    typedef Positions<TO, 1> Around;
    typedef Positions<FROM, 0> Inside;
    typedef Product<TO, FROM> Gradient;
    constexpr int BUFFER = Around::SIZE + Inside::SIZE;
    Gradient::stage_weights<true>(weights);
    const auto around = [&](int buffer) { return Around{WEIGHTS + buffer * BUFFER}; };
    const auto inside = [&](int buffer) { return Inside{WEIGHTS + buffer * BUFFER + Around::SIZE}; };
    WeightGradient gradient;
    walk_tiles(
        tiles, map,
        [&](const Tile& tile, int buffer) {
            around(buffer).fetch_from(dy, tile, map);
            inside(buffer).fetch_from(x, tile, map);
        },
        [&](const Tile& tile, int buffer) {
            Gradient::row(around(buffer), dx, tile, map);
            gradient.add(around(buffer), inside(buffer));
        });
    gradient.write(parts);
}
