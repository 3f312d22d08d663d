// Copies of keys, values and queries in the order in which the multiplication reads them.
#pragma once

#include "elements.h"

namespace duo {
namespace {

// Columns of one multiplication step: a chunk of the head, or as many keys.
constexpr int PANEL = CHUNK;

template <typename T>
DUO_INLINE Chunk load_any_chunk(const T* row, int c, HeadChunks chunks) {
    const T* at = row + c * CHUNK_OF<T>;
    return c < chunks.full ? load_chunk(at) : load_half_chunk(at);
}

// PANEL keys to [padded, PANEL]: element d of every key side by side. Missing keys become 0, so
// that nothing unwritten is ever multiplied.
// `scale`: of each key, or null.
template <typename T>
DUO_INLINE void pack_key_panel(const T* const* key, int count, HeadChunks chunks,
                               const float* scale, float* to) {
    for (int half = 0; half < 2; ++half) {
        const int first = half * LANES;
        for (int c = 0; c < chunks.all(); ++c) {
            Vec a[LANES], b[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
                const Chunk x =
                    first + i < count ? load_any_chunk(key[first + i], c, chunks) : Chunk{};
                const float factor = IS_QUANTISED<T> && scale ? scale[first + i] : 1.0f;
                a[i] = IS_QUANTISED<T> ? x.a * factor : x.a;
                b[i] = IS_QUANTISED<T> ? x.b * factor : x.b;
            }
            transpose(a);
            transpose(b);
            float* at = to + c * CHUNK * PANEL + first;
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
                store(at + i * PANEL, a[i]);
                store(at + (LANES + i) * PANEL, b[i]);
            }
        }
    }
}

// `count` values to [chunks, count, PANEL]; `scale`: of each value, or null.
template <typename T>
DUO_INLINE void pack_values(const T* const* value, int count, HeadChunks chunks, const float* scale,
                            int64_t panel_floats, float* to) {
    for (int k = 0; k < count; ++k) {
        for (int c = 0; c < chunks.all(); ++c) {
            Chunk x = load_any_chunk(value[k], c, chunks);
            if (IS_QUANTISED<T> && scale) x = {x.a * scale[k], x.b * scale[k]};
            store_chunk(to + c * panel_floats + k * PANEL, x);
        }
    }
}

}  // namespace
}  // namespace duo
