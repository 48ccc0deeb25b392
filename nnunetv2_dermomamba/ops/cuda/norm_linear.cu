// LayerNorm over few channels, gate and linear map: y = matrix (norm(x) silu(gate)). After four.cuh and input.cuh.
//
// A thread has a whole row of channels in registers, and nothing passes between threads but sums of the parameters'
// gradients at the end. Threads walk over rows and may read the next before they compute with the last, where registers
// suffice. Sums and products are float32.
//
// Compiled with -DCHANNELS, -DOUTPUTS (multiples of 4), -DINPUT, -DGATE and -DRESULT (types of x, gate and y as in
// input.cuh), -DGATED=<whether there is a gate> and -DMAPS=<how many maps x is the sum of; forward only>.

extern __shared__ float shared[];

typedef Kind<GATE> Gate;
typedef Kind<RESULT> Result;
typedef Gate::Stored GateValue;
typedef Result::Stored ResultValue;

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int FORWARD_BLOCKS = 7, BACKWARD_BLOCKS = 4;  // that a processor holds at once
constexpr int MATRIX = OUTPUTS * CHANNELS;
constexpr int PARAMETERS = MATRIX + 2 * CHANNELS;  // matrix, scale and shift, in this order
static_assert(PARAMETERS <= THREADS, "each is some thread's");
// Forward, a thread makes up to 16 bytes of a row of y, so that neighbours write neighbouring bytes; threads of one row
// all normalise it.
constexpr int SHARE = RESULT != 0 && OUTPUTS % 8 == 0 ? 8 : 4, SHARERS = OUTPUTS / SHARE, ROWS = THREADS / SHARERS;

struct Sizes {
    int rows, x_row, gate_row;  // distances from row to row, in elements
    float eps;
};

// Adjacent values as they are stored, read and written at once.
template <typename T, int N>
struct alignas(N * sizeof(T) % 16 ? 8 : 16) Pack {
    T at[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> read(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

// Of kind K.
template <typename K, int N>
__device__ __forceinline__ void write(typename K::Stored* to, const float (&values)[N]) {
    Pack<typename K::Stored, N> pack;
    for (int i = 0; i < N; ++i) pack.at[i] = K::narrow(values[i]);
    *reinterpret_cast<Pack<typename K::Stored, N>*>(to) = pack;
}

// The hardware's, to the last bits but two.
__device__ __forceinline__ float reciprocal_root(float x) {
#ifdef EMULATED
    return 1.0f / sqrtf(x);
#else
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// A row of x and gate.
struct Row {
    Pack<Input, CHANNELS> x[MAPS];
    Pack<GateValue, CHANNELS> gates;

    // Behind the last row nothing is read.
    __device__ __forceinline__ void fetch(const Input* from, const GateValue* gate_from, const Sizes& sizes, int row) {
        if (row >= sizes.rows) return;
        for (int n = 0; n < MAPS; ++n)
            x[n] = read<CHANNELS>(from + ((long long)n * sizes.rows + row) * sizes.x_row);
        if (GATED) gates = read<CHANNELS>(gate_from + (long long)row * sizes.gate_row);
    }
    // Scales x to mean 0 and variance 1; what it was multiplied by is returned.
    __device__ __forceinline__ float normalise(float eps, float (&values)[CHANNELS]) const {
        float sum = 0.0f, squares = 0.0f;
        for (int c = 0; c < CHANNELS; ++c) {
            values[c] = widen(x[0].at[c]);
            for (int n = 1; n < MAPS; ++n) values[c] += widen(x[n].at[c]);
            sum += values[c];
        }
        for (int c = 0; c < CHANNELS; ++c) {
            values[c] -= sum / CHANNELS;
            squares = fmaf(values[c], values[c], squares);
        }
        const float by = reciprocal_root(squares / CHANNELS + eps);
        for (int c = 0; c < CHANNELS; ++c) values[c] *= by;
        return by;
    }
    __device__ __forceinline__ float gate(int c) const { return Gate::widen(gates.at[c]); }
};

// x: (MAPS, rows, CHANNELS), gate: (rows, CHANNELS), at the distances of ``sizes``; scale, shift: (CHANNELS);
// matrix: (OUTPUTS, CHANNELS); y: (rows, OUTPUTS). Any number of blocks.
extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    norm_linear_forward(const Input* x, const GateValue* gate, const float* scale, const float* shift,
                        const float* matrix, ResultValue* y, Sizes sizes) {
    const int share = threadIdx.x % SHARERS * SHARE, first = threadIdx.x / SHARERS;
    if (first >= ROWS) return;
    float weights[SHARE][CHANNELS], by[CHANNELS], plus[CHANNELS];
    for (int c = 0; c < CHANNELS; ++c) {
        for (int m = 0; m < SHARE; ++m) weights[m][c] = matrix[(share + m) * CHANNELS + c];
        by[c] = scale[c];
        plus[c] = shift[c];
    }
    const int step = gridDim.x * ROWS;
    int row = blockIdx.x * ROWS + first;
    Row next;
    next.fetch(x, gate, sizes, row);
#pragma unroll 1
    for (; row < sizes.rows; row += step) {
        const Row here = next;
        next.fetch(x, gate, sizes, row + step);
        float values[CHANNELS], sums[SHARE] = {};
        here.normalise(sizes.eps, values);
        for (int c = 0; c < CHANNELS; ++c) {
            values[c] = fmaf(values[c], by[c], plus[c]);
            if (GATED) values[c] *= here.gate(c) * sigmoid(here.gate(c));
            for (int m = 0; m < SHARE; ++m) sums[m] = fmaf(weights[m][c], values[c], sums[m]);
        }
        write<Result>(y + (long long)row * OUTPUTS + share, sums);
    }
}

// The block's sums of every thread's, to ``parts``: first over the lanes of a warp, then over the warps.
__device__ __forceinline__ void sum_block(float (&sums)[PARAMETERS], float* scratch, float* parts) {
    for (int i = 0; i < PARAMETERS; ++i) {
        for (int lanes = 16; lanes > 0; lanes /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], lanes);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * PARAMETERS + i] = sums[i];
    }
    __syncthreads();
    if (threadIdx.x < PARAMETERS) {
        float sum = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) sum += scratch[warp * PARAMETERS + threadIdx.x];
        parts[blockIdx.x * PARAMETERS + threadIdx.x] = sum;
    }
}

// As forward; dy: (rows, OUTPUTS); dx, dgate: (rows, CHANNELS); parts: (blocks, OUTPUTS + 2, CHANNELS), whose sum over
// blocks is the gradient of matrix, scale and shift.
extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    norm_linear_backward(const ResultValue* dy, const Input* x, const GateValue* gate, const float* scale,
                         const float* shift, const float* matrix, Input* dx, GateValue* dgate, float* parts,
                         Sizes sizes) {
    // Parameters in shared memory: all their gradients' sums are in registers.
    float* weights = shared;
    float* by = weights + MATRIX;
    float* plus = by + CHANNELS;
    if (threadIdx.x < MATRIX) weights[threadIdx.x] = matrix[threadIdx.x];
    if (threadIdx.x < CHANNELS) {
        by[threadIdx.x] = scale[threadIdx.x];
        plus[threadIdx.x] = shift[threadIdx.x];
    }
    __syncthreads();
    float sums[PARAMETERS] = {};
    const int step = gridDim.x * THREADS;
    int row = blockIdx.x * THREADS + threadIdx.x;
    Row next;
    Pack<ResultValue, OUTPUTS> dy_next;
    next.fetch(x, gate, sizes, row);
    if (row < sizes.rows) dy_next = read<OUTPUTS>(dy + (long long)row * OUTPUTS);
#pragma unroll 1
    for (; row < sizes.rows; row += step) {
        const Row here = next;
        const Pack<ResultValue, OUTPUTS> dy_here = dy_next;
        next.fetch(x, gate, sizes, row + step);
        if (row + step < sizes.rows) dy_next = read<OUTPUTS>(dy + (long long)(row + step) * OUTPUTS);
        float normal[CHANNELS], z[CHANNELS], dz[CHANNELS] = {};
        const float rstd = here.normalise(sizes.eps, normal);
        for (int c = 0; c < CHANNELS; ++c) {
            z[c] = fmaf(normal[c], by[c], plus[c]);
            if (GATED) z[c] *= here.gate(c) * sigmoid(here.gate(c));
        }
        for (int m = 0; m < OUTPUTS; ++m) {
            const float d = Result::widen(dy_here.at[m]);
            for (int c = 0; c < CHANNELS; c += 4) {
                const Four quad = read4(weights + m * CHANNELS + c);
                for (int k = 0; k < 4; ++k) {
                    dz[c + k] = fmaf(d, quad.at[k], dz[c + k]);
                    sums[m * CHANNELS + c + k] = fmaf(d, z[c + k], sums[m * CHANNELS + c + k]);
                }
            }
        }
        if (GATED) {
            float dgates[CHANNELS];
            for (int c = 0; c < CHANNELS; ++c) {
                const float s = sigmoid(here.gate(c)), silu = here.gate(c) * s;
                dgates[c] = dz[c] * fmaf(normal[c], by[c], plus[c]) * fmaf(silu, 1.0f - s, s);
                dz[c] *= silu;
            }
            write<Gate>(dgate + (long long)row * CHANNELS, dgates);
        }
        float mean = 0.0f, along = 0.0f;  // of the normalised row's gradient: what normalising takes away
        for (int c = 0; c < CHANNELS; ++c) {
            sums[MATRIX + c] = fmaf(dz[c], normal[c], sums[MATRIX + c]);
            sums[MATRIX + CHANNELS + c] += dz[c];
            dz[c] *= by[c];
            mean += dz[c];
            along = fmaf(dz[c], normal[c], along);
        }
        mean /= CHANNELS;
        along /= CHANNELS;
        for (int c = 0; c < CHANNELS; ++c) dz[c] = (dz[c] - mean - normal[c] * along) * rstd;
        write<Kind<INPUT>>(dx + (long long)row * CHANNELS, dz);
    }
    sum_block(sums, plus + CHANNELS, parts);
}
