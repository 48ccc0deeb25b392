// Inputs of 32 or 16 bits as float and back, four positions at once. Compiled with -DINPUT=0 (float32), 1 (float16) or
// 2 (bfloat16): plain bits, so that no header of the CUDA toolkit is needed.

// How values of one type are stored: of 16 bits here, of 32 below.
template <int KIND>
struct Kind {
    typedef unsigned short Stored;

    static __device__ __forceinline__ float widen(Stored x) {
        if constexpr (KIND == 2) {
            return __uint_as_float((unsigned)x << 16);
        } else {
#ifdef EMULATED
            return emulated_half(x);
#else
            float y;
            asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
            return y;
#endif
        }
    }
    static __device__ __forceinline__ Stored narrow(float x) {
#ifdef EMULATED
        return KIND == 1 ? emulated_narrow_half(x) : emulated_narrow_bfloat(x);
#else
        Stored y;
        if constexpr (KIND == 1)
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        else
            asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
#endif
    }
};

template <>
struct Kind<0> {
    typedef float Stored;

    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float narrow(float x) { return x; }
};

typedef Kind<INPUT>::Stored Input;

__device__ __forceinline__ float widen(Input x) { return Kind<INPUT>::widen(x); }
__device__ __forceinline__ Input narrow(float x) { return Kind<INPUT>::narrow(x); }

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
