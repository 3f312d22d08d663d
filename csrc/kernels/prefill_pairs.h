// Prefill over bf16 caches in bf16 products: like prefill.h, but keys, values, queries and weights
// stay bf16 and only scores, sums and outputs are float32.
#pragma once

#include "gemm_pairs.h"
#include "prefill_rows.h"

namespace duo {
namespace {

constexpr int PAIR_TILE_KEYS = 256;

// Of weights from one half of a block's rows to the other, of values from a chunk's even elements
// to its odd ones.
constexpr int64_t HALF_WORDS = int64_t{PAIR_TILE_KEYS / TILE_DEPTH} * TILE_WORDS;

struct PairsScratch {
    uint32_t* query;   // [rows / 16, chunks] tiles
    uint32_t* key;     // [keys / 16, chunks] tiles: 32 elements of the head, of 16 keys
    uint32_t* value;   // [chunks, 2, keys / 32] tiles: 32 keys' even elements, and their odd ones
    uint32_t* weight;  // [2, keys / 32] tiles
    float* score;      // [BLOCK_SIDE, PAIR_TILE_KEYS]
    float* output;     // [rows, padded] in chunk order
    float* sum;        // [rows, LANES], partial sums of the weights
    float* base;       // [rows], the exponents of 2 that weights are relative to: whole numbers

    PairsScratch(float* at, int64_t rows, int64_t padded) {
        query = reinterpret_cast<uint32_t*>(at);
        key = query + rows * padded / 2;
        value = key + PAIR_TILE_KEYS * padded / 2;
        weight = value + PAIR_TILE_KEYS * padded / 2;
        score = reinterpret_cast<float*>(weight + BLOCK_SIDE * PAIR_TILE_KEYS / 2);
        output = score + BLOCK_SIDE * PAIR_TILE_KEYS;
        sum = output + rows * padded;
        base = sum + rows * LANES;
    }

    static int64_t floats(int64_t rows, int64_t padded) {
        return rows * padded / 2 + PAIR_TILE_KEYS * padded + BLOCK_SIDE * PAIR_TILE_KEYS * 3 / 2 +
               rows * (padded + LANES + 1);
    }
};

DUO_INLINE int64_t whole_pair_blocks(int64_t rows) {
    return (rows + BLOCK_SIDE - 1) / BLOCK_SIDE * BLOCK_SIDE;
}

DUO_INLINE int64_t pairs_scratch_floats(int64_t rows, int padded) {
    return PairsScratch::floats(whole_pair_blocks(rows), padded);
}

struct PrefillPairs : PrefillRows {
    const PairsScratch scratch;
    Multiplier multiply;
    const float factor;  // of scores, so that their differences are exponents of 2

    PrefillPairs(const LayerStep& s, const Item& item, float* base)
        : PrefillRows(s, item),
          scratch(base, whole_pair_blocks(rows), padded),
          factor(s.scale * LOG2E) {}

    void load_queries() {
        const int whole = static_cast<int>(whole_pair_blocks(rows));
        for (int r = 0; r < whole; ++r) {
            uint32_t* to = scratch.query + r / TILE_SIDE * chunks.all() * TILE_WORDS +
                           r % TILE_SIDE * TILE_SIDE;
            for (int c = 0; c < chunks.all(); ++c) {
                Pairs x{};
                if (r < rows) {
                    const char* row = address(step.query, r);
                    x = load_any_pairs(reinterpret_cast<const BFloat16*>(row), c, chunks);
                }
                *reinterpret_cast<Pairs*>(to + c * TILE_WORDS) = x;
            }
            scratch.base[r] = -__builtin_inff();
        }
        std::memset(scratch.output, 0, sizeof(float) * whole * padded);
        std::memset(scratch.sum, 0, sizeof(float) * whole * LANES);
    }

    // Missing keys and values become 0, so that nothing unwritten is ever multiplied.
    void pack_keys(const KeyBlock<BFloat16, PAIR_TILE_KEYS>& keys, int whole) {
        for (int first = 0; first < whole; first += TILE_SIDE) {
            uint32_t* to = scratch.key + first / TILE_SIDE * chunks.all() * TILE_WORDS;
            for (int c = 0; c < chunks.all(); ++c, to += TILE_WORDS) {
                Vec x[TILE_SIDE];
#pragma GCC unroll 16
                for (int i = 0; i < TILE_SIDE; ++i) {
                    x[i] = first + i < keys.count
                               ? (Vec)load_any_pairs(keys.key[first + i], c, chunks)
                               : Vec{};
                }
                transpose(x);
#pragma GCC unroll 16
                for (int i = 0; i < TILE_SIDE; ++i) {
                    *reinterpret_cast<Vec*>(to + i * TILE_SIDE) = x[i];
                }
            }
        }
    }

    void pack_values(const KeyBlock<BFloat16, PAIR_TILE_KEYS>& keys, int whole) {
        for (int k = 0; k < whole; k += 2) {
            uint32_t* to = scratch.value + k / 2 * TILE_SIDE;
            for (int c = 0; c < chunks.all(); ++c, to += 2 * HALF_WORDS) {
                const auto row = [&](int i) __attribute__((always_inline)) {
                    return i < keys.count ? load_any_pairs(keys.value[i], c, chunks) : Pairs{};
                };
                const RowPairs x = pair_rows(row(k), row(k + 1));
                *reinterpret_cast<Pairs*>(to) = x.even;
                *reinterpret_cast<Pairs*>(to + HALF_WORDS) = x.odd;
            }
        }
    }

    // Follows the new maxima of 16 rows; lane r of the result is what row r's weights are relative
    // to.
    DUO_INLINE Vec raise_base(int first, Columns all, const float* score) {
        Vec most[TILE_SIDE];
        for (int r = 0; r < TILE_SIDE; ++r) {
            const float* row = score + r * PAIR_TILE_KEYS;
            Vec own = max(load(row + all.low), load(row + all.low + LANES));
            for (int k = all.low + TILE_DEPTH; k < all.high; k += TILE_DEPTH) {
                own = max(own, max(load(row + k), load(row + k + LANES)));
            }
            most[r] = own;
        }
        const Vec before = load(scratch.base + first);
        const Vec now = max(before, to_whole(max_each(most) * factor));
        // A row that has not seen any key yet: all its scores are -inf, and so are the differences.
        const Vec base = (Vec)((VecBits)now & (VecBits)(now != -__builtin_inff()));
        if (any_greater(now, before)) {
            store(scratch.base + first, now);
            const Vec decay = exp2_nonpositive(before - base);
            for (int r = 0; r < TILE_SIDE; ++r) {
                if (decay[r] == 1.0f) continue;
                const Vec own = broadcast(decay[r]);
                float* sum = scratch.sum + (first + r) * LANES;
                store(sum, load(sum) * own);
                float* output = scratch.output + int64_t{first + r} * padded;
                for (int i = 0; i < padded; i += LANES) store(output + i, load(output + i) * own);
            }
        }
        return base;
    }

    // Scores of 16 rows from `first` on become weights in tiles.
    DUO_INLINE void weigh_tiles(int first, Columns all, const float* score, uint32_t* weight) {
        const Vec base = raise_base(first, all, score);
        for (int r = 0; r < TILE_SIDE; ++r) {
            const float* row = score + r * PAIR_TILE_KEYS;
            const WholeExponents exponents(factor, base[r]);
            Vec total = load(scratch.sum + (first + r) * LANES);
            uint32_t* to = weight + all.low / TILE_DEPTH * TILE_WORDS + r * TILE_SIDE;
            for (int k = all.low; k < all.high; k += TILE_DEPTH, to += TILE_WORDS) {
                const Vec a = exponents.weigh(load(row + k));
                const Vec b = exponents.weigh(load(row + k + LANES));
                *reinterpret_cast<Pairs*>(to) = to_pairs(a, b);
                total += a + b;
            }
            store(scratch.sum + (first + r) * LANES, total);
        }
    }

    DUO_INLINE void add_block(int first, int64_t begin, int count, bool recent) {
        const int end = min(first + BLOCK_SIDE, rows);
        const Columns seen = columns(first, end - 1, begin, count, recent);
        if (seen.low >= seen.high) return;
        const Columns all = widened(seen, TILE_DEPTH);
        const int64_t head_tiles = int64_t{chunks.all()} * TILE_WORDS;
        const uint32_t* query = scratch.query + first / TILE_SIDE * head_tiles;
        for (int k = all.low; k < all.high; k += BLOCK_SIDE) {
            multiply.block<false>(query, head_tiles, scratch.key + k / TILE_SIDE * head_tiles,
                                  head_tiles, chunks.all(), scratch.score + k, PAIR_TILE_KEYS);
        }
        for (int r = first; r < end; ++r) {
            const Columns own = columns(r, r, begin, count, recent);
            if (own.low > all.low || own.high < all.high) {
                hide_scores(scratch.score + (r - first) * PAIR_TILE_KEYS, all, own);
            }
        }
        for (int h = 0; h < 2; ++h) {
            weigh_tiles(first + h * TILE_SIDE, all, scratch.score + h * TILE_SIDE * PAIR_TILE_KEYS,
                        scratch.weight + h * HALF_WORDS);
        }
        const int64_t skipped = all.low / TILE_DEPTH * TILE_WORDS;
        for (int c = 0; c < chunks.all(); ++c) {
            multiply.block<true>(scratch.weight + skipped, HALF_WORDS,
                                 scratch.value + c * 2 * HALF_WORDS + skipped, HALF_WORDS,
                                 (all.high - all.low) / TILE_DEPTH,
                                 scratch.output + int64_t{first} * padded + c * CHUNK, padded);
        }
    }

    void run() {
        load_queries();
        for_tiles(PAIR_TILE_KEYS, [&](int64_t begin, int64_t end, bool recent) {
            KeyBlock<BFloat16, PAIR_TILE_KEYS> keys;
            keys.count = 0;
            source.append(keys, begin, end);
            const int whole = widened({0, keys.count}, TILE_DEPTH).high;
            pack_keys(keys, whole);
            pack_values(keys, whole);
            for (int r = 0; r < rows; r += BLOCK_SIDE) add_block(r, begin, keys.count, recent);
        });
        for (int r = 0; r < rows; ++r) {
            const float total = sum(load(scratch.sum + r * LANES));
            store_row(scratch.output + int64_t{r} * padded, chunks,
                      1.0f / with_sink(r, scratch.base[r], total),
                      reinterpret_cast<BFloat16*>(address(step.output, r)));
        }
    }
};

}  // namespace
}  // namespace duo
