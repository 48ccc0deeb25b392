// What all kernels share: four floats at once, the hardware's exponential and reciprocal.

constexpr float LOG2E = 1.4426950408889634f;

// The hardware's exponential: results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef EMULATED
    return emulated_exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The hardware's reciprocal, of whose result the last bit may be wrong.
__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef EMULATED
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(x * -LOG2E)); }

struct alignas(16) Four {
    float at[4];
};

__device__ __forceinline__ Four read4(const float* p) { return *reinterpret_cast<const Four*>(p); }
__device__ __forceinline__ void write4(float* p, const Four& v) { *reinterpret_cast<Four*>(p) = v; }
