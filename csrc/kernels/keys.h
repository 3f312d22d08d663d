// Pointers to the keys and values of consecutive visible positions.
#pragma once

#include "../locate.h"
#include "vec.h"

namespace duo {
namespace {

template <typename T, int Size>
struct KeyBlock {
    const T* key[Size];
    const T* value[Size];
    int64_t position[Size];
    int count;
};

// Where the keys of one request and KV head lie.
struct KeySource {
    const LayerStep& step;
    const HeadClass& heads;
    const Request& request;
    int head;
    int64_t row;

    // Appends the positions [begin, end) to a block that has room for them.
    template <typename T, int Size>
    void append(KeyBlock<T, Size>& block, int64_t begin, int64_t end) const {
        int n = block.count;
        while (begin < end) {
            const KeyRun run = locate(step, heads, head, request, row, begin, end);
            for (int64_t i = 0; i < run.count; ++i, ++n) {
                block.key[n] = reinterpret_cast<const T*>(run.key + i * run.key_stride_bytes);
                block.value[n] = reinterpret_cast<const T*>(run.value + i * run.value_stride_bytes);
                block.position[n] = begin + i;
            }
            begin += run.count;
        }
        block.count = n;
    }

    // Fills a block with the visible keys number `from`, `from` + 1, ... up to `to`.
    template <typename T, int Size>
    void fill(KeyBlock<T, Size>& block, const VisibleRanges& ranges, int64_t from,
              int64_t to) const {
        block.count = 0;
        if (to > from + Size) to = from + Size;
        const int64_t first = ranges.end[0] - ranges.begin[0];
        if (from < first) {
            append(block, ranges.begin[0] + from, ranges.begin[0] + (to < first ? to : first));
        }
        if (to > first) {
            const int64_t skipped = ranges.begin[1] - first;
            append(block, (from > first ? from : first) + skipped, to + skipped);
        }
    }
};

// The rule.
DUO_INLINE bool sees(const HeadClass& heads, int64_t position, int64_t key) {
    return key <= position && (!heads.is_ring || key < heads.sink || key > position - heads.recent);
}

}  // namespace
}  // namespace duo
