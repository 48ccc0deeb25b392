// Tiles of a map in shared memory, for depthwise convolutions: four channels of a position ("quad") side by side, as they
// are stored. After four.cuh and input.cuh. Compiled with -DTILE=<side of a tile of results, in positions>.

constexpr int THREADS = 256;

typedef FourInputs Quad;

__device__ __forceinline__ Quad narrow4(const Four& v) {
    Quad q;
    for (int k = 0; k < 4; ++k) q.at[k] = narrow(v.at[k]);
    return q;
}

__device__ __forceinline__ Four add4(const Four& a, const Four& b) {
    Four sum;
    for (int k = 0; k < 4; ++k) sum.at[k] = a.at[k] + b.at[k];
    return sum;
}

// Of a batch of maps (batch, height, width, channels), channels last.
struct Sizes {
    int height, width, channels;

    __device__ __forceinline__ bool has(int row, int column) const {
        return (unsigned)row < (unsigned)height && (unsigned)column < (unsigned)width;
    }
    __device__ __forceinline__ long long offset(int batch, int row, int column, int pitch) const {
        return (((long long)batch * height + row) * width + column) * pitch;
    }
};

// ``Rows`` x ``Columns`` positions of a map from (top, left), which may be outside of it.
template <int Rows, int Columns>
struct Plane {
    static constexpr int QUADS = Rows * Columns;
    Quad* quads;
    int top, left;

    __device__ __forceinline__ const Quad& operator()(int row, int column) const {
        return quads[(row - top) * Columns + column - left];
    }
    // Has every thread fill its positions with what ``value(row, column)`` is inside the map, and with 0 outside.
    template <typename F>
    __device__ __forceinline__ void fill(const Sizes& map, F value) const {
        for (int i = threadIdx.x; i < QUADS; i += THREADS) {
            const int row = top + i / Columns, column = left + i % Columns;
            quads[i] = map.has(row, column) ? value(row, column) : Quad{};
        }
    }
};

// A kernel's weights for four channels, in registers.
template <int Height, int Width>
struct Taps {
    Four at[Height * Width];

    // weights: [tap][4]
    __device__ __forceinline__ explicit Taps(const float* weights) {
        for (int tap = 0; tap < Height * Width; ++tap) at[tap] = read4(weights + tap * 4);
    }
    // Of the kernel around a position; FLIP: reversed, which gives the gradient of what the kernel was applied to.
    template <int Dilation, bool Flip, typename P>
    __device__ __forceinline__ Four sum(const P& from, int row, int column, Four sum = {}) const {
        for (int i = 0; i < Height; ++i)
            for (int j = 0; j < Width; ++j) {
                const Four& weight = at[Flip ? Height * Width - 1 - i * Width - j : i * Width + j];
                const Quad& quad = from(row + (i - Height / 2) * Dilation, column + (j - Width / 2) * Dilation);
                const Four value = widen4(quad.at);
                for (int k = 0; k < 4; ++k) sum.at[k] = fmaf(value.at[k], weight.at[k], sum.at[k]);
            }
        return sum;
    }
};

// Gradients of a kernel's weights over a tile: of every tap and, behind the last, of the bias. The threads share the
// taps; those of one tap share the positions. Writes [tap][4] to ``sums``; ``scratch`` is THREADS Fours.
template <int Height, int Width, int Dilation, typename G, typename V>
__device__ __forceinline__ void weight_gradient(const G& gradient, const V& value, int top, int left, float* scratch,
                                                float* sums) {
    constexpr int JOBS = Height * Width + 1, SHARE = THREADS / JOBS;
    const int job = threadIdx.x / SHARE;
    if (job < JOBS) {
        const bool bias = job == JOBS - 1;
        const int down = bias ? 0 : (job / Width - Height / 2) * Dilation;
        const int right = bias ? 0 : (job % Width - Width / 2) * Dilation;
        Four sum = {};
        for (int i = threadIdx.x % SHARE; i < TILE * TILE; i += SHARE) {
            const int row = top + i / TILE, column = left + i % TILE;
            const Four g = widen4(gradient(row, column).at), v = widen4(value(row + down, column + right).at);
            for (int k = 0; k < 4; ++k) sum.at[k] = fmaf(g.at[k], bias ? 1.0f : v.at[k], sum.at[k]);
        }
        write4(scratch + threadIdx.x * 4, sum);
    }
    __syncthreads();
    if (threadIdx.x < JOBS * 4) {
        const int tap = threadIdx.x / 4, k = threadIdx.x % 4;
        float sum = 0.0f;
        for (int i = 0; i < SHARE; ++i) sum += scratch[(tap * SHARE + i) * 4 + k];
        sums[threadIdx.x] = sum;
    }
    __syncthreads();
}

// Which tile, batch and channels are a block's: blocks of the same positions are neighbours, since they share lines.
struct Work {
    int batch, branch, channel, top, left;

    __device__ __forceinline__ Work(const Sizes& map, int branches) {
        const int quads = map.channels / 4, across = (map.width + TILE - 1) / TILE;
        const int tiles = across * ((map.height + TILE - 1) / TILE);
        int index = blockIdx.x;
        channel = index % quads * 4;
        index /= quads;
        branch = index % branches;
        index /= branches;
        const int tile = index % tiles;
        batch = index / tiles;
        top = tile / across * TILE;
        left = tile % across * TILE;
    }
};
