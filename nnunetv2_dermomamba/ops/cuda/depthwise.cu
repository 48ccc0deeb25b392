// Depthwise convolutions of channels-last maps, several in one kernel: what passes between them stays in shared memory.
//
// A block makes a tile of results of four channels. Planes hold what the tile's results depend on, 0 outside the map,
// and are rounded to the map's type, as PyTorch would round an axial convolution's result.

extern __shared__ float shared[];

// x + dw3x3(dw7x1(dw1x7(x))). A branch's weights, [tap][channel]: 1 x 7, bias, 7 x 1, bias, 3 x 3, bias.
constexpr int ROW_TAPS = 0, COLUMN_TAPS = 8, SQUARE_TAPS = 16, AXIAL_TAPS = 26;

__device__ __forceinline__ void stage_taps(const float* weights, int taps, int channels, float* to) {
    for (int i = threadIdx.x; i < taps * 4; i += THREADS) to[i] = weights[i / 4 * channels + i % 4];
}

// Planes of one branch with dilation E around the tile at (top, left); all begin where the memory before them ends.
template <int E>
struct Axial {
    typedef Plane<TILE + 8 * E, TILE + 8 * E> Whole;
    typedef Plane<TILE + 8 * E, TILE + 2 * E> Rows;    // after 1 x 7
    typedef Plane<TILE + 2 * E, TILE + 2 * E> Square;  // after 7 x 1
    typedef Plane<TILE + 6 * E, TILE + 6 * E> SquareBack;
    typedef Plane<TILE, TILE + 6 * E> RowsBack;
};

// What both passes begin with: x, and what 1 x 7 and 7 x 1 make of it.
template <int E>
__device__ __forceinline__ void axial_planes(const Sizes& map, const Work& work, const Input* x, int pitch,
                                             const float* taps, const typename Axial<E>::Whole& whole,
                                             const typename Axial<E>::Rows& rows,
                                             const typename Axial<E>::Square& square) {
    whole.fill(map, [&](int row, int column) {
        return *reinterpret_cast<const Quad*>(x + map.offset(work.batch, row, column, pitch));
    });
    __syncthreads();
    {
        const Taps<1, 7> by(taps + ROW_TAPS * 4);
        const Four bias = read4(taps + (ROW_TAPS + 7) * 4);
        rows.fill(map, [&](int row, int column) {
            return narrow4(by.template sum<E, false>(whole, row, column, bias));
        });
    }
    __syncthreads();
    {
        const Taps<7, 1> by(taps + COLUMN_TAPS * 4);
        const Four bias = read4(taps + (COLUMN_TAPS + 7) * 4);
        square.fill(map, [&](int row, int column) {
            return narrow4(by.template sum<E, false>(rows, row, column, bias));
        });
    }
    __syncthreads();
}

template <int E>
__device__ __forceinline__ void axial_branch(const Sizes& map, const Work& work, int batches, const Input* x, int pitch,
                                             const float* taps, Quad* planes, Input* y) {
    typedef Axial<E> A;
    const typename A::Whole whole{planes, work.top - 4 * E, work.left - 4 * E};
    const typename A::Rows rows{whole.quads + A::Whole::QUADS, work.top - 4 * E, work.left - E};
    const typename A::Square square{rows.quads + A::Rows::QUADS, work.top - E, work.left - E};
    axial_planes<E>(map, work, x, pitch, taps, whole, rows, square);
    const Taps<3, 3> by(taps + SQUARE_TAPS * 4);
    const Four bias = read4(taps + (SQUARE_TAPS + 9) * 4);
    y += work.channel + map.offset(work.branch * batches + work.batch, 0, 0, map.channels);
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const int row = work.top + i / TILE, column = work.left + i % TILE;
        if (!map.has(row, column)) continue;
        const Four sum = by.template sum<E, false>(square, row, column, bias);
        const Quad out = narrow4(add4(widen4(whole(row, column).at), sum));
        *reinterpret_cast<Quad*>(y + ((long long)row * map.width + column) * map.channels) = out;
    }
}

// x: (batch, height, width, pitch), of which 3 channels are read, branch after branch; weights: (3, 26, channels);
// y: (3 batch, height, width, channels). A block for every tile, branch and four channels.
extern "C" __global__ void __launch_bounds__(THREADS)
    axial_forward(const Input* x, const float* weights, Input* y, int batches, int pitch, Sizes map) {
    const Work work(map, 3);
    float* taps = shared;
    Quad* planes = reinterpret_cast<Quad*>(shared + AXIAL_TAPS * 4);
    stage_taps(weights + work.branch * AXIAL_TAPS * map.channels + work.channel, AXIAL_TAPS, map.channels, taps);
    x += work.branch * map.channels + work.channel;
    if (work.branch == 0) axial_branch<1>(map, work, batches, x, pitch, taps, planes, y);
    if (work.branch == 1) axial_branch<2>(map, work, batches, x, pitch, taps, planes, y);
    if (work.branch == 2) axial_branch<3>(map, work, batches, x, pitch, taps, planes, y);
}

template <int E>
__device__ __forceinline__ void axial_branch_back(const Sizes& map, const Work& work, int batches, const Input* dy,
                                                  const Input* x, int pitch, const float* taps, float* scratch,
                                                  float* sums, Quad* planes, Input* dx) {
    typedef Axial<E> A;
    const int top = work.top, left = work.left;
    const typename A::Whole whole{planes, top - 4 * E, left - 4 * E};
    const typename A::Whole out{whole.quads + A::Whole::QUADS, whole.top, whole.left};
    const typename A::Rows rows{out.quads + A::Whole::QUADS, top - 4 * E, left - E};
    const typename A::Square square{rows.quads + A::Rows::QUADS, top - E, left - E};
    const typename A::SquareBack dsquare{square.quads, top - 3 * E, left - 3 * E};  // in its place
    const typename A::RowsBack drows{dsquare.quads + A::SquareBack::QUADS, top, left - 3 * E};
    dy += work.channel + map.offset(work.branch * batches + work.batch, 0, 0, map.channels);
    out.fill(map, [&](int row, int column) {
        return *reinterpret_cast<const Quad*>(dy + ((long long)row * map.width + column) * map.channels);
    });
    axial_planes<E>(map, work, x, pitch, taps, whole, rows, square);
    weight_gradient<3, 3, E>(out, square, top, left, scratch, sums + SQUARE_TAPS * 4);
    {
        const Taps<3, 3> by(taps + SQUARE_TAPS * 4);
        dsquare.fill(map, [&](int row, int column) {
            return narrow4(by.template sum<E, true>(out, row, column));
        });
    }
    __syncthreads();
    {
        const Taps<7, 1> by(taps + COLUMN_TAPS * 4);
        drows.fill(map, [&](int row, int column) {
            return narrow4(by.template sum<E, true>(dsquare, row, column));
        });
    }
    __syncthreads();
    weight_gradient<7, 1, E>(dsquare, rows, top, left, scratch, sums + COLUMN_TAPS * 4);
    weight_gradient<1, 7, E>(drows, whole, top, left, scratch, sums + ROW_TAPS * 4);
    const Taps<1, 7> by(taps + ROW_TAPS * 4);
    dx += work.branch * map.channels + work.channel + map.offset(work.batch, 0, 0, 3 * map.channels);
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const int row = top + i / TILE, column = left + i % TILE;
        if (!map.has(row, column)) continue;
        const Quad sum = narrow4(by.template sum<E, true>(drows, row, column, widen4(out(row, column).at)));
        *reinterpret_cast<Quad*>(dx + ((long long)row * map.width + column) * 3 * map.channels) = sum;
    }
}

// dx: (batch, height, width, 3 channels); sums: (batch tiles, 3, 26, channels), a block's own part of the weights'
// gradients.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    axial_backward(const Input* dy, const Input* x, const float* weights, Input* dx, float* sums, int batches,
                   int pitch, Sizes map) {
    const Work work(map, 3);
    float* taps = shared;
    float* own = taps + AXIAL_TAPS * 4;
    float* scratch = own + AXIAL_TAPS * 4;
    Quad* planes = reinterpret_cast<Quad*>(scratch + THREADS * 4);
    stage_taps(weights + work.branch * AXIAL_TAPS * map.channels + work.channel, AXIAL_TAPS, map.channels, taps);
    x += work.branch * map.channels + work.channel;
    if (work.branch == 0) axial_branch_back<1>(map, work, batches, dy, x, pitch, taps, scratch, own, planes, dx);
    if (work.branch == 1) axial_branch_back<2>(map, work, batches, dy, x, pitch, taps, scratch, own, planes, dx);
    if (work.branch == 2) axial_branch_back<3>(map, work, batches, dy, x, pitch, taps, scratch, own, planes, dx);
    const long long part = blockIdx.x / (map.channels / 4) * (long long)AXIAL_TAPS;
    for (int i = threadIdx.x; i < AXIAL_TAPS * 4; i += THREADS)
        sums[(part + i / 4) * map.channels + work.channel + i % 4] = own[i];
}

// silu(dw3x3(x)). Weights, [tap][channel]: 3 x 3, bias.
constexpr int GATED_TAPS = 10;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(x * -LOG2E)); }

// x: (batch, height, width, pitch); weights: (10, channels); y: (batch, height, width, channels).
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_forward(const Input* x, const float* weights, Input* y, int pitch, Sizes map) {
    const Work work(map, 1);
    float* taps = shared;
    stage_taps(weights + work.channel, GATED_TAPS, map.channels, taps);
    const Plane<TILE + 2, TILE + 2> whole{reinterpret_cast<Quad*>(shared + GATED_TAPS * 4), work.top - 1, work.left - 1};
    x += work.channel;
    whole.fill(map, [&](int row, int column) {
        return *reinterpret_cast<const Quad*>(x + map.offset(work.batch, row, column, pitch));
    });
    __syncthreads();
    const Taps<3, 3> by(taps);
    const Four bias = read4(taps + 9 * 4);
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const int row = work.top + i / TILE, column = work.left + i % TILE;
        if (!map.has(row, column)) continue;
        Four sum = by.sum<1, false>(whole, row, column, bias);
        for (int k = 0; k < 4; ++k) sum.at[k] *= sigmoid(sum.at[k]);
        *reinterpret_cast<Quad*>(y + work.channel + map.offset(work.batch, row, column, map.channels)) = narrow4(sum);
    }
}

// dx: (batch, height, width, channels); sums: (batch tiles, 10, channels).
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_backward(const Input* dy, const Input* x, const float* weights, Input* dx, float* sums, int pitch, Sizes map) {
    const Work work(map, 1);
    float* taps = shared;
    float* own = taps + GATED_TAPS * 4;
    float* scratch = own + GATED_TAPS * 4;
    stage_taps(weights + work.channel, GATED_TAPS, map.channels, taps);
    typedef Plane<TILE + 4, TILE + 4> Whole;
    const Whole whole{reinterpret_cast<Quad*>(scratch + THREADS * 4), work.top - 2, work.left - 2};
    const Plane<TILE + 2, TILE + 2> before{whole.quads + Whole::QUADS, work.top - 1, work.left - 1};  // of silu
    x += work.channel;
    dy += work.channel;
    whole.fill(map, [&](int row, int column) {
        return *reinterpret_cast<const Quad*>(x + map.offset(work.batch, row, column, pitch));
    });
    __syncthreads();
    const Taps<3, 3> by(taps);
    const Four bias = read4(taps + 9 * 4);
    before.fill(map, [&](int row, int column) {
        const Four v = by.sum<1, false>(whole, row, column, bias);
        const Input* at = dy + map.offset(work.batch, row, column, map.channels);
        Four dv = widen4(at);
        for (int k = 0; k < 4; ++k) {
            const float s = sigmoid(v.at[k]);
            dv.at[k] *= s * (1.0f + v.at[k] * (1.0f - s));
        }
        return narrow4(dv);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
        const int row = work.top + i / TILE, column = work.left + i % TILE;
        if (!map.has(row, column)) continue;
        const Quad sum = narrow4(by.sum<1, true>(before, row, column));
        *reinterpret_cast<Quad*>(dx + work.channel + map.offset(work.batch, row, column, map.channels)) = sum;
    }
    weight_gradient<3, 3, 1>(before, whole, work.top, work.left, scratch, own);
    const long long part = blockIdx.x / (map.channels / 4) * (long long)GATED_TAPS;
    for (int i = threadIdx.x; i < GATED_TAPS * 4; i += THREADS)
        sums[(part + i / 4) * map.channels + work.channel + i % 4] = own[i];
}
