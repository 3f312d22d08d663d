// Cache elements to floats and back, two vectors at a time.
//
// A *chunk* is 2 * LANES consecutive elements, held as two vectors. For bf16 and 4-bit integers
// these are the even and the odd elements: two instructions turn one load into both. The order
// within a chunk is therefore the dtype's own ("chunk order"); queries, keys, values and sums all
// use it and only who stores undoes it, so nobody else ever needs to know it.
#pragma once

#include "vec.h"

namespace duo {
namespace {

constexpr int CHUNK = 2 * LANES;

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
// BFloat16 whose chunk order is that of the elements, for activations beside quantised caches.
struct OrderedBFloat16 {
    uint16_t bits;
};
// Quantised: a sign, 4 or 5 bits of exponent and 3 or 2 of mantissa; or an integer.
struct Float8E4M3 {
    uint8_t bits;
};
struct Float8E5M2 {
    uint8_t bits;
};
struct Int8 {
    int8_t bits;
};
// Two integers: an even element in the low bits, the next one in the high bits.
struct Int4Pair {
    uint8_t bits;
};

template <typename T>
constexpr bool IS_QUANTISED = sizeof(T) == 1;

// What numbers as they are loaded must be multiplied with: those of Float8E4M3 are loaded as halves
// of the same bits, whose exponents' bias differs by 8.
template <typename T>
constexpr float UNIT = 1.0f;
template <>
constexpr float UNIT<Float8E4M3> = 256.0f;

// Whether keys and values are rotated before they become T (rotate.h).
template <typename T>
constexpr bool IS_ROTATED = false;
template <>
constexpr bool IS_ROTATED<Int4Pair> = true;

// Objects of type T in a chunk.
template <typename T>
constexpr int CHUNK_OF = CHUNK;
template <>
constexpr int CHUNK_OF<Int4Pair> = CHUNK / 2;

struct Chunk {
    Vec a, b;
};

typedef uint16_t ChunkHalves __attribute__((vector_size(CHUNK * 2)));
typedef int16_t ChunkShorts __attribute__((vector_size(CHUNK * 2)));
typedef int8_t ChunkBytesAny __attribute__((vector_size(CHUNK), aligned(1), may_alias));
typedef int8_t SignedBytesAny __attribute__((vector_size(LANES), aligned(1), may_alias));

// Head sizes are multiples of 16 elements, so that a last chunk is full or, with 16 lanes, half.
constexpr bool HAS_HALF_CHUNKS = CHUNK > 16;

DUO_INLINE Vec half_to_float(VecHalf h) {
#if DUO_LANES == 16 && defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)h);
#elif DUO_LANES == 8 && defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)h);
#else
    const VecBits x = __builtin_convertvector(h, VecBits);
    const VecBits magnitude = (x & 0x7fffu) << 13;
    // The exponent's bias differs by 112; multiplying also makes subnormal halves normal.
    VecBits bits = (VecBits)((Vec)magnitude * 0x1p112f);
    bits |= (VecBits)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinities and NaN
    return (Vec)(bits | (x & 0x8000u) << 16);
#endif
}

DUO_INLINE VecHalf float_to_half(Vec v) {
#if DUO_LANES == 16 && defined(__AVX512F__)
    return (VecHalf)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif DUO_LANES == 8 && defined(__F16C__)
    return (VecHalf)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const VecBits bits = (VecBits)v;
    const VecBits sign = bits & 0x80000000u;
    const VecBits magnitude = bits ^ sign;
    // Rounded to nearest even by hand; subnormal halves by an addition that aligns their last bit.
    const VecBits odd = (magnitude >> 13) & 1u;
    const VecBits normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    const VecBits subnormal = (VecBits)((Vec)magnitude + 0.5f) - 0x3f000000u;
    VecBits half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? VecBits{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? VecBits{} + 0x7e00u : half;
    return __builtin_convertvector(half | sign >> 16, VecHalf);
#endif
}

DUO_INLINE Chunk split_bfloats(VecBits pairs) {
    return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
}

// Rounded to nearest even, in the upper 16 bits.
DUO_INLINE VecBits round_to_bfloat(Vec v) {
    const VecBits bits = (VecBits)v;
    const VecBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const VecBits nan = (VecBits)(v != v);
    return (rounded & ~nan) | (nan & 0x7fc00000u);
}

DUO_INLINE Chunk load_chunk(const float* from) { return {load(from), load(from + LANES)}; }

DUO_INLINE Chunk load_chunk(const BFloat16* from) {
    return split_bfloats(*reinterpret_cast<const VecBitsAny*>(from));
}

DUO_INLINE Chunk load_chunk(const Float16* from) {
    return {half_to_float(*reinterpret_cast<const VecHalfAny*>(from)),
            half_to_float(*reinterpret_cast<const VecHalfAny*>(from + LANES))};
}

DUO_INLINE Vec load_ordered(const OrderedBFloat16* from) {
    const VecHalf halves = *reinterpret_cast<const VecHalfAny*>(from);
    return (Vec)(__builtin_convertvector(halves, VecBits) << 16);
}

// Signed bytes to wider lanes. GCC 12 widens vectors shorter than its registers element by element.
DUO_INLINE ChunkHalves widen_to_halves(const void* from) {
#if DUO_LANES == 16 && defined(__AVX512BW__)
    return (ChunkHalves)_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif DUO_LANES == 8 && defined(__AVX2__)
    return (ChunkHalves)_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
    return (ChunkHalves) __builtin_convertvector(*static_cast<const ChunkBytesAny*>(from),
                                                 ChunkShorts);
#endif
}

DUO_INLINE VecInt widen_to_ints(const void* from) {
#if DUO_LANES == 16 && defined(__AVX512F__)
    return (VecInt)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#elif DUO_LANES == 8 && defined(__AVX2__)
    return (VecInt)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
#else
    return __builtin_convertvector(*static_cast<const SignedBytesAny*>(from), VecInt);
#endif
}

DUO_INLINE Chunk halves_to_floats(ChunkHalves halves) {
    VecHalf half[2];
    std::memcpy(half, &halves, sizeof(half));
    return {half_to_float(half[0]), half_to_float(half[1])};
}

DUO_INLINE Chunk load_chunk(const Float8E5M2* from) {
    return halves_to_floats(widen_to_halves(from) << 8);
}

DUO_INLINE Chunk load_chunk(const Float8E4M3* from) {
    // Of the sign's copies the first stays, the next would be the exponent's first bit.
    const ChunkHalves halves = (widen_to_halves(from) << 7) & 0xbf80;
    const ChunkHalves magnitude = halves & 0x3f80;
#if DUO_LANES == 16 && defined(__AVX512BW__)
    const __mmask32 nan = _mm512_cmpeq_epi16_mask((__m512i)magnitude, _mm512_set1_epi16(0x3f80));
    return halves_to_floats(
        (ChunkHalves)_mm512_mask_mov_epi16((__m512i)halves, nan, _mm512_set1_epi16(0x7e00)));
#else
    const ChunkHalves nan = (ChunkHalves)(magnitude == 0x3f80);
    return halves_to_floats(halves | (nan & 0x7e00));
#endif
}

DUO_INLINE Vec load_ordered(const Int8* from) {
    return __builtin_convertvector(widen_to_ints(from), Vec);
}

template <typename T>
DUO_INLINE Chunk load_chunk(const T* from) {
    return {load_ordered(from), load_ordered(from + LANES)};
}

DUO_INLINE Chunk load_chunk(const Int4Pair* from) {
    const VecInt pairs = widen_to_ints(from);
#if DUO_LANES == 16 && defined(__AVX512F__)
    // Looked up by the low four bits.
    const Vec numbers{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    return {_mm512_permutexvar_ps((__m512i)pairs, numbers),
            _mm512_permutexvar_ps((__m512i)(pairs >> 4), numbers)};
#else
    return {__builtin_convertvector(pairs << 28 >> 28, Vec),
            __builtin_convertvector(pairs >> 4, Vec)};
#endif
}

DUO_INLINE void store_chunk(float* to, Chunk c) {
    store(to, c.a);
    store(to + LANES, c.b);
}

DUO_INLINE void store_chunk(BFloat16* to, Chunk c) {
    *reinterpret_cast<VecBitsAny*>(to) =
        (round_to_bfloat(c.b) & 0xffff0000u) | (round_to_bfloat(c.a) >> 16);
}

DUO_INLINE void store_chunk(OrderedBFloat16* to, Chunk c) {
    *reinterpret_cast<VecHalfAny*>(to) =
        __builtin_convertvector(round_to_bfloat(c.a) >> 16, VecHalf);
    *reinterpret_cast<VecHalfAny*>(to + LANES) =
        __builtin_convertvector(round_to_bfloat(c.b) >> 16, VecHalf);
}

DUO_INLINE void store_chunk(Float16* to, Chunk c) {
    *reinterpret_cast<VecHalfAny*>(to) = float_to_half(c.a);
    *reinterpret_cast<VecHalfAny*>(to + LANES) = float_to_half(c.b);
}

// The first half of a chunk's elements; the others are 0 (load) or left alone (store).
template <typename T>
DUO_INLINE Chunk load_half_chunk(const T* from) {
    T padded[CHUNK_OF<T>] = {};
    std::memcpy(padded, from, sizeof(padded) / 2);
    return load_chunk(padded);
}

template <typename T>
DUO_INLINE void store_half_chunk(T* to, Chunk c) {
    T padded[CHUNK];
    store_chunk(padded, c);
    std::memcpy(to, padded, LANES * sizeof(T));
}

// Chunks of a head: `full` ones, and perhaps a half one.
struct HeadChunks {
    int full;
    bool half;
    int all() const { return full + half; }
    int padded() const { return all() * CHUNK; }  // floats of a row in chunk order
};

DUO_INLINE HeadChunks head_chunks(int head_size) {
    return {head_size / CHUNK, HAS_HALF_CHUNKS && head_size % CHUNK != 0};
}

// One row to floats in chunk order, times `factor`.
template <typename T>
DUO_INLINE void load_row(const T* from, HeadChunks chunks, float factor, float* to) {
    for (int c = 0; c < chunks.all(); ++c) {
        const T* at = from + c * CHUNK_OF<T>;
        const Chunk x = c < chunks.full ? load_chunk(at) : load_half_chunk(at);
        store(to + c * CHUNK, x.a * factor);
        store(to + c * CHUNK + LANES, x.b * factor);
    }
}

// One row of floats in chunk order, times `factor`, to the output.
template <typename T>
DUO_INLINE void store_row(const float* from, HeadChunks chunks, float factor, T* to) {
    for (int c = 0; c < chunks.all(); ++c) {
        const Chunk x{load(from + c * CHUNK) * factor, load(from + c * CHUNK + LANES) * factor};
        if (c < chunks.full) {
            store_chunk(to + c * CHUNK, x);
        } else {
            store_half_chunk(to + c * CHUNK, x);
        }
    }
}

}  // namespace
}  // namespace duo
