// Many queries of one request with all query heads of one KV head: which of them see what, and
// where they lie. Shared by the multiplications in float32 (prefill.h) and of bf16 pairs
// (prefill_pairs.h).
#pragma once

#include "activations.h"
#include "keys.h"

namespace duo {
namespace {

DUO_INLINE int min(int a, int b) { return a < b ? a : b; }

// Columns [low, high) of a tile of keys.
struct Columns {
    int low;
    int high;
};

// The smallest run of whole steps of `step` columns around them.
DUO_INLINE Columns widened(Columns columns, int step) {
    return {columns.low / step * step, (columns.high + step - 1) / step * step};
}

DUO_INLINE bool holds(Columns columns, Columns others) {
    return columns.low <= others.low && others.high <= columns.high;
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

    PrefillRows(const LayerStep& s, const Item& item)
        : step(s),
          heads(s.classes[item.head_class]),
          request(s.requests[item.request]),
          source{s, heads, request, item.head, item.request},
          chunks(head_chunks(s.head_size)),
          padded(chunks.padded()),
          first_token(item.begin),
          rows(static_cast<int>(item.end - item.begin) * s.group) {}

    int64_t position(int row) const { return request.context + first_token + row / step.group; }

    char* address(const Rows& tensor, int row) const {
        return query_address(step, tensor, heads, source.head, request.first_token + first_token,
                             row);
    }

    // What the sum of a row's weights becomes with its learned sink, if there is one.
    float with_sink(int row, float max, float sum) const {
        return sum_with_sink(step, heads, source.head, row, max, sum);
    }

    // What the rows first ... last see, together, of a tile of `count` keys from position `begin`
    // on, all in the sink or all behind it. Both ends of a row's columns grow with its position.
    Columns columns(int first, int last, int64_t begin, int64_t count, bool recent) const {
        int64_t low = recent ? position(first) - heads.recent + 1 - begin : 0;
        int64_t high = position(last) + 1 - begin;
        low = low < 0 ? 0 : low;
        high = high > count ? count : high;
        return low < high ? Columns{static_cast<int>(low), static_cast<int>(high)} : Columns{0, 0};
    }

    // Calls work(begin, end, recent) for tiles of up to `size` positions that together hold all
    // that any row sees: first the sink's, or all of them where the class has no ring.
    template <typename Work>
    void for_tiles(int64_t size, Work work) const {
        const VisibleRanges ranges = visible_ranges(heads, position(0), position(rows - 1));
        for (int i = 0; i < 2; ++i) {
            for (int64_t at = ranges.begin[i]; at < ranges.end[i]; at += size) {
                const int64_t end = at + size;
                work(at, end < ranges.end[i] ? end : ranges.end[i], i == 1);
            }
        }
    }
};

// Hides the scores of a row in `all`, whole vectors, that it does not see.
DUO_INLINE void hide_scores(float* score, Columns all, Columns own) {
    const auto hide = [&](int k) __attribute__((always_inline)) {
        const VecInt column = lane_numbers(Lanes{}) + k;
        const VecInt seen = (column >= own.low) & (column < own.high);
        store(score + k, seen ? load(score + k) : broadcast(-__builtin_inff()));
    };
    for (int k = all.low; k < own.low; k += LANES) hide(k);
    const int high = own.high / LANES * LANES;
    for (int k = high > all.low ? high : all.low; k < all.high; k += LANES) hide(k);
}

}  // namespace
}  // namespace duo
