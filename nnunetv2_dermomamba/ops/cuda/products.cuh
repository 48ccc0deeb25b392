// Matrix products of shared rows on the tensor cores, to float32's precision. After walk.cuh and input.cuh.
//
// A tile is 16 x 8: C[m][n] += sum over k of A[m][k] B[k][n], eight k at a time. Operands are tf32, which takes in the
// upper part of a float; the rest is a second operand, so that three products are as precise as one of float32. What
// came in 16 bits has no rest.

constexpr bool HALF_INPUT = INPUT != 0;

__device__ __forceinline__ void multiply(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef EMULATED
    emulated_multiply(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

// What tf32 leaves of x.
__device__ __forceinline__ float rest(float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// How a lane's places in a tile are dealt to rows in memory. The tensor cores give lane l rows l / 4 and l / 4 + 8, and
// k = l % 4 and l % 4 + 4. Here of eight rows the even ones come first: what half a warp touches of rows ROW floats
// apart then lies in different banks. So it does of k that are ROW apart, if a lane has two adjacent ones ("pairs");
// both operands of a product must have k dealt alike.
__device__ __forceinline__ int lane_column() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int lane_k() { return threadIdx.x % 4; }
__device__ __forceinline__ int tile_row() { return 2 * lane_column() % 8 + lane_column() / 4; }

// A lane's part of A, of 16 rows m or, where the others are 0, 8.
template <bool IS_EXACT>
struct Left {
    static constexpr bool EXACT = IS_EXACT;
    float high[4] = {}, low[4];

    // Rows ``stride`` apart, k side by side.
    static __device__ __forceinline__ Left along(const float* at, int stride, int rows = 16) {
        return Left(at + tile_row() * stride + lane_k(), 8 * stride, 4, rows);
    }
    // The same with k in pairs.
    static __device__ __forceinline__ Left pairs(const float* at, int stride, int rows = 16) {
        return Left(at + tile_row() * stride + 2 * lane_k(), 8 * stride, 1, rows);
    }
    // Rows side by side, k ``stride`` apart, in pairs.
    static __device__ __forceinline__ Left across(const float* at, int stride) {
        return Left(at + tile_row() + 2 * lane_k() * stride, 8, stride, 16);
    }
    __device__ __forceinline__ Left() {}

private:
    __device__ __forceinline__ Left(const float* at, int row_step, int k_step, int rows) {
        for (int i = 0; i < 4; ++i) {
            if (i % 2 * 8 < rows) high[i] = at[i % 2 * row_step + i / 2 * k_step];
            if (!EXACT) low[i] = rest(high[i]);
        }
    }
};

// A lane's part of B, of 8 columns n.
template <bool IS_EXACT>
struct Right {
    static constexpr bool EXACT = IS_EXACT;
    float high[2], low[2];

    // Columns ``stride`` apart, k side by side.
    static __device__ __forceinline__ Right along(const float* at, int stride) {
        return Right(at + lane_column() * stride + lane_k(), 4);
    }
    // The same with k in pairs.
    static __device__ __forceinline__ Right pairs(const float* at, int stride) {
        return Right(at + lane_column() * stride + 2 * lane_k(), 1);
    }
    // Columns side by side, k ``stride`` apart, in pairs.
    static __device__ __forceinline__ Right across(const float* at, int stride) {
        return Right(at + lane_column() + 2 * lane_k() * stride, stride);
    }
    __device__ __forceinline__ Right() {}

private:
    __device__ __forceinline__ Right(const float* at, int k_step) {
        for (int i = 0; i < 2; ++i) {
            high[i] = at[i * k_step];
            if (!EXACT) low[i] = rest(high[i]);
        }
    }
};

// The rests' products may have sums of their own: a product waits for the one before it with the same sum.
template <typename A, typename B>
__device__ __forceinline__ void multiply(float (&c)[4], float (&of_rests)[4], const A& a, const B& b) {
    if (!A::EXACT) multiply(of_rests, a.low, b.high);
    if (!B::EXACT) multiply(of_rests, a.high, b.low);
    multiply(c, a.high, b.high);
}

__device__ __forceinline__ void write2(float* to, float a, float b) {
    struct alignas(8) Two {
        float a, b;
    };
    *reinterpret_cast<Two*>(to) = Two{a, b};
}

// A lane's part of C: columns n and n + 1 of two rows m.
template <typename F>
__device__ __forceinline__ void each_pair(const float (&c)[4], F store) {
    const int n = 2 * lane_k();
    store(tile_row(), n, c[0], c[1]);
    store(tile_row() + 8, n, c[2], c[3]);
}

// C stored (or added) with rows side by side and columns ``stride`` apart.
template <bool ADD>
__device__ __forceinline__ void store_across(const float (&c)[4], float* to, int stride) {
    to += tile_row() + 2 * lane_k() * stride;
    for (int i = 0; i < 4; ++i) {
        float& at = to[i / 2 * 8 + i % 2 * stride];
        at = ADD ? at + c[i] : c[i];
    }
}
