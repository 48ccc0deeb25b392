// Depthwise convolutions of channels-last maps, several in one kernel: what passes between them stays in shared memory.
//
// A block makes a tile of results of four channels. Planes hold what the tile's results depend on, 0 outside the map,
// and are rounded to the map's type, as PyTorch would round an axial convolution's result.

extern __shared__ float shared[];

// x + dw3x3(dw7x1(dw1x7(x))). A branch's weights, [tap][channel]: 1 x 7, bias, 7 x 1, bias, 3 x 3, bias.
constexpr int ROW_TAPS = 0, COLUMN_TAPS = 8, SQUARE_TAPS = 16, AXIAL_TAPS = 26;

template <int Taps>
__device__ __forceinline__ void stage_taps(const float* weights, int channels, float* to) {
    static_assert(Taps * 4 <= THREADS, "a value a thread");
    const int i = threadIdx.x;
    if (i < Taps * 4) to[i] = weights[i / 4 * channels + i % 4];
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

// What 1 x 7 and 7 x 1 make of x, which is ``whole``: both passes begin with it.
template <int E>
__device__ __forceinline__ void axial_planes(const Sizes& map, const float* taps,
                                             const typename Axial<E>::Whole& whole,
                                             const typename Axial<E>::Rows& rows,
                                             const typename Axial<E>::Square& square) {
    __syncthreads();
    Taps<1, 7, E, false>(taps + ROW_TAPS * 4).fill(rows, map, whole, read4(taps + (ROW_TAPS + 7) * 4));
    __syncthreads();
    Taps<7, 1, E, false>(taps + COLUMN_TAPS * 4).fill(square, map, rows, read4(taps + (COLUMN_TAPS + 7) * 4));
    __syncthreads();
}

template <int E>
__device__ __forceinline__ void axial_branch(const Sizes& map, const Work& work, const Input* x, int pitch,
                                             const float* taps, Quad* planes, Input* y) {
    typedef Axial<E> A;
    const typename A::Whole whole{planes, work.top - 4 * E, work.left - 4 * E};
    const typename A::Rows rows{whole.quads + A::Whole::QUADS, work.top - 4 * E, work.left - E};
    const typename A::Square square{rows.quads + A::Rows::QUADS, work.top - E, work.left - E};
    whole.each([&](int row, int column) { whole(row, column) = map.read(x, row, column, pitch); });
    axial_planes<E>(map, taps, whole, rows, square);
    const Taps<3, 3, E, false> by(taps + SQUARE_TAPS * 4);
    const Four bias = read4(taps + (SQUARE_TAPS + 9) * 4);
    by.template apply<TILE, TILE, Everyone, 4>(
        square, work.top, work.left, bias, [&](int row, int column, const Four& sum) {
            if (!map.has(row, column)) return;
            const Quad out = narrow4(add4(widen4(whole(row, column)), sum));
            map.at(y, row, column, map.channels) = out;
        });
}

// x: (batch, height, width, pitch), of which 3 channels are read, branch after branch; weights: (3, 26, channels);
// y: (3 batch, height, width, channels). A block for every tile, branch and four channels.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    axial_forward(const Input* x, const float* weights, Input* y, int batches, int pitch, Sizes map) {
    const Work work(map, 3);
    float* taps = shared;
    Quad* planes = reinterpret_cast<Quad*>(shared + AXIAL_TAPS * 4);
    stage_taps<AXIAL_TAPS>(weights + work.branch * AXIAL_TAPS * map.channels + work.channel, map.channels, taps);
    x += work.branch * map.channels + work.channel + map.before(work.batch, pitch);
    y += work.channel + map.before(work.branch * batches + work.batch, map.channels);
    if (work.branch == 0) axial_branch<1>(map, work, x, pitch, taps, planes, y);
    if (work.branch == 1) axial_branch<2>(map, work, x, pitch, taps, planes, y);
    if (work.branch == 2) axial_branch<3>(map, work, x, pitch, taps, planes, y);
}

template <int E>
__device__ __forceinline__ void axial_branch_back(const Sizes& map, const Work& work, const Input* dy, const Input* x,
                                                  int pitch, const float* taps, float* parts, Quad* planes, Input* dx,
                                                  float* sums) {
    typedef Axial<E> A;
    typedef WeightGradient<3, 3, E, Everyone> SquareGradient;
    typedef WeightGradient<7, 1, E, FirstHalf> ColumnGradient;
    typedef WeightGradient<1, 7, E, SecondHalf> RowGradient;
    const int top = work.top, left = work.left;
    const typename A::Whole whole{planes, top - 4 * E, left - 4 * E};
    const typename A::Whole out{whole.quads + A::Whole::QUADS, whole.top, whole.left};
    const typename A::Rows rows{out.quads + A::Whole::QUADS, top - 4 * E, left - E};
    const typename A::Square square{rows.quads + A::Rows::QUADS, top - E, left - E};
    const typename A::SquareBack dsquare{square.quads, top - 3 * E, left - 3 * E};  // in its place
    const typename A::RowsBack drows{dsquare.quads + A::SquareBack::QUADS, top, left - 3 * E};
    const Plane<TILE, TILE> result{rows.quads, top, left};  // in its place
    whole.each([&](int row, int column) {
        whole(row, column) = map.read(x, row, column, pitch);
        out(row, column) = map.read(dy, row, column, map.channels);
    });
    axial_planes<E>(map, taps, whole, rows, square);
    SquareGradient::add_up(out, square, top, left, parts);
    __syncthreads();
    SquareGradient::write(parts, sums + SQUARE_TAPS * map.channels, map.channels);
    Taps<3, 3, E, true>(taps + SQUARE_TAPS * 4).fill(dsquare, map, out);
    __syncthreads();
    Taps<7, 1, E, true>(taps + COLUMN_TAPS * 4).fill(drows, map, dsquare);
    __syncthreads();
    float* row_parts = parts + ColumnGradient::PARTS * ColumnGradient::SUMS;
    if (threadIdx.x < FirstHalf::SIZE)
        ColumnGradient::add_up(dsquare, rows, top, left, parts);
    else
        RowGradient::add_up(drows, whole, top, left, row_parts);
    __syncthreads();
    ColumnGradient::write(parts, sums + COLUMN_TAPS * map.channels, map.channels);
    RowGradient::write(row_parts, sums + ROW_TAPS * map.channels, map.channels);
    Taps<1, 7, E, true>(taps + ROW_TAPS * 4)
        .template apply<TILE, TILE, Everyone, 6>(drows, top, left, {}, [&](int row, int column, const Four& sum) {
            result(row, column) = narrow4(add4(widen4(out(row, column)), sum));
        });
    __syncthreads();
    result.each([&](int row, int column) {
        if (map.has(row, column)) map.at(dx, row, column, 3 * map.channels) = result(row, column);
    });
}

// dx: (batch, height, width, 3 channels); sums: (batch tiles, 3, 26, channels), a block's own part of the weights'
// gradients.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    axial_backward(const Input* dy, const Input* x, const float* weights, Input* dx, float* sums, int batches,
                   int pitch, Sizes map) {
    const Work work(map, 3);
    float* taps = shared;
    float* parts = taps + AXIAL_TAPS * 4;
    Quad* planes = reinterpret_cast<Quad*>(parts + WARPS * MOST_SUMS);
    stage_taps<AXIAL_TAPS>(weights + work.branch * AXIAL_TAPS * map.channels + work.channel, map.channels, taps);
    dy += work.channel + map.before(work.branch * batches + work.batch, map.channels);
    x += work.branch * map.channels + work.channel + map.before(work.batch, pitch);
    dx += work.branch * map.channels + work.channel + map.before(work.batch, 3 * map.channels);
    sums += (long long)work.part * AXIAL_TAPS * map.channels + work.channel;
    if (work.branch == 0) axial_branch_back<1>(map, work, dy, x, pitch, taps, parts, planes, dx, sums);
    if (work.branch == 1) axial_branch_back<2>(map, work, dy, x, pitch, taps, parts, planes, dx, sums);
    if (work.branch == 2) axial_branch_back<3>(map, work, dy, x, pitch, taps, parts, planes, dx, sums);
}

// silu(dw3x3(x)). Weights, [tap][channel]: 3 x 3, bias.
constexpr int GATED_TAPS = 10;

// x: (batch, height, width, pitch); weights: (10, channels); y: (batch, height, width, channels).
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    silu_forward(const Input* x, const float* weights, Input* y, int pitch, Sizes map) {
    const Work work(map, 1);
    float* taps = shared;
    stage_taps<GATED_TAPS>(weights + work.channel, map.channels, taps);
    Quad* planes = reinterpret_cast<Quad*>(shared + GATED_TAPS * 4);
    const Plane<TILE + 2, TILE + 2> whole{planes, work.top - 1, work.left - 1};
    x += work.channel + map.before(work.batch, pitch);
    whole.each([&](int row, int column) { whole(row, column) = map.read(x, row, column, pitch); });
    y += work.channel + map.before(work.batch, map.channels);
    __syncthreads();
    const Taps<3, 3, 1, false> by(taps);
    const Four bias = read4(taps + 9 * 4);
    by.apply<TILE, TILE, Everyone, 4>(whole, work.top, work.left, bias, [&](int row, int column, Four sum) {
        if (!map.has(row, column)) return;
        for (int k = 0; k < 4; ++k) sum.at[k] *= sigmoid(sum.at[k]);
        map.at(y, row, column, map.channels) = narrow4(sum);
    });
}

// silu's derivative at v times dv.
__device__ __forceinline__ Four silu_back(const Four& v, Four dv) {
    for (int k = 0; k < 4; ++k) {
        const float s = sigmoid(v.at[k]);
        dv.at[k] *= s * (1.0f + v.at[k] * (1.0f - s));
    }
    return dv;
}

// dx: (batch, height, width, channels); sums: (batch tiles, 10, channels).
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    silu_backward(const Input* dy, const Input* x, const float* weights, Input* dx, float* sums, int pitch, Sizes map) {
    const Work work(map, 1);
    float* taps = shared;
    float* parts = taps + GATED_TAPS * 4;
    stage_taps<GATED_TAPS>(weights + work.channel, map.channels, taps);
    typedef Plane<TILE + 4, TILE + 4> Whole;
    typedef Plane<TILE + 2, TILE + 2> Before;
    const int top = work.top, left = work.left;
    const Whole whole{reinterpret_cast<Quad*>(parts + WARPS * MOST_SUMS), top - 2, left - 2};
    const Before before{whole.quads + Whole::QUADS, top - 1, left - 1};  // of silu
    x += work.channel + map.before(work.batch, pitch);
    whole.each([&](int row, int column) { whole(row, column) = map.read(x, row, column, pitch); });
    __syncthreads();
    dy += work.channel + map.before(work.batch, map.channels);
    typedef Taps<3, 3, 1, false> Kernel;
    typedef Kernel::RunOver<TILE + 2, TILE + 2, 5> R;
    const Kernel by(taps);
    const Four bias = read4(taps + 9 * 4);
    by.for_runs<TILE + 2, TILE + 2, Everyone, 5>(top - 1, left - 1, [&](const R& run) {
        const Fours<R::SIZE> v = by.sums(whole, run, bias);
        Quad dv[R::SIZE];  // 0 outside the map; all are asked for before the first is waited for
#pragma unroll
        for (int k = 0; k < R::SIZE; ++k) dv[k] = map.read(dy, run.row(k), run.column(k), map.channels);
#pragma unroll
        for (int k = 0; k < R::SIZE; ++k)
            before(run.row(k), run.column(k)) = narrow4(silu_back(v.of[k], widen4(dv[k])));
    });
    __syncthreads();
    typedef WeightGradient<3, 3, 1, FirstHalf> Gradient;
    if (threadIdx.x < FirstHalf::SIZE) {
        Gradient::add_up(before, whole, top, left, parts);
    } else {
        dx += work.channel + map.before(work.batch, map.channels);
        const Taps<3, 3, 1, true> back(taps);
        back.apply<TILE, TILE, SecondHalf, 4>(before, top, left, {}, [&](int row, int column, const Four& sum) {
            if (!map.has(row, column)) return;
            map.at(dx, row, column, map.channels) = narrow4(sum);
        });
    }
    __syncthreads();
    sums += (long long)work.part * GATED_TAPS * map.channels + work.channel;
    Gradient::write(parts, sums, map.channels);
}
