// The arithmetic of prefill in bf16 products: 32 rows of queries against a tile of packed keys and
// values, whatever the dtype they came from.
#pragma once

#include "gemm_pairs.h"
#include "prefill_rows.h"

namespace duo {
namespace {

// A block's scores, outputs and queries fill the first-level cache (48 KB with heads of 64); keys
// and values pass by it.
constexpr int PAIR_TILE_KEYS = 320;

// Of values, from a chunk's even elements to its odd ones.
constexpr int64_t HALF_WORDS = int64_t{PAIR_TILE_KEYS / TILE_DEPTH} * TILE_WORDS;

struct PairsScratch {
    uint32_t* query;  // [rows / 16, parts, chunks] tiles
    uint32_t* key;    // [keys / 16, chunks] tiles: 32 elements of the head, of 16 keys
    uint32_t* value;  // [chunks, 2, keys / 32] tiles: 32 keys' even elements, and their odd ones
    float* score;     // [BLOCK_SIDE, PAIR_TILE_KEYS], then as many weights in each row's first half
    float* output;    // [rows, padded] in chunk order
    float* sum;       // [rows, LANES], partial sums of the weights
    float* base;      // [rows], the exponents of 2 that weights are relative to: whole numbers

    // Of a rotated query: what bf16 holds of it, and the rest.
    static constexpr int MOST_PARTS = 2;

    PairsScratch(float* at, int64_t rows, int64_t padded) {
        query = reinterpret_cast<uint32_t*>(at);
        key = query + MOST_PARTS * rows * padded / 2;
        value = key + PAIR_TILE_KEYS * padded / 2;
        score = reinterpret_cast<float*>(value + PAIR_TILE_KEYS * padded / 2);
        output = score + BLOCK_SIDE * PAIR_TILE_KEYS;
        sum = output + rows * padded;
        base = sum + rows * LANES;
    }

    static int64_t floats(int64_t rows, int64_t padded) {
        return MOST_PARTS * rows * padded / 2 + PAIR_TILE_KEYS * padded +
               BLOCK_SIDE * PAIR_TILE_KEYS + rows * (padded + LANES + 1);
    }
};

DUO_INLINE int64_t whole_pair_blocks(int64_t rows) {
    return (rows + BLOCK_SIDE - 1) / BLOCK_SIDE * BLOCK_SIDE;
}

DUO_INLINE int64_t pairs_scratch_floats(int64_t rows, int padded) {
    return PairsScratch::floats(whole_pair_blocks(rows), padded);
}

// Scales of a tile's tokens.
struct PairsScales {
    float key[PAIR_TILE_KEYS] = {};
    float value[PAIR_TILE_KEYS] = {};
};

// The arithmetic, compiled once for all dtypes of caches.
struct PrefillPairs : PrefillRows {
    const PairsScratch scratch;
    Multiplier multiply;
    FlushSubnormals flush;
    const int parts;     // of a query
    const float factor;  // of scores, so that their differences are exponents of 2

    PrefillPairs(const LayerStep& s, const Item& item, int parts_of_query, float unit, float* base)
        : PrefillRows(s, item),
          scratch(base, whole_pair_blocks(rows), padded),
          parts(parts_of_query),
          factor(s.scale * s.key_scale * unit * LOG2E) {}

    // Words of 16 rows' queries.
    int64_t query_words() const { return int64_t{parts} * chunks.all() * TILE_WORDS; }

    // Where a row's queries go, tile by tile.
    uint32_t* query_at(int row) const {
        return scratch.query + row / TILE_SIDE * query_words() + row % TILE_SIDE * TILE_SIDE;
    }

    void load_query(int row) {
        const auto* from = reinterpret_cast<const BFloat16*>(address(step.query, row));
        uint32_t* to = query_at(row);
        for (int c = 0; c < chunks.all(); ++c, to += TILE_WORDS) {
            *reinterpret_cast<Pairs*>(to) = load_any_pairs(from, c, chunks);
        }
    }

    void load_rotated_query(int row) {
        float rotated[MAX_HEAD_SIZE];
        load_ordered_row(step, address(step.query, row), chunks, 1.0f, true, rotated);
        uint32_t* to = query_at(row);
        for (int c = 0; c < chunks.all(); ++c, to += TILE_WORDS) {
            const Vec a = load(rotated + c * CHUNK), b = load(rotated + c * CHUNK + LANES);
            const Pairs most = to_pairs(a, b);
            OrderedBFloat16 rounded[CHUNK];
            *reinterpret_cast<VecBitsAny*>(rounded) = most;
            *reinterpret_cast<Pairs*>(to) = most;
            *reinterpret_cast<Pairs*>(to + chunks.all() * TILE_WORDS) =
                to_pairs(a - load_ordered(rounded), b - load_ordered(rounded + LANES));
        }
    }

    void load_queries() {
        const int whole = static_cast<int>(whole_pair_blocks(rows));
        for (int r = 0; r < whole; ++r) {
            if (r >= rows) {
                for (int i = 0; i < parts * chunks.all(); ++i) {
                    *reinterpret_cast<Pairs*>(query_at(r) + i * TILE_WORDS) = Pairs{};
                }
            } else if (parts == 1) {
                load_query(r);
            } else {
                load_rotated_query(r);
            }
            scratch.base[r] = -__builtin_inff();
        }
        std::memset(scratch.output, 0, sizeof(float) * whole * padded);
        std::memset(scratch.sum, 0, sizeof(float) * whole * LANES);
    }

    void scale_scores(Columns all, const float* scale) {
        for (int r = 0; r < BLOCK_SIDE; ++r) {
            float* row = scratch.score + r * PAIR_TILE_KEYS;
            for (int k = all.low; k < all.high; k += LANES) {
                store(row + k, load(row + k) * load(scale + k));
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

    // Scores of 16 rows from `first` on become weights, over scores that were read before. `scale`:
    // of each value, or null.
    DUO_INLINE void weigh_rows(int first, Columns all, const float* scale, float* score) {
        const Vec base = raise_base(first, all, score);
        for (int r = 0; r < TILE_SIDE; ++r) {
            float* row = score + r * PAIR_TILE_KEYS;
            const WholeExponents exponents(factor, base[r]);
            Vec total = load(scratch.sum + (first + r) * LANES);
            for (int k = all.low; k < all.high; k += TILE_DEPTH) {
                Vec a = exponents.weigh(load(row + k));
                Vec b = exponents.weigh(load(row + k + LANES));
                total += a + b;
                if (scale) {
                    a *= load(scale + k);
                    b *= load(scale + k + LANES);
                }
                store(row + k / 2, (Vec)to_pairs(a, b));
            }
            store(scratch.sum + (first + r) * LANES, total);
        }
    }

    // `scales`: of the tile's tokens, or null.
    DUO_NOINLINE void add_block(int first, int64_t begin, int count, bool recent,
                                const PairsScales* scales) {
        const int end = min(first + BLOCK_SIDE, rows);
        const Columns seen = columns(first, end - 1, begin, count, recent);
        if (seen.low >= seen.high) return;
        const Columns all = widened(seen, TILE_DEPTH);
        const int64_t head_tiles = int64_t{chunks.all()} * TILE_WORDS;
        const LeftTiles query{query_at(first), TILE_SIDE, TILE_WORDS, query_words(), parts};
        for (int k = all.low; k < all.high; k += BLOCK_SIDE) {
            const RightTiles key{scratch.key + k / TILE_SIDE * head_tiles, head_tiles,
                                 chunks.all()};
            multiply.block<false>(query, key, scratch.score + k, PAIR_TILE_KEYS);
        }
        // Before any are hidden: minus infinity times 0 is NaN.
        if (scales) scale_scores(all, scales->key);
        const auto of_row = [&](int r) __attribute__((always_inline)) {
            return columns(r, r, begin, count, recent);
        };
        // Rows between two that see everything see everything too.
        if (!holds(of_row(first), all) || !holds(of_row(end - 1), all)) {
            for (int r = first; r < end; ++r) {
                hide_scores(scratch.score + (r - first) * PAIR_TILE_KEYS, all, of_row(r));
            }
        }
        for (int h = 0; h < BLOCK_SIDE; h += TILE_SIDE) {
            weigh_rows(first + h, all, scales ? scales->value : nullptr,
                       scratch.score + h * PAIR_TILE_KEYS);
        }
        const int skipped = all.low / TILE_DEPTH;
        const uint32_t* weight = reinterpret_cast<const uint32_t*>(scratch.score);
        const LeftTiles weights{weight + skipped * TILE_SIDE, PAIR_TILE_KEYS, TILE_SIDE,
                                TILE_SIDE * PAIR_TILE_KEYS, 1};
        for (int c = 0; c < chunks.all(); ++c) {
            const RightTiles value{scratch.value + c * 2 * HALF_WORDS + skipped * TILE_WORDS,
                                   HALF_WORDS, (all.high - all.low) / TILE_DEPTH};
            multiply.block<true>(weights, value,
                                 scratch.output + int64_t{first} * padded + c * CHUNK, padded);
        }
    }
};

}  // namespace
}  // namespace duo
