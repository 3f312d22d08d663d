// Arithmetic on pairs of bf16: a 32-bit lane holds two of them, whose products with another lane's
// two are summed in float32. With AVX-512's bf16 instructions one of them does it; without, the
// same source computes it in float32, so that its logic is tested on every machine.
#pragma once

#include "elements.h"

namespace duo {
namespace {

static_assert(LANES == 16, "pairs are for variants of 16 lanes");

// A chunk of bf16 elements, in their own order.
using Pairs = VecBits;

DUO_INLINE Pairs load_pairs(const BFloat16* from) {
    return *reinterpret_cast<const VecBitsAny*>(from);
}

// The first half of a chunk; the other elements are 0.
DUO_INLINE Pairs load_half_pairs(const BFloat16* from) {
    BFloat16 padded[CHUNK] = {};
    std::memcpy(padded, from, sizeof(padded) / 2);
    return load_pairs(padded);
}

DUO_INLINE Pairs load_any_pairs(const BFloat16* row, int c, HeadChunks chunks) {
    return c < chunks.full ? load_pairs(row + c * CHUNK) : load_half_pairs(row + c * CHUNK);
}

DUO_INLINE Pairs broadcast_pair(uint32_t pair) { return Pairs{} + pair; }

// total + a's first elements * b's first + a's second * b's second, lane by lane.
DUO_INLINE Vec add_products(Vec total, Pairs a, Pairs b) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
    const Chunk x = split_bfloats(a);
    const Chunk y = split_bfloats(b);
    return total + x.a * y.a + x.b * y.b;
#endif
}

// 2 * LANES floats to as many bf16, in their order, rounded to nearest even.
DUO_INLINE Pairs to_pairs(Vec first, Vec second) {
#if defined(__AVX512BF16__)
    return (Pairs)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    OrderedBFloat16 ordered[CHUNK];
    store_chunk(ordered, {first, second});
    return load_pairs(reinterpret_cast<const BFloat16*>(ordered));
#endif
}

// Of two rows of elements, pairs of the same element of both: of the even elements, and of the odd
// ones. That is bf16's chunk order.
struct RowPairs {
    Pairs even, odd;
};

DUO_INLINE RowPairs pair_rows(Pairs first, Pairs second) {
    return {(first & 0xffffu) | (second << 16), (first >> 16) | (second & 0xffff0000u)};
}

// To a whole number at most 1/2 away; what is too large for that has no fraction.
DUO_INLINE Vec to_whole(Vec x) {
    const Vec shift = broadcast(ROUNDING_SHIFT);
    return x + shift - shift;
}

// Weights 2 ** (factor * score - base) that are rounded to bf16 next: to within 2 ** -13.7 by a
// minimax polynomial, exactly 0 below 2 ** -126, NaN for NaN. `base` is a whole number, so that
// subtracting it changes no fraction: factor and base cost one instruction together.
struct WholeExponents {
    const Vec factor, shift, least;

    DUO_INLINE WholeExponents(float of_score, float base)
        : factor(broadcast(of_score)),
          shift(broadcast(ROUNDING_SHIFT - base)),
          least(broadcast(ROUNDING_SHIFT - 126.0f)) {}

    DUO_INLINE Vec weigh(Vec score) const {
        // The exponent stands in the low bits of `shifted`; `f` is what is left of it, in
        // [-1/2, 1/2].
        const Vec shifted = score * factor + shift;
        const Vec f = score * factor - (shifted - shift);
        Vec p = broadcast(5.51716694e-2f);
        p = p * f + 2.42611131e-1f;
        p = p * f + 6.93260986e-1f;
        p = p * f + 9.99928073e-1f;
        // Unsigned, since far below the sum overflows before it is cleared.
        const VecBits scaled = (VecBits)p + ((VecBits)shifted << 23);
        return (Vec)(shifted <= least ? VecBits{} : scaled);
    }
};

}  // namespace
}  // namespace duo
