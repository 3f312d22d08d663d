// The one multiplication of prefill in bf16: 32 rows times 32 columns, by AMX where it is there.
//
// Both sides lie in AMX' own tiles of 16 rows of 16 words. A row of a left tile has 32 consecutive
// elements of a row of the matrix; a row of a right tile has 16 columns' elements of two consecutive
// rows, as pairs.
#pragma once

#include "pairs.h"

namespace duo {
namespace {

constexpr int TILE_SIDE = 16;
constexpr int TILE_WORDS = TILE_SIDE * TILE_SIDE;
constexpr int BLOCK_SIDE = 2 * TILE_SIDE;
// Rows of a right matrix, columns of a left one, in a tile.
constexpr int TILE_DEPTH = 2 * TILE_SIDE;

// Makes the tile registers ready for this thread; they are given back at the end, since whoever else
// uses them wants his own shapes and the operating system would have to save them.
struct TileRegisters {
#if defined(__AMX_TILE__)
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) {
            config.row_bytes[i] = TILE_SIDE * sizeof(uint32_t);
            config.rows[i] = TILE_SIDE;
        }
        __asm__ volatile("" ::: "memory");
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
#else
    TileRegisters() {}
    ~TileRegisters() {}
#endif
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// to = (Add ? to : 0) + left * right. `left`: tiles of the first 16 rows, `left_next` words further
// those of the other 16; `right` likewise by columns; `depth` tiles each.
template <bool Add>
DUO_INLINE void multiply_block(const uint32_t* left, int64_t left_next, const uint32_t* right,
                               int64_t right_next, int depth, float* to, int64_t to_stride) {
#if defined(__AMX_BF16__)
    const int64_t row_bytes = TILE_SIDE * sizeof(uint32_t);
    const int64_t to_bytes = to_stride * static_cast<int64_t>(sizeof(float));
    float* below = to + TILE_SIDE * to_stride;
    // The compiler does not know that tiles are loaded from memory.
    __asm__ volatile("" ::: "memory");
    if constexpr (Add) {
        _tile_loadd(0, to, to_bytes);
        _tile_loadd(1, to + TILE_SIDE, to_bytes);
        _tile_loadd(2, below, to_bytes);
        _tile_loadd(3, below + TILE_SIDE, to_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < depth; ++i, left += TILE_WORDS, right += TILE_WORDS) {
        _tile_loadd(4, left, row_bytes);
        _tile_loadd(6, right, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + right_next, row_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + left_next, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, to_bytes);
    _tile_stored(1, to + TILE_SIDE, to_bytes);
    _tile_stored(2, below, to_bytes);
    _tile_stored(3, below + TILE_SIDE, to_bytes);
    __asm__ volatile("" ::: "memory");
#else
    constexpr int rows = 8;  // sums and both columns' pairs stay in registers
    for (int first = 0; first < BLOCK_SIDE; first += rows) {
        const uint32_t* a = left + first / TILE_SIDE * left_next + first % TILE_SIDE * TILE_SIDE;
        float* at = to + first * to_stride;
        Vec total[rows][2] = {};
#pragma GCC unroll 16
        for (int r = 0; Add && r < rows; ++r) {
            total[r][0] = load(at + r * to_stride);
            total[r][1] = load(at + r * to_stride + TILE_SIDE);
        }
        for (int i = 0; i < depth; ++i) {
            for (int p = 0; p < TILE_SIDE; ++p) {
                const uint32_t* b = right + i * TILE_WORDS + p * TILE_SIDE;
                const Pairs b0 = *reinterpret_cast<const VecBitsAny*>(b);
                const Pairs b1 = *reinterpret_cast<const VecBitsAny*>(b + right_next);
#pragma GCC unroll 16
                for (int r = 0; r < rows; ++r) {
                    const Pairs x = broadcast_pair(a[i * TILE_WORDS + r * TILE_SIDE + p]);
                    total[r][0] = add_products(total[r][0], x, b0);
                    total[r][1] = add_products(total[r][1], x, b1);
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            store(at + r * to_stride, total[r][0]);
            store(at + r * to_stride + TILE_SIDE, total[r][1]);
        }
    }
#endif
}

}  // namespace
}  // namespace duo
