// Gradients of a kernel's weights over a tile: of every tap and, behind the last, of the bias. After taps.cuh.
//
// A thread adds up every tap's products over one run of positions, so that a value is loaded once for all taps along
// the run. Then a warp's threads add up theirs, and at last the warps: always in the same order.

constexpr int WARPS = THREADS / 32;
constexpr int MOST_SUMS = 40;  // of a warp: 3 x 3 taps and the bias, of four channels

// Positions of the shortest runs of which ``threads`` threads have to take only one each.
constexpr __device__ int shortest_run(int dilation, int threads) {
    int run = 1;
    while ((TILE + run * dilation - 1) / (run * dilation) * dilation * TILE > threads) ++run;
    return run;
}

// Sums of ``Count`` values, a power of two, over a warp's threads: a lane's is that of value lane * Count / 32. In
// every step a thread gives away the half of its sums that the other one keeps.
template <int Count, int Lanes = 16>
__device__ __forceinline__ float sum_of_warp(float* values) {
    constexpr int HALF = Count / 2;
    if constexpr (Lanes == 0) {
        return values[0];
    } else if constexpr (Count == 1) {
        values[0] += __shfl_xor_sync(0xffffffffu, values[0], Lanes);
        return sum_of_warp<1, Lanes / 2>(values);
    } else {
        const bool upper = threadIdx.x & Lanes;
        for (int i = 0; i < HALF; ++i) {
            const float other = __shfl_xor_sync(0xffffffffu, upper ? values[i] : values[HALF + i], Lanes);
            values[i] = (upper ? values[HALF + i] : values[i]) + other;
        }
        return sum_of_warp<HALF, Lanes / 2>(values);
    }
}

template <int Height, int Width, int Dilation, typename Team>
struct WeightGradient {
    typedef Shape<Height, Width, Dilation> Of;
    static constexpr int SUMS = (Of::TAPS + 1) * 4;
    static constexpr int RUN = shortest_run(Dilation, Team::SIZE);
    typedef Runs<TILE, Dilation, RUN> Axis;
    // Seven taps' planes reach so far that a run may begin before the tile.
    static_assert(Axis::GROUP <= TILE + (Of::ALONG == 7 ? Dilation : 0), "the planes hold what a run reads");
    static constexpr int PARTS = (TILE * Axis::COUNT + 31) / 32;  // as many warps have runs

    // Of the run that begins at (row, column); ``repeats(k)``: its position k is not its own to count.
    template <typename G, typename V, typename F>
    static __device__ __forceinline__ void add_run(const G& gradient, const V& value, int row, int column, F repeats,
                                                   float (&sums)[SUMS]) {
        const Quad* gradients = &gradient(row, column);
        const Quad* values = &value(row - Height / 2 * Dilation, column - Width / 2 * Dilation);
        Four g[RUN];
#pragma unroll
        for (int step = 0; step < RUN + Of::ALONG - 1; ++step) {
            if (step < RUN) {
                g[step] = widen4(gradients[step * Of::template STEP<G>]);
                if (repeats(step)) g[step] = {};
                for (int k = 0; k < 4; ++k) sums[Of::TAPS * 4 + k] += g[step].at[k];
            }
            for (int j = 0; j < Of::ACROSS; ++j) {
                const Four v = widen4(values[step * Of::template STEP<V> + j * Dilation]);
                for (int i = 0; i < Of::ALONG; ++i) {
                    if (step < i || step - i >= RUN) continue;
                    float* sum = sums + (i * Of::ACROSS + j) * 4;
                    for (int k = 0; k < 4; ++k) sum[k] = fmaf(g[step - i].at[k], v.at[k], sum[k]);
                }
            }
        }
    }
    // Has a team write its warps' sums, PARTS x SUMS, to ``parts``.
    template <typename G, typename V>
    static __device__ __forceinline__ void add_up(const G& gradient, const V& value, int top, int left, float* parts) {
        const int warp = Team::me() / 32, lane = Team::me() % 32;
        if (warp >= PARTS) return;
        float sums[SUMS] = {};
        const int line = Team::me() % TILE, run = Team::me() / TILE, first = Axis::first(run);
        if (run < Axis::COUNT)
            add_run(gradient, value, top + (Of::DOWN ? first : line), left + (Of::DOWN ? line : first),
                    [&](int k) { return Axis::repeats(run, first + k * Dilation); }, sums);
        parts[warp * SUMS + lane] = sum_of_warp<32>(sums);
        if constexpr (SUMS > 32) {
            constexpr int MORE = SUMS - 32;
            const float sum = sum_of_warp<MORE>(sums + 32);
            if (lane % (32 / MORE) == 0) parts[warp * SUMS + 32 + lane / (32 / MORE)] = sum;
        }
    }
    // Has the block's first threads write the sums of ``parts`` to ``to``, [tap][pitch].
    static __device__ __forceinline__ void write(const float* parts, float* to, int pitch) {
        if (threadIdx.x >= SUMS) return;
        float sum = 0.0f;
        for (int part = 0; part < PARTS; ++part) sum += parts[part * SUMS + threadIdx.x];
        to[threadIdx.x / 4 * pitch + threadIdx.x % 4] = sum;
    }
};
