// float32 arithmetic of ggml's encoders, for the GPU and, so that a test needs none, for the CPU.
//
// Every operation is rounded once: compile with -fmad=false (nvcc) or -ffp-contract=off, never with fast-math flags. Divisions and roots are
// correctly rounded and denormals are kept, which are nvcc's defaults.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline
#endif

namespace ggml {

constexpr float TINY = 1e-15f;  // a block whose largest magnitude is below this is zero
constexpr float INFINITE = HUGE_VALF;
constexpr float WHOLE = 12582912.0f;           // 1.5 * 2^23: the sum of this and a small number has no fraction
constexpr int LOWEST = -(1 << 22), HIGHEST = 1 << 22;  // bounds of what nearest() can give: no clipping

BOTH int32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_int(value);
#else
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

BOTH float float_of(int32_t bits) {
#ifdef __CUDA_ARCH__
    return __int_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

BOTH float magnitude(float value) { return fabsf(value); }

// Round half to even, clip to low..high. The whole number is read from the mantissa of value + WHOLE, so that past 2^22 it wraps as ggml's
// does. Not a number gives 0 there, whatever bits this processor gives it: a GPU's are 0x7fffffff.
BOTH float nearest(float value, int low, int high) {
    int32_t bits = bits_of(value + WHOLE);
    bits = bits < 0x7FC00000 ? bits : 0x7FC00000;
    bits &= 0x7FFFFF;
    bits = bits > low + 0x400000 ? bits : low + 0x400000;
    bits = bits < high + 0x400000 ? bits : high + 0x400000;
    return float_of(bits | 0x4B000000) - WHOLE;
}

BOTH float inverse(float value) { return value != 0.0f ? 1.0f / value : 0.0f; }

// Toward zero; 0 for what an int does not hold, since ggml keeps the low byte of the processor's answer, 2^31.
BOTH int truncate(float value) { return magnitude(value) < 2147483648.0f ? static_cast<int>(value) : 0; }

// The bits of the float16 nearest to a float32, ties to even; too large gives infinity.
BOTH uint16_t to_half(float value) {
    const int32_t bits = bits_of(value);
    const int32_t sign = (bits >> 16) & 0x8000;
    int32_t exponent = (bits >> 23) & 0xFF, mantissa = bits & 0x7FFFFF;
    if (exponent == 255) return static_cast<uint16_t>(sign | (mantissa != 0 ? 0x7E00 : 0x7C00));
    exponent -= 112;
    if (exponent >= 31) return static_cast<uint16_t>(sign | 0x7C00);
    if (exponent < -10) return static_cast<uint16_t>(sign);
    int shift = 13;
    if (exponent <= 0) {
        mantissa |= 0x800000;
        shift = 14 - exponent;
        exponent = 0;
    }
    int32_t half = (exponent << 10) + (mantissa >> shift);
    const int32_t rest = mantissa & ((1 << shift) - 1), middle = 1 << (shift - 1);
    if (rest > middle || (rest == middle && (half & 1))) ++half;
    return static_cast<uint16_t>(sign | half);
}

BOTH float from_half(uint16_t half) {
    const int32_t sign = (half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3FF;
    if (exponent == 0) {
        const float size = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        return sign ? -size : size;
    }
    return float_of(sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13));
}

BOTH bool is_infinite(uint16_t half) { return (half & 0x7C00) == 0x7C00; }  // or not a number

}  // namespace ggml
