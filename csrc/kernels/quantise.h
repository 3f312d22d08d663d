// Keys and values to the numbers of a quantised cache, rounded to the nearest, ties to even.
#pragma once

#include "activations.h"

namespace duo {
namespace {

DUO_INLINE Vec min(Vec a, Vec b) { return -max(-a, -b); }
DUO_INLINE Vec magnitude(Vec x) { return (Vec)((VecBits)x & 0x7fffffffu); }

// To a sign, 7 - Mantissa bits of exponent and Mantissa bits, as the low byte. What is greater than
// `Greatest` becomes that; NaN becomes all ones.
template <int Mantissa, int Bias, int Greatest>
DUO_INLINE VecBits to_float8(Vec x) {
    constexpr int shift = 23 - Mantissa;
    const VecBits sign = (VecBits)x >> 24 & 0x80u;
    const Vec size = min(magnitude(x), broadcast(Greatest));
    const VecBits bits = (VecBits)size;
    const VecBits odd = bits >> shift & 1u;
    const VecBits rounded = (bits + ((1u << (shift - 1)) - 1u) + odd) >> shift;
    const VecBits normal = rounded - ((127u - Bias) << Mantissa);
    // Below the least normal number an addition aligns the last bit.
    constexpr uint32_t align = (127u + shift + 1 - Bias) << 23;
    const VecBits subnormal = (VecBits)(size + (Vec)(VecBits{} + align)) - align;
    const VecBits is_normal = (VecBits)(bits >= (128u - Bias) << 23);
    const VecBits number = (normal & is_normal) | (subnormal & ~is_normal);
    const VecBits nan = (VecBits)(x != x);
    return (number & ~nan) | (nan & 0x7fu) | sign;
}

template <typename T>
struct Quantised;
template <>
struct Quantised<Float8E4M3> {
    static constexpr float GREATEST = 448.0f;
    static DUO_INLINE VecBits from(Vec x) { return to_float8<3, 7, 448>(x); }
};
template <>
struct Quantised<Float8E5M2> {
    static constexpr float GREATEST = 57344.0f;
    static DUO_INLINE VecBits from(Vec x) { return to_float8<2, 15, 57344>(x); }
};

// Integers stand in the low bits of what comes out.
template <int Greatest>
DUO_INLINE VecBits to_integer(Vec x) {
    const Vec shift = broadcast(12582912.0f);  // 1.5 * 2 ** 23: adding it rounds to an integer
    const Vec inside = max(min(x, broadcast(Greatest)), broadcast(-Greatest));
    return (VecBits)(inside + shift);
}
template <>
struct Quantised<Int8> {
    static constexpr float GREATEST = 127.0f;
    static DUO_INLINE VecBits from(Vec x) { return to_integer<127>(x); }
};
template <>
struct Quantised<Int4Pair> {
    static constexpr float GREATEST = 7.0f;
    static DUO_INLINE VecBits from(Vec x) { return to_integer<7>(x); }
};

// Scales below this are this: their numbers are as good as 0, and can be divided by.
constexpr float LEAST_SCALE = 1e-30f;

DUO_INLINE float greatest_magnitude(const float* row, int head_size) {
    Vec most{};
    Vec nan{};  // a maximum of NaN is not to be relied on, a sum is
    for (int i = 0; i < head_size; i += 16) {
        for (int j = i; j < i + 16; j += LANES) {
            most = max(most, magnitude(load(row + j)));
            nan += load(row + j) * 0.0f;
        }
    }
    return max_lane(most) + sum(nan);
}

// One row of floats to `to`.
template <typename T>
DUO_INLINE void quantise_row(const float* row, int head_size, float inverse, char* to) {
    for (int i = 0; i < head_size; i += LANES) {
        const VecBits bits = Quantised<T>::from(load(row + i) * inverse);
        *reinterpret_cast<VecByteAny*>(to + i) = __builtin_convertvector(bits, VecByte);
    }
}

// The same for two numbers a byte.
DUO_INLINE void quantise_pairs(const float* row, int head_size, float inverse, char* to) {
    char numbers[MAX_HEAD_SIZE];
    quantise_row<Int4Pair>(row, head_size, inverse, numbers);
    for (int i = 0; i < head_size / 2; ++i) {
        to[i] = static_cast<char>((numbers[2 * i] & 0xf) | numbers[2 * i + 1] << 4);
    }
}

// One row of activations to `to`; its scale, or the given one where the dtype has none of its own.
template <typename T>
DUO_INLINE float quantise_activations(const LayerStep& step, const Rows& rows, int64_t token,
                                      int head, float scale, char* to) {
    float row[MAX_HEAD_SIZE];
    load_ordered_row(step, row_address(rows, step.activations, token, head),
                     head_chunks(step.head_size), 1.0f, IS_ROTATED<T>, row);
    if (scale_bytes(step.dtype)) {
        scale = greatest_magnitude(row, step.head_size) / Quantised<T>::GREATEST;
        if (scale < LEAST_SCALE) scale = LEAST_SCALE;
    }
    if constexpr (CHUNK_OF<T> == CHUNK) {
        quantise_row<T>(row, step.head_size, 1.0f / scale, to);
    } else {
        quantise_pairs(row, step.head_size, 1.0f / scale, to);
    }
    return scale;
}

template <typename T>
void quantise_as(const LayerStep& step, int heads, int64_t first, int64_t last, char* to) {
    const int64_t bytes = row_bytes(step.dtype, step.head_size);
    for (int64_t token = first; token < last; ++token) {
        for (const HeadClass& own : step.classes) {
            if (own.dtype != step.dtype) continue;
            for (int i = 0; i < own.num_heads; ++i) {
                const int head = own.heads[i];
                char* row = to + (token * heads + head) * bytes;
                char* value = row + number_bytes(step.dtype, step.head_size);
                const float scales[2] = {
                    quantise_activations<T>(step, step.key, token, head, step.key_scale, row),
                    quantise_activations<T>(step, step.value, token, head, step.value_scale,
                                            value)};
                std::memcpy(row + bytes - scale_bytes(step.dtype), scales, scale_bytes(step.dtype));
            }
        }
    }
}

void quantise_tokens(const LayerStep& step, int heads, int64_t first, int64_t last, char* to) {
    switch (step.dtype) {
        case Dtype::e4m3:
        case Dtype::scaled_e4m3:
            return quantise_as<Float8E4M3>(step, heads, first, last, to);
        case Dtype::e5m2:
            return quantise_as<Float8E5M2>(step, heads, first, last, to);
        case Dtype::scaled_i8:
            return quantise_as<Int8>(step, heads, first, last, to);
        case Dtype::scaled_i4:
            return quantise_as<Int4Pair>(step, heads, first, last, to);
        default:
            return;
    }
}

}  // namespace
}  // namespace duo
