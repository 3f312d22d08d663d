// Rows of activations in the chunk order of a cache's dtype.
#pragma once

#include "../common.h"
#include "elements.h"
#include "rotate.h"

namespace duo {
namespace {

// Address of a row of a tensor, whatever its dtype.
DUO_INLINE char* row_address(const Rows& rows, Dtype dtype, int64_t token, int64_t head) {
    return rows.data + element_bytes(dtype) * (token * rows.token_stride + head * rows.head_stride);
}

// Of the query heads of one KV head, token after token from `first_token` on, the row number `row`
// of queries or outputs. `head`: the KV head's index in its class.
DUO_INLINE char* query_address(const LayerStep& step, const Rows& rows, const HeadClass& heads,
                               int head, int64_t first_token, int row) {
    const int64_t first_head = int64_t{heads.heads[head]} * step.group;
    return row_address(rows, step.activations, first_token + row / step.group,
                       first_head + row % step.group);
}

// What the sum of a row's weights becomes with its query head's learned sink, which takes part like
// one more key. `max`: the exponent of 2 that the weights are relative to.
DUO_INLINE float sum_with_sink(const LayerStep& step, const HeadClass& heads, int head, int row,
                               float max, float sum) {
    if (!step.sinks) return sum;
    const int64_t query_head = int64_t{heads.heads[head]} * step.group + row % step.group;
    return sum + exp2_any(step.sinks[query_head] * LOG2E - max);
}

// Calls work(pointer to the row's dtype) for activations beside quantised caches, whose chunks have
// the elements in their own order.
template <typename Work>
DUO_INLINE void with_ordered(Dtype dtype, char* row, Work work) {
    if (dtype == Dtype::f32) {
        work(reinterpret_cast<float*>(row));
    } else if (dtype == Dtype::bf16) {
        work(reinterpret_cast<OrderedBFloat16*>(row));
    } else {
        work(reinterpret_cast<Float16*>(row));
    }
}

// The row to floats in their own order, rotated if asked for, times `factor`. This and the next are
// compiled once for all quantised dtypes.
DUO_NOINLINE void load_ordered_row(const LayerStep& step, char* row, HeadChunks chunks,
                                   float factor, bool rotated, float* to) {
    with_ordered(step.activations, row, [&](const auto* from) __attribute__((always_inline)) {
        load_row(from, chunks, factor, to);
    });
    if (rotated) rotate(to, step.head_size);
}

// Floats in their own order to the row, times `factor`.
DUO_NOINLINE void store_ordered_row(const float* from, HeadChunks chunks, float factor,
                                    const LayerStep& step, char* row) {
    with_ordered(step.activations, row, [&](auto* to) __attribute__((always_inline)) {
        store_row(from, chunks, factor, to);
    });
}

// The row to floats in T's chunk order, times `factor`.
template <typename T>
DUO_INLINE void load_activations(const LayerStep& step, char* row, HeadChunks chunks, float factor,
                                 float* to) {
    if constexpr (!IS_QUANTISED<T>) {
        load_row(reinterpret_cast<const T*>(row), chunks, factor, to);
    } else if constexpr (!IS_ROTATED<T>) {
        load_ordered_row(step, row, chunks, factor, false, to);
    } else {
        float ordered[MAX_HEAD_SIZE];
        load_ordered_row(step, row, chunks, factor, true, ordered);
        to_even_odd(ordered, chunks.padded(), to);
    }
}

// Floats in T's chunk order to the row, times `factor`.
template <typename T>
DUO_INLINE void store_activations(const float* from, HeadChunks chunks, float factor,
                                  const LayerStep& step, char* row) {
    if constexpr (!IS_QUANTISED<T>) {
        store_row(from, chunks, factor, reinterpret_cast<T*>(row));
    } else if constexpr (!IS_ROTATED<T>) {
        store_ordered_row(from, chunks, factor, step, row);
    } else {
        float ordered[MAX_HEAD_SIZE];
        from_even_odd(from, chunks.padded(), ordered);
        rotate_back(ordered, step.head_size);
        store_ordered_row(ordered, chunks, factor, step, row);
    }
}

}  // namespace
}  // namespace duo
