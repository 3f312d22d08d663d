// Which keys a query sees, and where they lie.
#pragma once

#include "common.h"

namespace duo {

// Positions that at least one query of [first, last] sees: two ascending ranges [begin, end).
struct VisibleRanges {
    int64_t begin[2];
    int64_t end[2];
};

DUO_ALWAYS_INLINE int64_t size(const VisibleRanges& ranges) {
    return (ranges.end[0] - ranges.begin[0]) + (ranges.end[1] - ranges.begin[1]);
}

VisibleRanges visible_ranges(const HeadClass& heads, int64_t first, int64_t last);

// Keys at equal distances in memory, and values likewise: a model that normalises its keys leaves
// the values of the chunk where its projection put them.
struct KeyRun {
    const char* key;
    const char* value;
    int64_t key_stride_bytes;
    int64_t value_stride_bytes;
    int64_t count;
};

// The run that starts at `position` and ends at `end` or sooner; both of one visible range, so that
// no run leaves the sink. All positions of a run are of the chunk or all of the context, in one
// block.
KeyRun locate(const LayerStep& step, const HeadClass& heads, int head, const Request& request,
              int64_t row, int64_t position, int64_t end);

// Slot of a position in the request's run of slots.
DUO_ALWAYS_INLINE int64_t slot_of(const HeadClass& heads, int64_t position) {
    if (!heads.is_ring || position < heads.sink) return position;
    return heads.sink + (position - heads.sink) % heads.ring;
}

// Element address of a slot for one head of the class.
DUO_ALWAYS_INLINE char* slot_address(const HeadClass& heads, int64_t element_size, int64_t row,
                                     int head, int64_t slot) {
    const Table& table = heads.table;
    const int64_t block = table.blocks[row * table.row_stride + slot / table.block_size];
    const Cache& cache = heads.cache;
    return cache.data + element_size * (block * cache.block_stride + head * cache.head_stride +
                                        slot % table.block_size * cache.slot_stride);
}

}  // namespace duo
