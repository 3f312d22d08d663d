// A small vector of floats, in the compiler's own vector extensions: one source for every width.
//
// DUO_LANES floats make a vector. Where the machine's registers are narrower the compiler splits
// it, so the code of a wide variant also runs (slowly) on a narrow machine.
//
// Everything here lives in an unnamed namespace and nothing comes from the standard library's
// templates: a function that is compiled with one variant's instructions must never be the copy
// that the linker keeps for the others.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define DUO_INLINE inline __attribute__((always_inline))
#define DUO_NOINLINE __attribute__((noinline))

namespace duo {
namespace {

constexpr int LANES = DUO_LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2)));
typedef uint8_t VecByte __attribute__((vector_size(LANES)));
typedef float VecAny __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t VecBitsAny __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef uint16_t VecHalfAny __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t VecByteAny __attribute__((vector_size(LANES), aligned(1), may_alias));

DUO_INLINE Vec load(const float* from) { return *reinterpret_cast<const VecAny*>(from); }
DUO_INLINE void store(float* to, Vec v) { *reinterpret_cast<VecAny*>(to) = v; }

DUO_INLINE Vec broadcast(float x) {
#if DUO_LANES == 16
    return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif DUO_LANES == 8
    return Vec{x, x, x, x, x, x, x, x};
#else
    return Vec{x, x, x, x};
#endif
}

DUO_INLINE Vec max(Vec a, Vec b) {
#if DUO_LANES == 16 && defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif DUO_LANES == 8 && defined(__AVX__)
    return _mm256_max_ps(a, b);
#elif DUO_LANES == 4 && defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// Indices 0 ... N-1 as a pack, without <utility>.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};
using Lanes = MakeIndices<LANES>::type;

template <int... I>
DUO_INLINE VecInt lane_numbers(Indices<I...>) {
    return VecInt{I...};
}

// Of each pair of runs of H lanes: `a`'s and `b`'s first runs (Second: second runs), side by side.
template <int H, bool Second, int... I>
DUO_INLINE Vec zip_runs(Vec a, Vec b, Indices<I...>) {
    return __builtin_shufflevector(
        a, b, ((I & H) ? LANES + (I & ~H) + (Second ? H : 0) : I + (Second ? H : 0))...);
}

template <int H, int Count>
DUO_INLINE void reduce_stage(Vec* v) {
    // v[i] and v[i + Count / 2] become one vector with half as many partial sums of each.
    constexpr int half = Count / 2;
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
        v[i] = zip_runs<H, false>(v[i], v[i + half], Lanes{}) +
               zip_runs<H, true>(v[i], v[i + half], Lanes{});
    }
    if constexpr (half > 1) reduce_stage<H / 2, half>(v);
}

// Lane i of the result is the sum of v[i]'s lanes, for LANES vectors.
DUO_INLINE Vec sum_each(Vec* v) {
    reduce_stage<LANES / 2, LANES>(v);
    return v[0];
}

template <int H, int Count>
DUO_INLINE void max_stage(Vec* v) {
    constexpr int half = Count / 2;
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
        v[i] = max(zip_runs<H, false>(v[i], v[i + half], Lanes{}),
                   zip_runs<H, true>(v[i], v[i + half], Lanes{}));
    }
    if constexpr (half > 1) max_stage<H / 2, half>(v);
}

// Lane i of the result is the greatest of v[i]'s lanes, for LANES vectors.
DUO_INLINE Vec max_each(Vec* v) {
    max_stage<LANES / 2, LANES>(v);
    return v[0];
}

template <int H>
DUO_INLINE void transpose_stage(Vec* v) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
        if (i & H) continue;
        const Vec first = zip_runs<H, false>(v[i], v[i + H], Lanes{});
        v[i + H] = zip_runs<H, true>(v[i], v[i + H], Lanes{});
        v[i] = first;
    }
    if constexpr (H > 1) transpose_stage<H / 2>(v);
}

// Transposes LANES x LANES floats in place.
DUO_INLINE void transpose(Vec* v) { transpose_stage<LANES / 2>(v); }

// Of N vectors of N runs of H lanes, run i of vector j becomes run j of vector i.
template <int H, int N, int Stage = N / 2>
DUO_INLINE void transpose_runs(Vec* v) {
    if constexpr (Stage > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
            if (i & Stage) continue;
            const Vec first = zip_runs<H * Stage, false>(v[i], v[i + Stage], Lanes{});
            v[i + Stage] = zip_runs<H * Stage, true>(v[i], v[i + Stage], Lanes{});
            v[i] = first;
        }
        transpose_runs<H, N, Stage / 2>(v);
    }
}

// Lane i becomes lane (i + S) % LANES.
template <int S, int... I>
DUO_INLINE Vec rotate_lanes(Vec v, Indices<I...>) {
    return __builtin_shufflevector(v, v, ((I + S) % LANES)...);
}

// Of all lanes whose number leaves the same rest by R: their sum, in each of them.
template <int R>
DUO_INLINE Vec sum_of_rest(Vec v) {
    if constexpr (R < LANES) v = sum_of_rest<2 * R>(v + rotate_lanes<R>(v, Lanes{}));
    return v;
}

// Likewise their maximum.
template <int R>
DUO_INLINE Vec max_of_rest(Vec v) {
    if constexpr (R < LANES) v = max_of_rest<2 * R>(max(v, rotate_lanes<R>(v, Lanes{})));
    return v;
}

// Lanes of `a` and `b` in turns, from lane `First` of both on.
template <int First, int... I>
DUO_INLINE Vec in_turns(Vec a, Vec b, Indices<I...>) {
    return __builtin_shufflevector(a, b, (I / 2 + First + (I % 2 ? LANES : 0))...);
}

// R rows of LANES become LANES columns of R, column by column: [R, LANES] to [LANES, R].
template <int R>
DUO_INLINE void rows_to_columns(const Vec* rows, Vec* columns) {
    if constexpr (R == 1) {
        columns[0] = rows[0];
    } else {
        constexpr int half = R / 2;
        Vec even_rows[half], odd_rows[half], even[half], odd[half];
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) {
            even_rows[i] = rows[2 * i];
            odd_rows[i] = rows[2 * i + 1];
        }
        rows_to_columns<half>(even_rows, even);
        rows_to_columns<half>(odd_rows, odd);
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) {
            columns[2 * i] = in_turns<0>(even[i], odd[i], Lanes{});
            columns[2 * i + 1] = in_turns<LANES / 2>(even[i], odd[i], Lanes{});
        }
    }
}

DUO_INLINE float sum(Vec v) {
    float total = 0;
#pragma GCC unroll 16
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    }
    total += v[0];
    return total;
}

DUO_INLINE float max_lane(Vec v) {
#pragma GCC unroll 16
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    }
    return v[0];
}

// Whether any lane of `a` is greater than `b`'s.
DUO_INLINE bool any_greater(Vec a, Vec b) {
#if DUO_LANES == 16 && defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif DUO_LANES == 8 && defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#elif DUO_LANES == 4 && defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpgt_ps(a, b)) != 0;
#else
    const VecInt greater = a > b;
    int32_t any = 0;
    for (int i = 0; i < LANES; ++i) any |= greater[i];
    return any != 0;
#endif
}

constexpr float LOG2E = 1.44269504088896340736f;

// 1.5 * 2 ** 23: adding it rounds to a whole number, which stands in the sum's low bits.
constexpr float ROUNDING_SHIFT = 12582912.0f;

// 2 ** x for x <= 0, exactly 0 from -126 down and for -inf, NaN for NaN; by Cephes' polynomial.
DUO_INLINE Vec exp2_nonpositive(Vec x) {
    const Vec shift = broadcast(ROUNDING_SHIFT);
    const Vec shifted = x + shift;
    const Vec f = x - (shifted - shift);
    Vec p = broadcast(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    // The integer stands in the low bits of `shifted`; moved to the exponent it scales by 2 ** n.
    // Unsigned, since far below -126 the sum overflows before it is cleared.
    const VecBits scaled = (VecBits)p + ((VecBits)shifted << 23);
    return (Vec)(x <= -126.0f ? VecBits{} : scaled);
}

// 2 ** x: exactly 0 from -126 down, infinite from 126 up, NaN for NaN.
DUO_INLINE float exp2_any(float x) {
    if (x <= 0) return exp2_nonpositive(broadcast(x))[0];
    if (x < 126.0f) return 1.0f / exp2_nonpositive(broadcast(-x))[0];
    return x + __builtin_inff();
}

}  // namespace
}  // namespace duo
