// Tiles of a map in shared memory, for depthwise convolutions: four channels of a position ("quad") side by side, as
// they are stored. After four.cuh and input.cuh. Compiled with -DTILE=<side of a tile of results, in positions>.

constexpr int THREADS = 256;

// Four inputs as words, which are copied and selected with fewer instructions.
struct alignas(sizeof(FourInputs)) Quad {
    unsigned words[sizeof(FourInputs) / 4];
};

__device__ __forceinline__ Four widen4(const Quad& q) {
    FourInputs inputs;
    memcpy(&inputs, &q, sizeof q);
    return widen4(inputs.at);
}
__device__ __forceinline__ Quad narrow4(const Four& v) {
    FourInputs inputs;
    for (int k = 0; k < 4; ++k) inputs.at[k] = narrow(v.at[k]);
    Quad q;
    memcpy(&q, &inputs, sizeof q);
    return q;
}

__device__ __forceinline__ Four add4(const Four& a, const Four& b) {
    Four sum;
    for (int k = 0; k < 4; ++k) sum.at[k] = a.at[k] + b.at[k];
    return sum;
}

// Some of a block's threads, which share work: ``Size`` from thread ``First``, whole warps.
template <int First, int Size>
struct Team {
    static constexpr int SIZE = Size;
    static __device__ __forceinline__ int me() { return threadIdx.x - First; }
};
typedef Team<0, THREADS> Everyone;
typedef Team<0, THREADS / 2> FirstHalf;
typedef Team<THREADS / 2, THREADS / 2> SecondHalf;

// Of a batch of maps (batch, height, width, channels), channels last. ``pitch``: distance of positions, in elements.
struct Sizes {
    int height, width, channels;

    __device__ __forceinline__ bool has(int row, int column) const {
        return (unsigned)row < (unsigned)height && (unsigned)column < (unsigned)width;
    }
    // Elements before a map.
    __device__ __forceinline__ long long before(int batch, int pitch) const {
        return (long long)batch * height * width * pitch;
    }
    // Of a map that begins at ``first``. Bytes and no signs: one instruction multiplies and adds.
    __device__ __forceinline__ const Quad& at(const Input* first, int row, int column, int pitch) const {
        const unsigned position = row * width + column, size = pitch * sizeof(Input);
        const unsigned long long bytes = (unsigned long long)position * size;
        return *reinterpret_cast<const Quad*>(reinterpret_cast<const char*>(first) + bytes);
    }
    __device__ __forceinline__ Quad& at(Input* first, int row, int column, int pitch) const {
        return const_cast<Quad&>(at(const_cast<const Input*>(first), row, column, pitch));
    }
    // 0 outside the map.
    __device__ __forceinline__ Quad read(const Input* first, int row, int column, int pitch) const {
        return has(row, column) ? at(first, row, column, pitch) : Quad{};
    }
};

// ``Rows`` x ``Columns`` positions of a map from (top, left), which may be outside of it.
template <int Rows, int Columns>
struct Plane {
    static constexpr int PITCH = Columns | 1;  // odd: neither neighbours in a row nor in a column share a bank
    static constexpr int QUADS = Rows * PITCH;
    Quad* quads;
    int top, left;

    __device__ __forceinline__ Quad& operator()(int row, int column) const {
        return quads[(row - top) * PITCH + column - left];
    }
    // Has the threads share the positions.
    template <typename F>
    __device__ __forceinline__ void each(F work) const {
        for (int i = threadIdx.x; i < Rows * Columns; i += THREADS) work(top + i / Columns, left + i % Columns);
    }
};

// Which tile, batch and channels are a block's: blocks of the same positions are neighbours, since they share lines.
// ``part``: blocks of other channels have the same one. Divisions without a sign are shorter.
struct Work {
    int batch, branch, channel, top, left, part;

    __device__ __forceinline__ Work(const Sizes& map, unsigned branches) {
        const unsigned quads = map.channels / 4u, across = (map.width + TILE - 1u) / TILE;
        const unsigned tiles = across * ((map.height + TILE - 1u) / TILE);
        part = blockIdx.x / quads;
        channel = blockIdx.x % quads * 4;
        branch = part % branches;
        const unsigned index = part / branches, tile = index % tiles;
        batch = index / tiles;
        top = tile / across * TILE;
        left = tile % across * TILE;
    }
};
