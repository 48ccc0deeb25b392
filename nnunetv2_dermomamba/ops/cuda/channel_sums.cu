// For every channel the sums of a and of a (b - shift) over all rows of a group: what the statistics of a normalisation
// are made of (a = b - shift), and its gradient (a is the result's). After four.cuh and input.cuh. Compiled with
// -DCHANNELS=<a power of two from 8 to 512>.

extern __shared__ float shared[];

constexpr int THREADS = 256, UNITS = CHANNELS / 8, LINES = THREADS / UNITS;

struct Sizes {
    int rows, parts, part_rows;  // of a group, which has so many parts of so many rows (the last one has fewer)
};

struct alignas(16) Unit {
    Input at[8];
};

// a: (groups, rows, CHANNELS), or null for b - shift; b: as a; shift: (groups, CHANNELS); sums: (groups, parts, 2,
// CHANNELS). A block for every part; a thread has eight channels of every LINES-th row.
extern "C" __global__ void __launch_bounds__(THREADS)
    channel_sums(const Input* a, const Input* b, const float* shift, float* sums, Sizes size) {
    const int group = blockIdx.x / size.parts, part = blockIdx.x % size.parts;
    const int first = threadIdx.x % UNITS * 8, line = threadIdx.x / UNITS;
    const int end = min(size.rows, (part + 1) * size.part_rows);
    const long long origin = (long long)group * size.rows * CHANNELS + first;
    float center[8], own[16] = {};
    for (int k = 0; k < 8; ++k) center[k] = shift[group * CHANNELS + first + k];
#pragma unroll 4
    for (int row = part * size.part_rows + line; row < end; row += LINES) {
        const long long at = origin + (long long)row * CHANNELS;
        const Unit right = *reinterpret_cast<const Unit*>(b + at);
        Unit left = {};
        if (a) left = *reinterpret_cast<const Unit*>(a + at);
        for (int k = 0; k < 8; ++k) {
            const float difference = widen(right.at[k]) - center[k], value = a ? widen(left.at[k]) : difference;
            own[k] += value;
            own[8 + k] = fmaf(value, difference, own[8 + k]);
        }
    }
    for (int k = 0; k < 16; ++k) shared[line * 2 * CHANNELS + k / 8 * CHANNELS + first + k % 8] = own[k];
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += THREADS) {
        float sum = 0.0f;
        for (int from = 0; from < LINES; ++from) sum += shared[from * 2 * CHANNELS + i];
        sums[(long long)blockIdx.x * 2 * CHANNELS + i] = sum;
    }
}
