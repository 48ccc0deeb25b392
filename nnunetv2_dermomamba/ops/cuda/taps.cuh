// Depthwise kernels applied to planes. After tile.cuh.
//
// A thread makes a run of results that follow each other along the kernel's taps, ``Dilation`` apart: what one needs,
// the next needs as well, and is loaded and widened once. Kernels of several rows run down, those of one row run to the
// right; a warp's runs lie side by side.

// An axis of ``Length`` positions as runs of ``Size``. The last ones begin early enough to end within the axis: they
// repeat positions of the runs before, or (if there are none) begin before the axis.
template <int Length, int Dilation, int Size>
struct Runs {
    static constexpr int GROUP = Size * Dilation;  // positions of as many runs as begin side by side
    static constexpr int COUNT = (Length + GROUP - 1) / GROUP * Dilation;
    static constexpr bool EVEN = Length % GROUP == 0;

    static __device__ __forceinline__ int first(int run) {
        const int group = run / Dilation * GROUP;
        return (EVEN ? group : min(group, Length - GROUP)) + run % Dilation;
    }
    static __device__ __forceinline__ bool repeats(int run, int position) {
        return !EVEN && position < run / Dilation * GROUP;
    }
};

// One of them on a map.
template <bool Down, int Dilation, int Size>
struct Run {
    static constexpr int SIZE = Size;
    int top, left;

    __device__ __forceinline__ int row(int k) const { return top + (Down ? k * Dilation : 0); }
    __device__ __forceinline__ int column(int k) const { return left + (Down ? 0 : k * Dilation); }
};

template <int Count>
struct Fours {
    Four of[Count];
};

// What a kernel's shape says about its runs.
template <int Height, int Width, int Dilation>
struct Shape {
    static constexpr bool DOWN = Height > 1;
    static constexpr int TAPS = Height * Width;
    static constexpr int ALONG = DOWN ? Height : Width;  // taps along a run
    static constexpr int ACROSS = DOWN ? Width : 1;

    template <typename P>
    static constexpr int STEP = (DOWN ? P::PITCH : 1) * Dilation;  // between neighbours of a run, in quads

    // Instructions for the results of ``length`` x ``lines`` positions in runs of ``run``, about: 30 to begin one, 9
    // for what becomes of a result, 5 to load and widen a quad.
    static constexpr __device__ int cost(int length, int lines, int run) {
        const int runs = (length + run * Dilation - 1) / (run * Dilation) * Dilation;
        const int loads = (run + ALONG - 1) * ACROSS;
        return (runs * lines + 31) / 32 * (30 + run * (TAPS * 4 + 9) + loads * 5);
    }
    // The cheapest run of up to ``most``.
    static constexpr __device__ int best_run(int length, int lines, int most) {
        int best = 2;
        for (int run = 3; run <= most; ++run)
            if (cost(length, lines, run) < cost(length, lines, best)) best = run;
        return best;
    }
};

// A kernel's weights for four channels, in registers. ``Flip``: reversed, which gives the gradient of what the kernel
// was applied to.
template <int Height, int Width, int Dilation, bool Flip>
struct Taps {
    typedef Shape<Height, Width, Dilation> Of;
    Four at[Of::TAPS];

    // weights: [tap][4]
    __device__ __forceinline__ explicit Taps(const float* weights) {
        for (int tap = 0; tap < Of::TAPS; ++tap) at[Flip ? Of::TAPS - 1 - tap : tap] = read4(weights + tap * 4);
    }
    // What the kernel makes around a run's positions.
    template <typename P, typename R>
    __device__ __forceinline__ Fours<R::SIZE> sums(const P& from, const R& run, const Four& start) const {
        Fours<R::SIZE> sums;
        for (Four& sum : sums.of) sum = start;
        const Quad* first = &from(run.row(0) - Height / 2 * Dilation, run.column(0) - Width / 2 * Dilation);
#pragma unroll
        for (int step = 0; step < R::SIZE + Of::ALONG - 1; ++step)
            for (int j = 0; j < Of::ACROSS; ++j) {
                const Four value = widen4(first[step * Of::template STEP<P> + j * Dilation]);
                for (int i = 0; i < Of::ALONG; ++i) {
                    if (step < i || step - i >= R::SIZE) continue;
                    const Four& weight = at[i * Of::ACROSS + j];
                    Four& sum = sums.of[step - i];
                    for (int k = 0; k < 4; ++k) sum.at[k] = fmaf(value.at[k], weight.at[k], sum.at[k]);
                }
            }
        return sums;
    }
    // What cuts ``Rows`` x ``Columns`` positions. A run has up to ``Most`` of them: their results are registers.
    template <int Rows, int Columns, int Most>
    using RunOver = Run<Of::DOWN, Dilation, Of::best_run(Of::DOWN ? Rows : Columns, Of::DOWN ? Columns : Rows, Most)>;

    // Has a team take the runs over ``Rows`` x ``Columns`` positions from (top, left), some positions twice.
    template <int Rows, int Columns, typename Team, int Most, typename F>
    static __device__ __forceinline__ void for_runs(int top, int left, F work) {
        constexpr int LENGTH = Of::DOWN ? Rows : Columns, LINES = Of::DOWN ? Columns : Rows;
        typedef RunOver<Rows, Columns, Most> R;
        typedef Runs<LENGTH, Dilation, R::SIZE> Axis;
#pragma unroll 1
        for (int before = 0; before < LINES * Axis::COUNT; before += Team::SIZE) {  // often just once
            const int i = before + Team::me();
            if (i >= LINES * Axis::COUNT) break;
            const int line = i % LINES, first = Axis::first(i / LINES);
            work(R{top + (Of::DOWN ? first : line), left + (Of::DOWN ? line : first)});
        }
    }
    // As ``for_runs``; gives ``take(row, column, result)`` the results around the positions, ``start`` added.
    template <int Rows, int Columns, typename Team, int Most, typename P, typename F>
    __device__ __forceinline__ void apply(const P& from, int top, int left, const Four& start, F take) const {
        typedef RunOver<Rows, Columns, Most> R;
        for_runs<Rows, Columns, Team, Most>(top, left, [&](const R& run) {
            const Fours<R::SIZE> results = sums(from, run, start);
#pragma unroll
            for (int k = 0; k < R::SIZE; ++k) take(run.row(k), run.column(k), results.of[k]);
        });
    }
    // Has all threads fill ``to`` with what the kernel makes of ``from``, 0 outside the map.
    template <typename P, int Rows, int Columns>
    __device__ __forceinline__ void fill(const Plane<Rows, Columns>& to, const Sizes& map, const P& from,
                                         const Four& start = {}) const {
        apply<Rows, Columns, Everyone, 6>(from, to.top, to.left, start, [&](int row, int column, const Four& sum) {
            to(row, column) = map.has(row, column) ? narrow4(sum) : Quad{};
        });
    }
};
