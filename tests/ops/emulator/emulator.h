// CUDA on the CPU, for tests: a block's threads are fibers. A warp goes on alone until all its threads wait for other
// warps, so that it overtakes them where a barrier is missing. One block comes after the other. Shared memory starts as NaN, so that what nobody wrote shows.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

using std::max;
using std::min;

constexpr int SHARED_FLOATS = 56 * 1024;  // 224 KiB, a little less than what a block may have on Hopper
constexpr int STACK_BYTES = 1 << 16;

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
extern "C" {
alignas(16) float shared[SHARED_FLOATS];
}

struct Barrier {
    int arrived = 0, generation = 0;
};
struct Fiber {
    ucontext_t context;
    char* stack = nullptr;
    bool done = false;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static Barrier block_barrier, warp_barriers[32];
static float exchange[32][32][6];  // warp, lane, value
static std::function<void()> kernel;
static long progress;  // barriers reached and threads done

static void wait(Barrier& barrier, int count) {
    ++progress;
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}
static void __syncthreads() { wait(block_barrier, blockDim.x); }
static void __syncwarp() { wait(warp_barriers[threadIdx.x / 32], min(32u, blockDim.x)); }

static float __shfl_xor_sync(unsigned, float value, int lanes) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    exchange[warp][lane][0] = value;
    __syncwarp();
    const float other = exchange[warp][lane ^ lanes][0];
    __syncwarp();
    return other;
}

static float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static float emulated_exp2(float x) { return exp2f(x); }
static float emulated_half(unsigned short bits) {
    _Float16 x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static unsigned short emulated_narrow_half(float value) {
    const _Float16 x = value;
    unsigned short bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static unsigned short emulated_narrow_bfloat(float value) {  // to nearest, ties to even
    const unsigned bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// The tensor cores' product of tf32 operands, which leave out the low 13 bits.
static void emulated_multiply(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 6; ++i)
        exchange[warp][lane][i] = __uint_as_float(__float_as_uint(i < 4 ? a[i] : b[i - 4]) & 0xffffe000u);
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8; ++k)
            c[i] += exchange[warp][m % 8 * 4 + k % 4][m / 8 + k / 4 * 2] * exchange[warp][n * 4 + k % 4][4 + k / 4];
    }
    __syncwarp();
}

// The tensor cores' product of pairs of 16 bits, ``widen`` makes floats of them.
template <typename F>
void emulated_multiply(float (&c)[4], const unsigned (&a)[4], const unsigned* b, F widen) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 6; ++i) exchange[warp][lane][i] = __uint_as_float(i < 4 ? a[i] : b[i - 4]);
    __syncwarp();
    const auto value = [&](int of, int part, int odd) {
        return widen((unsigned short)(__float_as_uint(exchange[warp][of][part]) >> odd * 16));
    };
    for (int i = 0; i < 4; ++i) {
        const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k)
            c[i] += value(m % 8 * 4 + k % 8 / 2, m / 8 + k / 8 * 2, k % 2) * value(n * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
    __syncwarp();
}

// ldmatrix: four blocks of 8 x 8 values, lane l says where row l % 8 of block l / 8 is.
static void emulated_load_blocks(unsigned (&blocks)[4], const unsigned short* row, bool transposed) {
    static const unsigned short* rows[32][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, across = lane / 4, pair = lane % 4 * 2;
    rows[warp][lane] = row;
    __syncwarp();
    for (int block = 0; block < 4; ++block) {
        const unsigned short* const* of = rows[warp] + block * 8;
        const unsigned first = transposed ? of[pair][across] : of[across][pair];
        const unsigned second = transposed ? of[pair + 1][across] : of[across][pair + 1];
        blocks[block] = first | second << 16;
    }
    __syncwarp();
}

static void run_fiber() {
    kernel();
    fibers[current].done = true;
    ++progress;
    swapcontext(&fibers[current].context, &scheduler);
}

// Whether no block wrote behind ``shared_floats``, what it had asked for.
template <typename F>
bool run_grid(int blocks, int threads, int shared_floats, F call) {
    gridDim.x = blocks;
    blockDim.x = threads;
    fibers.resize(threads);
    kernel = call;
    for (int block = 0; block < blocks; ++block) {
        std::fill(shared, shared + SHARED_FLOATS, NAN);
        blockIdx.x = block;
        for (Fiber& fiber : fibers) {
            if (!fiber.stack) fiber.stack = (char*)malloc(STACK_BYTES);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack;
            fiber.context.uc_stack.ss_size = STACK_BYTES;
            fiber.context.uc_link = &scheduler;
            fiber.done = false;
            makecontext(&fiber.context, run_fiber, 0);
        }
        const int warps = (threads + 31) / 32;
        // Warps and lanes alternately first to last and last to first: who relies on an order is found out.
        int round = 0, pass = 0;
        for (bool busy = true; busy; ++round) {
            busy = false;
            for (int i = 0; i < warps; ++i) {
                const int first = (round % 2 ? warps - 1 - i : i) * 32, lanes = min(32, threads - first);
                for (long before = -1; before != progress; ++pass) {
                    before = progress;
                    for (int lane = 0; lane < lanes; ++lane) {
                        const int t = first + (pass % 2 ? lanes - 1 - lane : lane);
                        if (fibers[t].done) continue;
                        busy = true;
                        current = t;
                        threadIdx.x = t;
                        swapcontext(&scheduler, &fibers[t].context);
                    }
                }
            }
        }
        for (int at = shared_floats; at < SHARED_FLOATS; ++at)
            if (!std::isnan(shared[at])) return false;
    }
    return true;
}
