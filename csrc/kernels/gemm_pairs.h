// The one multiplication of prefill in bf16: 32 rows times 32 columns, in tile registers where
// DUO_TILES says so, else in vectors.
//
// Both sides are read in tiles of 16 rows of 16 words. A row of a left tile has 32 consecutive
// elements of a row of the matrix; a row of a right tile has 16 columns' elements of two
// consecutive rows, as pairs.
#pragma once

#include "tiles.h"

namespace duo {
namespace {

constexpr int BLOCK_SIDE = 2 * TILE_SIDE;
// Rows of a right matrix, columns of a left one, in a tile.
constexpr int TILE_DEPTH = 2 * TILE_SIDE;

// Where 32 rows of a left matrix lie, in words: a tile's rows and tiles from side to side may be
// any distance apart.
struct LeftTiles {
    const uint32_t* first;
    int64_t row;   // from a row of a tile to the next one
    int64_t tile;  // from a tile to the next one of the same rows
    int64_t half;  // from the first 16 rows to the others
    int parts;     // each as deep as the right matrix: terms whose sum is the left one
};

// Where 32 columns of a right matrix lie: whole tiles one after another.
struct RightTiles {
    const uint32_t* first;
    int64_t half;  // words from the first 16 columns to the others
    int depth;     // tiles of each
};

#if DUO_TILES

struct Multiplier {
    Tiles tiles;

    // to = (Add ? to : 0) + left * right. All blocks of rows go through a right matrix before they
    // meet a tile of it again.
    template <bool Add>
    DUO_INLINE void block(LeftTiles left, RightTiles right, float* to, int64_t to_stride) {
        const int64_t row_bytes = left.row * static_cast<int64_t>(sizeof(uint32_t));
        const int64_t to_bytes = to_stride * static_cast<int64_t>(sizeof(float));
        float* below = to + TILE_SIDE * to_stride;
        if constexpr (Add) {
            tiles.load<0>(to, to_bytes);
            tiles.load<1>(to + TILE_SIDE, to_bytes);
            tiles.load<2>(below, to_bytes);
            tiles.load<3>(below + TILE_SIDE, to_bytes);
        } else {
            tiles.zero<0>();
            tiles.zero<1>();
            tiles.zero<2>();
            tiles.zero<3>();
        }
        const uint32_t* above = left.first;
        for (int part = 0; part < left.parts; ++part) {
            const uint32_t* beside = right.first;
            for (int i = 0; i < right.depth; ++i, above += left.tile, beside += TILE_WORDS) {
                tiles.load<4>(above, row_bytes);
                tiles.load_once<6>(beside, TILE_ROW_BYTES);
                tiles.multiply<0, 4, 6>();
                tiles.load_once<7>(beside + right.half, TILE_ROW_BYTES);
                tiles.multiply<1, 4, 7>();
                tiles.load<5>(above + left.half, row_bytes);
                tiles.multiply<2, 5, 6>();
                tiles.multiply<3, 5, 7>();
            }
        }
        tiles.store<0>(to, to_bytes);
        tiles.store<1>(to + TILE_SIDE, to_bytes);
        tiles.store<2>(below, to_bytes);
        tiles.store<3>(below + TILE_SIDE, to_bytes);
    }
};

#else

struct Multiplier {
    template <bool Add>
    DUO_INLINE void block(LeftTiles left, RightTiles right, float* to, int64_t to_stride) {
        constexpr int rows = 8;  // sums and both columns' pairs stay in registers
        for (int first = 0; first < BLOCK_SIDE; first += rows) {
            const uint32_t* a =
                left.first + first / TILE_SIDE * left.half + first % TILE_SIDE * left.row;
            float* at = to + first * to_stride;
            Vec total[rows][2] = {};
#pragma GCC unroll 16
            for (int r = 0; Add && r < rows; ++r) {
                total[r][0] = load(at + r * to_stride);
                total[r][1] = load(at + r * to_stride + TILE_SIDE);
            }
            for (int i = 0; i < left.parts * right.depth; ++i) {
                for (int p = 0; p < TILE_SIDE; ++p) {
                    const uint32_t* b = right.first + i % right.depth * TILE_WORDS + p * TILE_SIDE;
                    const Pairs b0 = *reinterpret_cast<const VecBitsAny*>(b);
                    const Pairs b1 = *reinterpret_cast<const VecBitsAny*>(b + right.half);
#pragma GCC unroll 16
                    for (int r = 0; r < rows; ++r) {
                        const Pairs x = broadcast_pair(a + i * left.tile + r * left.row + p);
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
    }
};

#endif

}  // namespace
}  // namespace duo
