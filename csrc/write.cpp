#include "write.h"

#include <algorithm>
#include <cstring>

#include "locate.h"

namespace duo {
namespace {

void copy_token(const LayerStep& step, int64_t token, int kv_head, char* to) {
    const int64_t size = element_bytes(step.dtype);
    const int64_t bytes = number_bytes(step.dtype, step.head_size);
    const Rows& key = step.key;
    const Rows& value = step.value;
    std::memcpy(to, key.data + size * (token * key.token_stride + kv_head * key.head_stride),
                bytes);
    std::memcpy(to + bytes,
                value.data + size * (token * value.token_stride + kv_head * value.head_stride),
                bytes + scale_bytes(step.dtype));
}

// Whether a later query can still see a position once the request has `seq_len` tokens. Of two
// tokens with one slot only the later one may be written, whatever the order of the writes.
bool is_kept(const HeadClass& heads, int64_t position, int64_t seq_len) {
    return !heads.is_ring || position < heads.sink || position >= seq_len - heads.ring;
}

void copy_block(const LayerStep& step, const HeadClass& heads, int head, int64_t from, int64_t to) {
    const Cache& cache = heads.cache;
    const int64_t size = element_bytes(step.dtype);
    const int64_t slot_bytes = row_bytes(step.dtype, step.head_size);
    const auto address = [&](int64_t block) {
        return cache.data + size * (block * cache.block_stride + head * cache.head_stride);
    };
    if (size * cache.slot_stride == slot_bytes) {
        std::memcpy(address(to), address(from), slot_bytes * heads.table.block_size);
        return;
    }
    for (int64_t slot = 0; slot < heads.table.block_size; ++slot) {
        const int64_t offset = slot * size * cache.slot_stride;
        std::memcpy(address(to) + offset, address(from) + offset, slot_bytes);
    }
}

}  // namespace

void write_tokens(const LayerStep& step, const HeadClass& heads, int64_t first, int64_t last) {
    const int64_t size = element_bytes(step.dtype);
    for (int row = 0; row < step.num_requests; ++row) {
        const Request& request = step.requests[row];
        const int64_t seq_len = request.context + request.length;
        const int64_t begin = std::max(first, request.first_token);
        const int64_t end = std::min(last, request.first_token + request.length);
        for (int64_t token = begin; token < end; ++token) {
            const int64_t position = request.context + token - request.first_token;
            if (!is_kept(heads, position, seq_len)) continue;
            char* to = slot_address(heads, size, row, 0, slot_of(heads, position));
            for (int head = 0; head < heads.num_heads; ++head) {
                copy_token(step, token, heads.heads[head],
                           to + size * head * heads.cache.head_stride);
            }
        }
    }
}

void copy_snapshot(const LayerStep& step, const HeadClass& heads, const SnapshotCopy& copy,
                   int first, int last) {
    const Table& table = heads.table;
    const int32_t* row = table.blocks + copy.row * table.row_stride;
    const Request& request = step.requests[copy.row];
    for (int head = first; head < last; ++head) {
        for (int64_t i = 0; i < copy.num_blocks; ++i) {
            const int64_t from = copy.store ? row[i] : copy.blocks[i];
            copy_block(step, heads, head, from, copy.store ? copy.blocks[i] : row[i]);
        }
        if (!copy.store) continue;
        // A slot that the chunk does not write before the boundary keeps what the ring held.
        for (int64_t at = request.context; at < copy.num_tokens; ++at) {
            if (!is_kept(heads, at, copy.num_tokens)) continue;
            const int64_t slot = slot_of(heads, at);
            const Cache& cache = heads.cache;
            char* to = cache.data +
                       element_bytes(step.dtype) *
                           (copy.blocks[slot / table.block_size] * cache.block_stride +
                            head * cache.head_stride + slot % table.block_size * cache.slot_stride);
            copy_token(step, request.first_token + at - request.context, heads.heads[head], to);
        }
    }
}

}  // namespace duo
