// Many queries against many keys: bound by arithmetic. An item is some queries of one request with
// all query heads of one KV head; it meets its keys tile by tile, and each block of rows does its
// scores, weights and sums while they are in the first-level cache.
#pragma once

#include "activations.h"
#include "gemm.h"
#include "keys.h"
#include "pack.h"

namespace duo {
namespace {

constexpr int TILE_KEYS = 128;
constexpr int TILE_PANELS = TILE_KEYS / PANEL;

DUO_INLINE int min(int a, int b) { return a < b ? a : b; }

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

// Columns [low, high) of a tile.
struct Columns {
    int low;
    int high;
};

// What queries at positions first ... last see, together, of a tile of `count` keys from `begin`
// on, all in the sink or all behind it.
DUO_INLINE Columns block_columns(const HeadClass& heads, bool recent, int64_t first, int64_t last,
                                 int64_t begin, int64_t count) {
    int64_t low = recent ? first - heads.recent + 1 - begin : 0;
    int64_t high = last + 1 - begin;
    low = low < 0 ? 0 : low;
    high = high > count ? count : high;
    return low < high ? Columns{static_cast<int>(low), static_cast<int>(high)} : Columns{0, 0};
}

// Scores of one row in `all` become weights, 0 outside `own`; its sums follow the new maximum.
DUO_INLINE void weigh_scores(float* score, Columns all, Columns own, float& row_max, float& row_sum,
                             float* output, int padded) {
    for (int k = all.low; k < own.low; ++k) score[k] = -__builtin_inff();
    for (int k = own.high > all.low ? own.high : all.low; k < all.high; ++k) {
        score[k] = -__builtin_inff();
    }
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

// What of an item does not depend on the caches' dtype: compiled once for all of them.
struct PrefillRows {
    const LayerStep& step;
    const HeadClass& heads;
    const Request& request;
    const KeySource source;
    const HeadChunks chunks;
    const int padded;
    const int64_t first_token;  // of the chunk
    const int rows;
    PrefillScratch scratch;

    PrefillRows(const LayerStep& s, const Item& item, float* base)
        : step(s),
          heads(s.classes[item.head_class]),
          request(s.requests[item.request]),
          source{s, heads, request, item.head, item.request},
          chunks(head_chunks(s.head_size)),
          padded(chunks.padded()),
          first_token(item.begin),
          rows(static_cast<int>(item.end - item.begin) * s.group),
          scratch(base, whole_blocks(rows), padded) {}

    int64_t position(int row) const { return request.context + first_token + row / step.group; }

    char* address(const Rows& tensor, int row) const {
        const int64_t token = request.first_token + first_token + row / step.group;
        const int64_t head = heads.heads[source.head] * int64_t{step.group} + row % step.group;
        return row_address(tensor, step.activations, token, head);
    }

    DUO_NOINLINE void add_block(int first, int64_t begin, int count, bool recent) {
        const int end = first + BLOCK_ROWS < rows ? first + BLOCK_ROWS : rows;
        // Both ends of a row's columns grow with its position.
        const Columns seen =
            block_columns(heads, recent, position(first), position(end - 1), begin, count);
        const int low = seen.low;
        const int high = seen.high;
        if (low >= high) return;
        const Columns all{low / PANEL * PANEL, (high + PANEL - 1) / PANEL * PANEL};
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
            const Columns own =
                block_columns(heads, recent, position(r), position(r), begin, count);
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
struct PrefillItem : PrefillRows {
    using PrefillRows::PrefillRows;

    void load_queries() {
        constexpr float log2e = 1.44269504088896340736f;
        float row[512];
        for (int r = 0; r < whole_blocks(rows); ++r) {
            float* to = scratch.query + r / BLOCK_ROWS * BLOCK_ROWS * padded + r % BLOCK_ROWS;
            if (r < rows) {
                load_activations<T>(step, address(step.query, r), chunks,
                                    step.scale * step.key_scale * UNIT<T> * log2e, row);
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
        for (int k = 0; scaled && k < keys.count; ++k) {
            const Scales own = load_scales(keys.value[k], number_bytes(step.dtype, step.head_size));
            scales[0][k] = own.key;
            scales[1][k] = own.value;
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
        const VisibleRanges ranges = visible_ranges(heads, position(0), position(rows - 1));
        for (int i = 0; i < 2; ++i) {
            for (int64_t at = ranges.begin[i]; at < ranges.end[i]; at += TILE_KEYS) {
                const int64_t end = at + TILE_KEYS;
                add_tile(at, end < ranges.end[i] ? end : ranges.end[i], i == 1);
            }
        }
        for (int r = 0; r < rows; ++r) {
            store_activations<T>(scratch.output + int64_t{r} * padded, chunks,
                                 step.value_scale * UNIT<T> / scratch.sum[r], step,
                                 address(step.output, r));
        }
    }
};

template <typename T>
void prefill_item(const LayerStep& step, const Item& item, float* scratch) {
    PrefillItem<T>(step, item, scratch).run();
}

}  // namespace
}  // namespace duo
