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

// A lane's part of A: rows m, m + 8, columns k, k + 4 of a tile, for m = lane / 4 and k = lane % 4.
struct Left {
    float high[4], low[4];

    __device__ __forceinline__ Left() {}
    // at[m * m_stride + k * k_stride], 0 where m or k is past its end.
    __device__ __forceinline__ Left(const float* at, int m_stride, int k_stride, int m_end, int k_end) {
        const int m = threadIdx.x % 32 / 4, k = threadIdx.x % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = m + (i & 1) * 8, column = k + (i >> 1) * 4;
            high[i] = row < m_end && column < k_end ? at[row * m_stride + column * k_stride] : 0.0f;
            low[i] = rest(high[i]);
        }
    }
};

// A lane's part of B: rows k, k + 4, column n of a tile, for k = lane % 4 and n = lane / 4.
template <bool EXACT>
struct Right {
    float high[2], low[2];

    __device__ __forceinline__ Right() {}
    __device__ __forceinline__ Right(const float* at, int k_stride, int n_stride) {
        const int k = threadIdx.x % 4, n = threadIdx.x % 32 / 4;
        for (int i = 0; i < 2; ++i) {
            high[i] = at[(k + i * 4) * k_stride + n * n_stride];
            if (!EXACT) low[i] = rest(high[i]);
        }
    }
};

template <bool EXACT>
__device__ __forceinline__ void multiply(float (&c)[4], const Left& a, const Right<EXACT>& b) {
    multiply(c, a.low, b.high);
    if (!EXACT) multiply(c, a.high, b.low);
    multiply(c, a.high, b.high);
}

__device__ __forceinline__ void write2(float* to, float a, float b) {
    struct alignas(8) Two {
        float a, b;
    };
    *reinterpret_cast<Two*>(to) = Two{a, b};
}

// A lane's part of C: columns n and n + 1 of rows m and m + 8, for m = lane / 4 and n = 2 (lane % 4).
template <typename F>
__device__ __forceinline__ void each_pair(const float (&c)[4], F store) {
    const int m = threadIdx.x % 32 / 4, n = threadIdx.x % 4 * 2;
    store(m, n, c[0], c[1]);
    store(m + 8, n, c[2], c[3]);
}
