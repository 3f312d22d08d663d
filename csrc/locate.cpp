#include "locate.h"

#include <algorithm>

namespace duo {

VisibleRanges visible_ranges(const HeadClass& heads, int64_t first, int64_t last) {
    if (!heads.is_ring) return {.begin = {0, last + 1}, .end = {last + 1, last + 1}};
    const int64_t sink_end = std::min(heads.sink, last + 1);
    const int64_t recent_begin = std::max(sink_end, first - heads.recent + 1);
    return {.begin = {0, recent_begin}, .end = {sink_end, last + 1}};
}

KeyRun locate(const LayerStep& step, const HeadClass& heads, int head, const Request& request,
              int64_t row, int64_t position, int64_t end) {
    const int64_t size = element_bytes(step.dtype);
    if (position >= request.context) {
        const int64_t token = request.first_token + position - request.context;
        const int64_t kv_head = heads.heads[head];
        const Rows& key = step.key;
        const Rows& value = step.value;
        return {key.data + size * (token * key.token_stride + kv_head * key.head_stride),
                value.data + size * (token * value.token_stride + kv_head * value.head_stride),
                size * key.token_stride, size * value.token_stride, end - position};
    }
    const int64_t slot = slot_of(heads, position);
    const int64_t block_size = heads.table.block_size;
    int64_t count =
        std::min(std::min(end, request.context) - position, block_size - slot % block_size);
    if (heads.is_ring) {
        // A run ends where the ring starts anew.
        count = std::min(count, heads.sink + heads.ring - slot);
    }
    const char* key = slot_address(heads, size, row, head, slot);
    const int64_t stride = size * heads.cache.slot_stride;
    return {key, key + number_bytes(step.dtype, step.head_size), stride, stride, count};
}

}  // namespace duo
