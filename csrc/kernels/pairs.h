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

// Written as whatever it may have been: weights lie where floats lay.
typedef uint32_t PairAny __attribute__((may_alias));

DUO_INLINE Pairs broadcast_pair(const uint32_t* from) {
    return Pairs{} + *reinterpret_cast<const PairAny*>(from);
}

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
    return *reinterpret_cast<const VecBitsAny*>(ordered);
#endif
}

DUO_INLINE Pairs load_pairs(const BFloat16* from) {
    return *reinterpret_cast<const VecBitsAny*>(from);
}

// Numbers of 8 bits and fewer, without their scale: bf16 holds every one of them.
template <typename T>
DUO_INLINE Pairs load_pairs(const T* from) {
    static_assert(IS_QUANTISED<T>);
    const Chunk x = load_chunk(from);
    if constexpr (CHUNK_OF<T> == CHUNK) {
        return to_pairs(x.a, x.b);
    } else {  // even and odd ones
        return ((VecBits)x.a >> 16) | ((VecBits)x.b & 0xffff0000u);
    }
}

// The first half of a chunk; the other elements are 0.
template <typename T>
DUO_INLINE Pairs load_half_pairs(const T* from) {
    T padded[CHUNK_OF<T>] = {};
    std::memcpy(padded, from, sizeof(padded) / 2);
    return load_pairs(padded);
}

template <typename T>
DUO_INLINE Pairs load_any_pairs(const T* row, int c, HeadChunks chunks) {
    const T* at = row + c * CHUNK_OF<T>;
    return c < chunks.full ? load_pairs(at) : load_half_pairs(at);
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

// While it lives, this thread's results below 2 ** -126 are 0. Products of bf16 pairs take them for
// 0 anyway; without it each vector with such a weight takes forty times as long.
class FlushSubnormals {
  public:
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

#if defined(__AVX512DQ__)
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    const unsigned before_;
#else
    FlushSubnormals() = default;
#endif
};

// Weights 2 ** (factor * score - base) that are rounded to bf16 next: to within 2 ** -13.7 by a
// minimax polynomial, 0 below 2 ** -126, NaN for NaN. `base` is a whole number.
struct WholeExponents {
#if defined(__AVX512DQ__)
    const Vec factor, negative_base;

    DUO_INLINE WholeExponents(float of_score, float base)
        : factor(broadcast(of_score)), negative_base(broadcast(-base)) {}

    DUO_INLINE Vec weigh(Vec score) const {
        const Vec x = score * factor + negative_base;
        const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
        Vec p = broadcast(7.80245231e-2f);
        p = p * f + 2.26067167e-1f;
        p = p * f + 6.95833529e-1f;
        p = p * f + 9.99925220e-1f;
        return _mm512_scalef_ps(p, x);  // p * 2 ** floor(x)
    }
#else
    const Vec factor, shift, least;

    // Subtracting a whole number changes no fraction: factor and base cost one instruction
    // together.
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
#endif
};

}  // namespace
}  // namespace duo
