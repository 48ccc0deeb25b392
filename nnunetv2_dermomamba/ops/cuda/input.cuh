// Inputs of 32 or 16 bits as float and back, four positions at once. Compiled with -DINPUT=0 (float32), 1 (float16) or
// 2 (bfloat16): plain bits, so that no header of the CUDA toolkit is needed.

#if INPUT == 0
typedef float Input;
__device__ __forceinline__ float widen(Input x) { return x; }
#else
typedef unsigned short Input;
__device__ __forceinline__ float widen(Input x) {
#if INPUT == 1 && defined(EMULATED)
    return emulated_half(x);
#elif INPUT == 1
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return __uint_as_float((unsigned)x << 16);
#endif
}
#endif

__device__ __forceinline__ Input narrow(float x) {
#if INPUT == 0
    return x;
#elif defined(EMULATED)
    return INPUT == 1 ? emulated_narrow_half(x) : emulated_narrow_bfloat(x);
#elif INPUT == 1
    Input y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    Input y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#endif
}

struct alignas(4 * sizeof(Input)) FourInputs {
    Input at[4];
};

__device__ __forceinline__ Four widen4(const Input* p) {
    const FourInputs v = *reinterpret_cast<const FourInputs*>(p);
    Four wide;
    for (int i = 0; i < 4; ++i) wide.at[i] = widen(v.at[i]);
    return wide;
}

#if INPUT != 0
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ Four widen4(const float* p) { return read4(p); }
#endif

// As widen4, of memory that no kernel writes while it reads it; fetches the whole line of 128 bytes into L2: the next
// sub-block reads its other half.
__device__ __forceinline__ Four stream4(const float* p) {
#ifdef EMULATED
    return read4(p);
#else
    Four v;
    asm("ld.global.nc.L2::128B.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.at[0]), "=f"(v.at[1]), "=f"(v.at[2]), "=f"(v.at[3])
        : "l"(p));
    return v;
#endif
}

#if INPUT != 0
__device__ __forceinline__ Four stream4(const Input* p) {
#ifdef EMULATED
    return widen4(p);
#else
    Four v;
    unsigned short bits[4];
    asm("ld.global.nc.L2::128B.v4.u16 {%0, %1, %2, %3}, [%4];"
        : "=h"(bits[0]), "=h"(bits[1]), "=h"(bits[2]), "=h"(bits[3])
        : "l"(p));
    for (int i = 0; i < 4; ++i) v.at[i] = widen(bits[i]);
    return v;
#endif
}
#endif
