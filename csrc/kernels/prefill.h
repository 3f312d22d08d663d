// Many queries against many keys: bound by arithmetic. An item is some queries of one request with
// all query heads of one KV head; it meets its keys tile by tile, and each block of rows does its
// scores, weights and sums while they are in the first-level cache.
#pragma once

#include "gemm.h"
#include "pack.h"
#include "prefill_rows.h"

namespace duo {
namespace {

constexpr int TILE_KEYS = 128;
constexpr int TILE_PANELS = TILE_KEYS / PANEL;

struct PrefillScratch {
    float* query;   // [row blocks, padded, BLOCK_ROWS]
    float* key;     // [TILE_PANELS, padded, PANEL]
    float* value;   // [chunks, TILE_KEYS, PANEL]
    float* score;   // [BLOCK_ROWS, TILE_KEYS]
    float* output;  // [row blocks * BLOCK_ROWS, padded]
    float* max;     // [row blocks * BLOCK_ROWS]
    float* sum;     // likewise

    PrefillScratch(float* base, int64_t rows, int64_t padded) {
        query = base;
        key = query + rows * padded;
        value = key + TILE_KEYS * padded;
        score = value + TILE_KEYS * padded;
        output = score + BLOCK_ROWS * TILE_KEYS;
        max = output + rows * padded;
        sum = max + rows;
    }
};

DUO_INLINE int64_t whole_blocks(int64_t rows) {
    return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
}

DUO_INLINE int64_t prefill_scratch_floats(int64_t rows, int padded) {
    rows = whole_blocks(rows);
    return rows * (2 * padded + 2) + TILE_KEYS * (2 * padded + BLOCK_ROWS);
}

// Scores of one row in `all` become weights, 0 outside `own`; its sums follow the new maximum.
DUO_INLINE void weigh_scores(float* score, Columns all, Columns own, float& row_max, float& row_sum,
                             float* output, int padded) {
    hide_scores(score, all, own);
    Vec most = load(score + all.low);
    for (int k = all.low + LANES; k < all.high; k += LANES) most = max(most, load(score + k));
    const float tile_max = max_lane(most);
    if (tile_max > row_max) {
        const Vec decay = exp2_nonpositive(broadcast(row_max - tile_max));
        row_max = tile_max;
        row_sum *= decay[0];
        for (int i = 0; i < padded; i += LANES) store(output + i, load(output + i) * decay);
    }
    const Vec base = broadcast(row_max == -__builtin_inff() ? 0.0f : row_max);
    Vec total{};
    for (int k = all.low; k < all.high; k += LANES) {
        const Vec weight = exp2_nonpositive(load(score + k) - base);
        store(score + k, weight);
        total += weight;
    }
    row_sum += sum(total);
}

// The arithmetic in float32, compiled once for all dtypes of caches.
struct PrefillFloats : PrefillRows {
    PrefillScratch scratch;

    PrefillFloats(const LayerStep& s, const Item& item, float* base)
        : PrefillRows(s, item), scratch(base, whole_blocks(rows), padded) {}

    DUO_NOINLINE void add_block(int first, int64_t begin, int count, bool recent) {
        const int end = min(first + BLOCK_ROWS, rows);
        const auto [low, high] = columns(first, end - 1, begin, count, recent);
        if (low >= high) return;
        const Columns all = widened({low, high}, PANEL);
        const float* query = scratch.query + int64_t{first} * padded;
        for (int k = all.low; k < all.high; k += PANEL) {
            const float* key = scratch.key + int64_t{k} * padded;
            multiply_panel<1, BLOCK_ROWS, false>(query, key, min(padded, SUM_ELEMENTS),
                                                 scratch.score + k, TILE_KEYS);
            for (int d = SUM_ELEMENTS; d < padded; d += SUM_ELEMENTS) {
                multiply_panel<1, BLOCK_ROWS, true>(query + d * BLOCK_ROWS, key + d * PANEL,
                                                    min(padded - d, SUM_ELEMENTS),
                                                    scratch.score + k, TILE_KEYS);
            }
        }
        for (int r = first; r < end; ++r) {
            const Columns own = columns(r, r, begin, count, recent);
            weigh_scores(scratch.score + (r - first) * TILE_KEYS, all, own, scratch.max[r],
                         scratch.sum[r], scratch.output + int64_t{r} * padded, padded);
        }
        for (int c = 0; c < chunks.all(); ++c) {
            multiply_panel<TILE_KEYS, 1, true>(
                scratch.score + low, scratch.value + (int64_t{c} * TILE_KEYS + low) * PANEL,
                high - low, scratch.output + int64_t{first} * padded + c * CHUNK, padded);
        }
    }
};

template <typename T>
struct PrefillItem : PrefillFloats {
    using PrefillFloats::PrefillFloats;

    void load_queries() {
        float row[MAX_HEAD_SIZE];
        for (int r = 0; r < whole_blocks(rows); ++r) {
            float* to = scratch.query + r / BLOCK_ROWS * BLOCK_ROWS * padded + r % BLOCK_ROWS;
            if (r < rows) {
                load_activations<T>(step, address(step.query, r), chunks,
                                    step.scale * step.key_scale * UNIT<T> * LOG2E, row);
            } else {
                std::memset(row, 0, padded * sizeof(float));
            }
            for (int d = 0; d < padded; ++d) to[d * BLOCK_ROWS] = row[d];
            scratch.max[r] = -__builtin_inff();
            scratch.sum[r] = 0;
        }
        std::memset(scratch.output, 0, whole_blocks(rows) * padded * sizeof(float));
    }

    void add_tile(int64_t begin, int64_t end, bool recent) {
        KeyBlock<T, TILE_KEYS> keys;
        keys.count = 0;
        source.append(keys, begin, end);
        const int64_t panel_floats = int64_t{TILE_KEYS} * PANEL;
        float scales[2][TILE_KEYS] = {};
        const bool scaled = IS_QUANTISED<T> && scale_bytes(step.dtype);
        if (scaled) {
            load_scales(keys, keys.count, number_bytes(step.dtype, step.head_size), scales[0],
                        scales[1]);
        }
        for (int p = 0; p * PANEL < keys.count; ++p) {
            pack_key_panel(keys.key + p * PANEL, keys.count - p * PANEL, chunks,
                           scaled ? scales[0] + p * PANEL : nullptr,
                           scratch.key + p * PANEL * padded);
        }
        pack_values(keys.value, keys.count, chunks, scaled ? scales[1] : nullptr, panel_floats,
                    scratch.value);
        for (int r = 0; r < rows; r += BLOCK_ROWS) add_block(r, begin, keys.count, recent);
    }

    void run() {
        load_queries();
        for_tiles(TILE_KEYS,
                  [&](int64_t begin, int64_t end, bool recent) { add_tile(begin, end, recent); });
        for (int r = 0; r < rows; ++r) {
            const float total = with_sink(r, scratch.max[r], scratch.sum[r]);
            store_activations<T>(scratch.output + int64_t{r} * padded, chunks,
                                 step.value_scale * UNIT<T> / total, step, address(step.output, r));
        }
    }
};

template <typename T>
void prefill_item(const LayerStep& step, const Item& item, float* scratch) {
    PrefillItem<T>(step, item, scratch).run();
}

}  // namespace
}  // namespace duo
