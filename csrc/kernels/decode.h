// Few queries against many keys: bound by memory, so each key is read once for all the query heads
// of its KV head and for all the request's queries.
#pragma once

#include "elements.h"
#include "keys.h"

namespace duo {
namespace {

// Keys that are scored and then applied before the next ones are touched: few enough that their
// values still lie in the first-level cache.
constexpr int KEY_BLOCK = 32;

// A partial result: for each row the maximum, the sum of weights, then the weighted values.
struct DecodeRows {
    float* query;   // [rows, padded] in chunk order, times scale * log2(e)
    float* score;   // [rows, KEY_BLOCK]
    float* max;     // [rows]
    float* sum;     // [rows]
    float* values;  // [rows, padded] in chunk order
    int rows;
    HeadChunks chunks;
};

// Scores of R rows against `count` keys, LANES / R keys at a time; reads ahead in `next`.
template <typename T, int R>
DUO_INLINE void score_keys(const float* query, HeadChunks chunks, const T* const* key, int count,
                           const T* const* next, int next_bytes, float* score) {
    constexpr int K = LANES / R;
    const int64_t padded = chunks.padded();
    for (int k = 0; k < count; k += K) {
        Vec part[LANES] = {};
        const auto add = [&](int c, auto load_keys) __attribute__((always_inline)) {
            Chunk q[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) q[r] = load_chunk(query + r * padded + c * CHUNK);
#pragma GCC unroll 16
            for (int i = 0; i < K; ++i) {
                const Chunk x = load_keys(key[k + i] + c * CHUNK);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    part[r * K + i] += q[r].a * x.a;
                    part[r * K + i] += q[r].b * x.b;
                }
            }
        };
        for (int c = 0; c < chunks.full; ++c) {
            add(c, [](const T* at) __attribute__((always_inline)) { return load_chunk(at); });
        }
        if (HAS_HALF_CHUNKS && chunks.half) {
            add(chunks.full,
                [](const T* at) __attribute__((always_inline)) { return load_half_chunk(at); });
        }
        if (next_bytes) {
#pragma GCC unroll 16
            for (int i = 0; i < K; ++i) {
                const char* at = reinterpret_cast<const char*>(next[k + i]);
                for (int b = 0; b < next_bytes; b += 64) __builtin_prefetch(at + b);
            }
        }
        float sums[LANES];
        store(sums, sum_each(part));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            std::memcpy(score + r * KEY_BLOCK + k, sums + r * K, K * sizeof(float));
        }
    }
}

// values[r] += score[r] * value, R rows and C chunks of the head.
template <typename T, int R, int C, bool Half>
DUO_INLINE void apply_chunks(const float* score, const T* const* value, int count, int chunk,
                             float* values, int64_t padded) {
    Vec total[R][2 * C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < 2 * C; ++c) {
            total[r][c] = load(values + r * padded + chunk * CHUNK + c * LANES);
        }
    }
    for (int k = 0; k < count; ++k) {
        Chunk x[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) {
            const T* at = value[k] + (chunk + c) * CHUNK;
            x[c] = Half ? load_half_chunk(at) : load_chunk(at);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec weight = broadcast(score[r * KEY_BLOCK + k]);
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                total[r][2 * c] += weight * x[c].a;
                total[r][2 * c + 1] += weight * x[c].b;
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < 2 * C; ++c) {
            store(values + r * padded + chunk * CHUNK + c * LANES, total[r][c]);
        }
    }
}

template <typename T, int R>
DUO_INLINE void apply_values(const float* score, const T* const* value, int count,
                             HeadChunks chunks, float* values) {
    constexpr int C = 4 / R;
    const int64_t padded = chunks.padded();
    int c = 0;
    for (; c + C <= chunks.full; c += C) {
        apply_chunks<T, R, C, false>(score, value, count, c, values, padded);
    }
    for (; C > 1 && c < chunks.full; ++c) {
        apply_chunks<T, R, 1, false>(score, value, count, c, values, padded);
    }
    if (HAS_HALF_CHUNKS && chunks.half) {
        apply_chunks<T, R, 1, true>(score, value, count, c, values, padded);
    }
}

// Turns the scores of one row into weights and brings its sums to their new maximum.
DUO_INLINE void weigh_row(DecodeRows& rows, int r) {
    float* score = rows.score + r * KEY_BLOCK;
    Vec most = load(score);
    for (int k = LANES; k < KEY_BLOCK; k += LANES) most = max(most, load(score + k));
    const float block_max = max_lane(most);
    const float old_max = rows.max[r];
    if (block_max > old_max) {
        rows.max[r] = block_max;
        const Vec decay = exp2_nonpositive(broadcast(old_max - block_max));
        rows.sum[r] *= decay[0];
        float* values = rows.values + r * rows.chunks.padded();
        for (int i = 0; i < rows.chunks.padded(); i += LANES)
            store(values + i, load(values + i) * decay);
    }
    // A row that has not seen any key yet: all its scores are -inf, and so are the differences.
    const Vec base = broadcast(rows.max[r] == -__builtin_inff() ? 0.0f : rows.max[r]);
    Vec total{};
    for (int k = 0; k < KEY_BLOCK; k += LANES) {
        const Vec weight = exp2_nonpositive(load(score + k) - base);
        store(score + k, weight);
        total += weight;
    }
    rows.sum[r] += sum(total);
}

// Calls work(first row, number of rows) for groups of 4, 2 and 1 rows.
template <typename Work>
DUO_INLINE void for_row_groups(int rows, Work work) {
    int r = 0;
    if constexpr (LANES >= 4) {
        for (; r + 4 <= rows; r += 4) work(r, Indices<4>{});
    }
    if (r + 2 <= rows) {
        work(r, Indices<2>{});
        r += 2;
    }
    if (r < rows) work(r, Indices<1>{});
}

template <typename T>
void decode_item(const LayerStep& step, const Item& item, float* scratch) {
    const HeadClass& heads = step.classes[item.head_class];
    const Request& request = step.requests[item.request];
    const KeySource source{step, heads, request, item.head, item.request};
    const int64_t first = request.context;
    const int64_t last = first + request.length - 1;
    const VisibleRanges ranges = visible_ranges(heads, first, last);

    DecodeRows rows;
    rows.chunks = head_chunks(step.head_size);
    rows.rows = static_cast<int>(request.length) * step.group;
    const int64_t padded = rows.chunks.padded();
    rows.query = scratch;
    rows.score = rows.query + rows.rows * padded;
    const bool whole = item.num_items == 1;
    rows.max = whole ? rows.score + rows.rows * KEY_BLOCK : item.partial;
    rows.sum = rows.max + rows.rows;
    rows.values = rows.sum + rows.rows;

    const int64_t kv_head = heads.heads[item.head];
    const auto row_address = [&](const Rows& tensor, int r) {
        const int64_t token = request.first_token + r / step.group;
        const int64_t head = kv_head * step.group + r % step.group;
        return reinterpret_cast<T*>(tensor.data) + token * tensor.token_stride +
               head * tensor.head_stride;
    };
    constexpr float log2e = 1.44269504088896340736f;
    for (int r = 0; r < rows.rows; ++r) {
        load_row(row_address(step.query, r), rows.chunks, step.scale * log2e,
                 rows.query + r * padded);
        rows.max[r] = -__builtin_inff();
        rows.sum[r] = 0;
    }
    std::memset(rows.values, 0, rows.rows * padded * sizeof(float));

    KeyBlock<T, KEY_BLOCK> blocks[2];
    source.fill(blocks[0], ranges, item.begin, item.end);
    for (int64_t at = item.begin, turn = 0; at < item.end; ++turn) {
        KeyBlock<T, KEY_BLOCK>& block = blocks[turn & 1];
        KeyBlock<T, KEY_BLOCK>& next = blocks[~turn & 1];
        const int count = block.count;
        at += count;
        next.count = 0;
        if (at < item.end) source.fill(next, ranges, at, item.end);
        // Missing keys of the last block repeat its last one, and are hidden below.
        for (int k = count; k < KEY_BLOCK; ++k) block.key[k] = block.key[count - 1];
        for (int k = next.count; k < KEY_BLOCK; ++k) next.key[k] = block.key[0];
        const int next_bytes = next.count ? 2 * step.head_size * static_cast<int>(sizeof(T)) : 0;

        for_row_groups(rows.rows, [&]<int R>(int r, Indices<R>) __attribute__((always_inline)) {
            score_keys<T, R>(rows.query + r * padded, rows.chunks, block.key, KEY_BLOCK, next.key,
                             r == 0 ? next_bytes : 0, rows.score + r * KEY_BLOCK);
        });
        for (int r = 0; r < rows.rows; ++r) {
            float* score = rows.score + r * KEY_BLOCK;
            for (int k = count; k < KEY_BLOCK; ++k) score[k] = -__builtin_inff();
            if (request.length > 1) {
                for (int k = 0; k < count; ++k) {
                    if (!sees(heads, first + r / step.group, block.position[k])) {
                        score[k] = -__builtin_inff();
                    }
                }
            }
            weigh_row(rows, r);
        }
        for_row_groups(rows.rows, [&]<int R>(int r, Indices<R>) __attribute__((always_inline)) {
            apply_values<T, R>(rows.score + r * KEY_BLOCK, block.value, count, rows.chunks,
                               rows.values + r * padded);
        });
    }
    if (!whole) return;
    for (int r = 0; r < rows.rows; ++r) {
        store_row(rows.values + r * padded, rows.chunks, 1.0f / rows.sum[r],
                  row_address(step.output, r));
    }
}

// Merges the partial results of one request and head, always in the keys' order, so that the result
// depends neither on the threads nor on the rest of the batch.
template <typename T>
void merge_items(const LayerStep& step, const Item* items, int count) {
    const HeadClass& heads = step.classes[items->head_class];
    const Request& request = step.requests[items->request];
    const HeadChunks chunks = head_chunks(step.head_size);
    const int rows = static_cast<int>(request.length) * step.group;
    const int64_t padded = chunks.padded();
    float* total = items[0].partial;
    for (int r = 0; r < rows; ++r) {
        float most = -__builtin_inff();
        for (int i = 0; i < count; ++i)
            most = items[i].partial[r] > most ? items[i].partial[r] : most;
        float sum = 0;
        float* values = total + 2 * rows + r * padded;
        for (int i = 0; i < count; ++i) {
            const float* part = items[i].partial;
            const float weight = exp2_nonpositive(broadcast(part[r] - most))[0];
            sum += weight * part[rows + r];
            const float* from = part + 2 * rows + r * padded;
            for (int64_t d = 0; d < padded; d += LANES) {
                const Vec before = i == 0 ? Vec{} : load(values + d);
                store(values + d, before + load(from + d) * weight);
            }
        }
        const int64_t token = request.first_token + r / step.group;
        const int64_t head = heads.heads[items->head] * int64_t{step.group} + r % step.group;
        T* to = reinterpret_cast<T*>(step.output.data) + token * step.output.token_stride +
                head * step.output.head_stride;
        store_row(values, chunks, 1.0f / sum, to);
    }
}

// Floats of a thread's scratch and of one partial result.
DUO_INLINE int64_t decode_scratch_floats(int64_t rows, int padded) {
    return rows * (2 * padded + KEY_BLOCK + 2);
}
DUO_INLINE int64_t partial_floats(int64_t rows, int padded) { return rows * (padded + 2); }

}  // namespace
}  // namespace duo
