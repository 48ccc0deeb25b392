// Depthwise kernels applied to planes. After tile.cuh.
//
// A thread makes a run of results that follow each other along the kernel's taps, ``Dilation`` apart: what one needs,
// the next needs as well, and is loaded and widened once. A kernel of several rows runs down, one of a single row to the
// right; a warp's runs lie side by side.

// An axis of ``Length`` positions as runs of ``Run``. The last ones begin early enough to end within the axis: they
// repeat positions of the runs before, or (if there are none) begin before the axis.
template <int Length, int Dilation, int Run>
struct Runs {
    static constexpr int GROUP = Run * Dilation;  // positions of as many runs as begin side by side
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

// What a kernel's shape says about its runs.
template <int Height, int Width, int Dilation>
struct Shape {
    static constexpr bool DOWN = Height > 1;
    static constexpr int TAPS = Height * Width;
    static constexpr int ALONG = DOWN ? Height : Width;  // taps along a run
    static constexpr int ACROSS = DOWN ? Width : 1;

    template <typename P>
    static constexpr int STEP = (DOWN ? P::PITCH : 1) * Dilation;  // between neighbours of a run, in quads

    // Instructions for the results of ``length`` x ``lines`` positions in runs of ``run``, about.
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
    // Adds to ``sums`` what the kernel makes around a run's positions, the first of which is given.
    template <int Run, typename P>
    __device__ __forceinline__ void add(const P& from, int row, int column, Four (&sums)[Run]) const {
        const Quad* first = &from(row - Height / 2 * Dilation, column - Width / 2 * Dilation);
#pragma unroll
        for (int step = 0; step < Run + Of::ALONG - 1; ++step)
            for (int j = 0; j < Of::ACROSS; ++j) {
                const Four value = widen4(first[step * Of::template STEP<P> + j * Dilation]);
                for (int i = 0; i < Of::ALONG; ++i) {
                    if (step < i || step - i >= Run) continue;
                    const Four& weight = at[i * Of::ACROSS + j];
                    for (int k = 0; k < 4; ++k)
                        sums[step - i].at[k] = fmaf(value.at[k], weight.at[k], sums[step - i].at[k]);
                }
            }
    }
    // Has a team give the results around ``Rows`` x ``Columns`` positions from (top, left), ``start`` added, to
    // ``take(row, column, result)``, some of them twice. Runs have up to ``Most`` results, which are registers.
    template <int Rows, int Columns, typename Team, int Most, typename P, typename F>
    __device__ __forceinline__ void apply(const P& from, int top, int left, const Four& start, F take) const {
        constexpr int LENGTH = Of::DOWN ? Rows : Columns, LINES = Of::DOWN ? Columns : Rows;
        constexpr int RUN = Of::best_run(LENGTH, LINES, Most);
        typedef Runs<LENGTH, Dilation, RUN> Axis;
#pragma unroll 1
        for (int before = 0; before < LINES * Axis::COUNT; before += Team::SIZE) {  // often just once
            const int i = before + Team::me();
            if (i >= LINES * Axis::COUNT) break;
            const int line = i % LINES, first = Axis::first(i / LINES);
            const int row = top + (Of::DOWN ? first : line), column = left + (Of::DOWN ? line : first);
            Four sums[RUN];
            for (Four& sum : sums) sum = start;
            add(from, row, column, sums);
#pragma unroll
            for (int k = 0; k < RUN; ++k)
                take(row + (Of::DOWN ? k * Dilation : 0), column + (Of::DOWN ? 0 : k * Dilation), sums[k]);
        }
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
