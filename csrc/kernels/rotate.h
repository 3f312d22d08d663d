// Spreads a head's elements over each other, so that few bits serve all of them alike: signs, then
// Hadamard's matrix, in blocks of the largest power of two that divides the head size. Queries and
// keys are rotated alike, so that their products stay; what is summed of rotated values is rotated
// back.
#pragma once

#include "elements.h"

namespace duo {
namespace {

// Sign of element i: bit 15 of a hash, so that no pattern that a model has learned meets its like.
DUO_INLINE float sign_of(int i) {
    return (static_cast<uint32_t>(i) * 0x9e3779b1u >> 15 & 1u) ? -1.0f : 1.0f;
}

template <int H, int... I>
DUO_INLINE Vec swap_runs(Vec v, Indices<I...>) {
    return __builtin_shufflevector(v, v, (I ^ H)...);
}

template <int H, int... I>
DUO_INLINE Vec signs_of_runs(Indices<I...>) {
    return Vec{((I & H) ? -1.0f : 1.0f)...};
}

// Sums and differences at distance H, within vectors.
template <int H>
DUO_INLINE void add_within(float* x, int n) {
    for (int i = 0; i < n; i += LANES) {
        const Vec v = load(x + i);
        store(x + i, swap_runs<H>(v, Lanes{}) + v * signs_of_runs<H>(Lanes{}));
    }
    if constexpr (2 * H < LANES) add_within<2 * H>(x, n);
}

// Hadamard's matrix, scaled to keep lengths, times each block of a head.
DUO_NOINLINE void hadamard(float* x, int head_size) {
    const int block = head_size & -head_size;
    add_within<1>(x, head_size);
    for (int h = LANES; h < block; h *= 2) {
        for (int i = 0; i < head_size; i += 2 * h) {
            for (int j = i; j < i + h; j += LANES) {
                const Vec a = load(x + j), b = load(x + j + h);
                store(x + j, a + b);
                store(x + j + h, a - b);
            }
        }
    }
    const auto factor = static_cast<float>(1.0 / __builtin_sqrt(block));
    for (int i = 0; i < head_size; i += LANES) store(x + i, load(x + i) * factor);
}

DUO_INLINE void flip_signs(float* x, int head_size) {
    for (int i = 0; i < head_size; ++i) x[i] *= sign_of(i);
}

DUO_INLINE void rotate(float* x, int head_size) {
    flip_signs(x, head_size);
    hadamard(x, head_size);
}

DUO_INLINE void rotate_back(float* x, int head_size) {
    hadamard(x, head_size);
    flip_signs(x, head_size);
}

// A row in the elements' own order to chunk order, even elements first, and back.
DUO_NOINLINE void to_even_odd(const float* from, int padded, float* to) {
    for (int c = 0; c < padded; c += CHUNK) {
        for (int i = 0; i < LANES; ++i) {
            to[c + i] = from[c + 2 * i];
            to[c + LANES + i] = from[c + 2 * i + 1];
        }
    }
}

DUO_NOINLINE void from_even_odd(const float* from, int padded, float* to) {
    for (int c = 0; c < padded; c += CHUNK) {
        for (int i = 0; i < LANES; ++i) {
            to[c + 2 * i] = from[c + i];
            to[c + 2 * i + 1] = from[c + LANES + i];
        }
    }
}

}  // namespace
}  // namespace duo
