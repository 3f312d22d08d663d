// Few queries against many keys: bound by memory, so each key is read once for all the query heads
// of its KV head and for all the request's queries.
#pragma once

#include "activations.h"
#include "keys.h"

namespace duo {
namespace {

// Keys that are scored and applied before the next ones are touched: the keys of a page are then
// read nearly in the order in which they lie there, and each is still in the first-level cache when
// its value is needed.
constexpr int TILE = 2 * LANES;

// Score or weight of row r and key k of a tile: score[r * Row + k * Key].
template <int Row, int Key>
struct ScoreStrides {};
using RowByRow = ScoreStrides<TILE, 1>;

// What one thread holds of an item.
struct DecodeRows {
    float* query;   // [rows, padded] in chunk order, times scale * log2(e)
    float* score;   // [rows, TILE]
    float* sum;     // [rows, LANES], partial sums of the weights
    float* max;     // [rows]
    float* values;  // [rows, padded] in chunk order
    int rows;
    HeadChunks chunks;
};

// Asks for memory ahead, line after line, as the arithmetic on the keys at hand goes on: asked for
// all at once the lines would have to wait for each other, and the arithmetic with them.
struct ReadAhead {
    BlockLines lines;
    const bool to_first_level;

    // Where wide arithmetic outruns what the first-level cache can wait for, the second level has
    // more lines on the way at a time.
    DUO_INLINE void line() {
        const char* at = lines.next();
        if (LANES < 16 || to_first_level) {
            __builtin_prefetch(at, 0, 3);
        } else {
            __builtin_prefetch(at, 0, 2);
        }
    }

    // The share of one chunk of one key or value.
    template <typename T>
    DUO_INLINE void chunk(int c) {
        constexpr int bytes = CHUNK_OF<T> * static_cast<int>(sizeof(T));
        if (bytes >= 64 || c * bytes % 64 == 0) {
            line();
            for (int b = 64; b < bytes; b += 64) line();
        }
    }
};

// Scores of R rows against LANES / R keys, side by side: lane r * LANES / R + i is row r's of key
// i.
template <typename T, int R, bool Ahead>
DUO_INLINE Vec score_keys(const float* query, HeadChunks chunks, const T* const* key,
                          ReadAhead& ahead) {
    constexpr int K = LANES / R;
    const int64_t padded = chunks.padded();
    Vec part[LANES] = {};
    const auto add = [&](int c, auto load_keys) __attribute__((always_inline)) {
        // Of queries and keys the fewer stay in registers, beside the LANES sums.
        if constexpr (R <= K) {
            Chunk q[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) q[r] = load_chunk(query + r * padded + c * CHUNK);
#pragma GCC unroll 16
            for (int i = 0; i < K; ++i) {
                const Chunk x = load_keys(key[i] + c * CHUNK_OF<T>);
                if (Ahead) ahead.chunk<T>(c);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    part[r * K + i] += q[r].a * x.a;
                    part[r * K + i] += q[r].b * x.b;
                }
            }
        } else {
            Chunk x[K];
#pragma GCC unroll 16
            for (int i = 0; i < K; ++i) {
                x[i] = load_keys(key[i] + c * CHUNK_OF<T>);
                if (Ahead) ahead.chunk<T>(c);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Vec a = load(query + r * padded + c * CHUNK);
#pragma GCC unroll 16
                for (int i = 0; i < K; ++i) part[r * K + i] += a * x[i].a;
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Vec b = load(query + r * padded + c * CHUNK + LANES);
#pragma GCC unroll 16
                for (int i = 0; i < K; ++i) part[r * K + i] += b * x[i].b;
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
    return sum_each(part);
}

// Scores of R rows against a tile of keys.
template <typename T, int R, bool Ahead>
DUO_INLINE void score_tile(const float* query, HeadChunks chunks, const T* const* key,
                           ReadAhead& ahead, float* score) {
    constexpr int K = LANES / R;
    for (int k = 0; k < TILE; k += LANES) {
        Vec scores[R];
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            scores[i] = score_keys<T, R, Ahead>(query, chunks, key + k + i * K, ahead);
        }
        transpose_runs<K, R>(scores);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) store(score + r * TILE + k, scores[r]);
    }
}

// values[r] += score[r] * value, R rows and C chunks of the head.
template <typename T, int R, int C, bool Half, bool Ahead, int Row, int Key, typename Reads>
DUO_INLINE void apply_chunks(ScoreStrides<Row, Key>, const float* score, const T* const* value,
                             Reads& ahead, int chunk, float* values, int64_t padded) {
    Vec total[R][2 * C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < 2 * C; ++c) {
            total[r][c] = load(values + r * padded + chunk * CHUNK + c * LANES);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < TILE; ++k) {
        Chunk x[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) {
            const T* at = value[k] + (chunk + c) * CHUNK_OF<T>;
            x[c] = Half ? load_half_chunk(at) : load_chunk(at);
            if (Ahead) ahead.template chunk<T>(C == 1 ? 0 : c);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec weight = broadcast(score[r * Row + k * Key]);
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

template <typename T, int R, bool Ahead, typename Strides, typename Reads>
DUO_INLINE void apply_tile(Strides strides, const float* score, const T* const* value, Reads& ahead,
                           HeadChunks chunks, float* values) {
    constexpr int C = 4 / R;
    constexpr int chunk_bytes = CHUNK_OF<T> * static_cast<int>(sizeof(T));
    const int64_t padded = chunks.padded();
    int c = 0;
    for (; c + C <= chunks.full; c += C) {
        // Where several steps share a line, one of them asks for it.
        if (!Ahead || (C * chunk_bytes < 64 && c * chunk_bytes % 64)) {
            apply_chunks<T, R, C, false, false>(strides, score, value, ahead, c, values, padded);
        } else {
            apply_chunks<T, R, C, false, true>(strides, score, value, ahead, c, values, padded);
        }
    }
    for (; C > 1 && c < chunks.full; ++c) {
        apply_chunks<T, R, 1, false, Ahead>(strides, score, value, ahead, c, values, padded);
    }
    if (HAS_HALF_CHUNKS && chunks.half) {
        apply_chunks<T, R, 1, true, Ahead>(strides, score, value, ahead, c, values, padded);
    }
}

// Scales of a tile's keys and values.
struct TileScales {
    float key[TILE];
    float value[TILE];
};

DUO_INLINE void scale_scores(const TileScales& scales, DecodeRows& rows) {
    for (int r = 0; r < rows.rows; ++r) {
        float* score = rows.score + r * TILE;
        for (int k = 0; k < TILE; k += LANES)
            store(score + k, load(score + k) * load(scales.key + k));
    }
}

// Turns the scores of one row into weights; where they pass its maximum, its sums follow.
// `value_scale`: what the weights are to be multiplied with in the end, or null.
DUO_INLINE void weigh_row(DecodeRows& rows, int r, const float* value_scale) {
    float* score = rows.score + r * TILE;
    float* sum = rows.sum + r * LANES;
    Vec most = load(score);
    for (int k = LANES; k < TILE; k += LANES) most = max(most, load(score + k));
    if (any_greater(most, broadcast(rows.max[r]))) {
        const float tile_max = max_lane(most);
        const Vec decay = exp2_nonpositive(broadcast(rows.max[r] - tile_max));
        rows.max[r] = tile_max;
        store(sum, load(sum) * decay);
        float* values = rows.values + r * rows.chunks.padded();
        for (int i = 0; i < rows.chunks.padded(); i += LANES)
            store(values + i, load(values + i) * decay);
    }
    // A row that has not seen any key yet: all its scores are -inf, and so are the differences.
    const Vec base = broadcast(rows.max[r] == -__builtin_inff() ? 0.0f : rows.max[r]);
    Vec total = load(sum);
    for (int k = 0; k < TILE; k += LANES) {
        const Vec weight = exp2_nonpositive(load(score + k) - base);
        store(score + k, value_scale ? weight * load(value_scale + k) : weight);
        total += weight;
    }
    store(sum, total);
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

// Hides what a row does not see: repeated keys of the last tile, and later drafts from earlier
// ones.
template <typename T, int Row, int Key>
DUO_INLINE void hide_keys(ScoreStrides<Row, Key>, const HeadClass& heads, const Request& request,
                          int group, const KeyBlock<T, TILE>& tile, int rows, float* score) {
    if (tile.count == TILE && request.length == 1) return;
    for (int r = 0; r < rows; ++r, score += Row) {
        for (int k = tile.count; k < TILE; ++k) score[k * Key] = -__builtin_inff();
        if (request.length == 1) continue;
        const int64_t position = request.context + r / group;
        for (int k = 0; k < tile.count; ++k) {
            if (!sees(heads, position, tile.position[k])) score[k * Key] = -__builtin_inff();
        }
    }
}

// Fills a tile; missing keys repeat one that is there, and are to be hidden.
template <typename T>
DUO_INLINE void fill_tile(KeyWalk& walk, KeyBlock<T, TILE>& tile) {
    walk.fill(tile);
    if (tile.count == 0) return;
    for (int k = tile.count; k < TILE; ++k) {
        tile.key[k] = tile.key[0];
        tile.value[k] = tile.value[0];
    }
}

DUO_INLINE KeyWalk keys_of(const LayerStep& step, const Item& item) {
    const KeySource source{step, step.classes[item.head_class], step.requests[item.request],
                           item.head, item.request};
    return KeyWalk(source, item.begin, item.end);
}

template <typename T>
void decode_item(const LayerStep& step, const Item& item, const Item* following, float* scratch) {
    const HeadClass& heads = step.classes[item.head_class];
    const Request& request = step.requests[item.request];

    DecodeRows rows;
    rows.chunks = head_chunks(step.head_size);
    rows.rows = static_cast<int>(request.length) * step.group;
    const int64_t padded = rows.chunks.padded();
    rows.query = scratch;
    rows.score = rows.query + rows.rows * padded;
    rows.sum = rows.score + rows.rows * TILE;
    const bool whole = item.num_items == 1;
    rows.max = whole ? rows.sum + rows.rows * LANES : item.partial;
    rows.values = whole ? rows.max + rows.rows : item.partial + 2 * rows.rows;

    const auto address = [&](const Rows& tensor, int r) {
        return query_address(step, tensor, heads, item.head, request.first_token, r);
    };
    for (int r = 0; r < rows.rows; ++r) {
        load_activations<T>(step, address(step.query, r), rows.chunks,
                            step.scale * step.key_scale * UNIT<T> * LOG2E, rows.query + r * padded);
        rows.max[r] = -__builtin_inff();
    }
    std::memset(rows.sum, 0, rows.rows * LANES * sizeof(float));
    std::memset(rows.values, 0, rows.rows * padded * sizeof(float));

    KeyWalk walk = keys_of(step, item);
    KeyBlock<T, TILE> tiles[2], first_of_following;
    const int64_t key_bytes = row_bytes(step.dtype, step.head_size);
    const bool scaled = IS_QUANTISED<T> && scale_bytes(step.dtype);
    TileScales scales;
    fill_tile(walk, tiles[0]);
    for (int turn = 0; tiles[turn & 1].count; ++turn) {
        KeyBlock<T, TILE>& tile = tiles[turn & 1];
        KeyBlock<T, TILE>& next = tiles[~turn & 1];
        fill_tile(walk, next);
        const KeyBlock<T, TILE>* upcoming = next.count ? &next : &tile;
        if (next.count == 0 && following) {
            keys_of(step, *following).fill(first_of_following);
            upcoming = &first_of_following;
        }
        ReadAhead ahead{{*upcoming, key_bytes}, step.ahead_to_first_level};
        for_row_groups(rows.rows, [&]<int R>(int r, Indices<R>) __attribute__((always_inline)) {
            const float* query = rows.query + r * padded;
            float* score = rows.score + r * TILE;
            if (r == 0) {
                score_tile<T, R, true>(query, rows.chunks, tile.key, ahead, score);
            } else {
                score_tile<T, R, false>(query, rows.chunks, tile.key, ahead, score);
            }
        });
        if (scaled) {
            load_scales(tile, TILE, number_bytes(step.dtype, step.head_size), scales.key,
                        scales.value);
            scale_scores(scales, rows);
        }
        hide_keys(RowByRow{}, heads, request, step.group, tile, rows.rows, rows.score);
        for (int r = 0; r < rows.rows; ++r) weigh_row(rows, r, scaled ? scales.value : nullptr);
        for_row_groups(rows.rows, [&]<int R>(int r, Indices<R>) __attribute__((always_inline)) {
            const float* score = rows.score + r * TILE;
            float* values = rows.values + r * padded;
            if (r == 0) {
                apply_tile<T, R, true>(RowByRow{}, score, tile.value, ahead, rows.chunks, values);
            } else {
                apply_tile<T, R, false>(RowByRow{}, score, tile.value, ahead, rows.chunks, values);
            }
        });
    }
    for (int r = 0; r < rows.rows; ++r) {
        const float total = sum(load(rows.sum + r * LANES));
        if (whole) {
            const float all = sum_with_sink(step, heads, item.head, r, rows.max[r], total);
            store_activations<T>(rows.values + r * padded, rows.chunks,
                                 step.value_scale * UNIT<T> / all, step, address(step.output, r));
        } else {
            item.partial[rows.rows + r] = total;
        }
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
        sum = sum_with_sink(step, heads, items->head, r, most, sum);
        store_activations<T>(
            values, chunks, step.value_scale * UNIT<T> / sum, step,
            query_address(step, step.output, heads, items->head, request.first_token, r));
    }
}

// Floats of a thread's scratch and of one partial result.
DUO_INLINE int64_t decode_scratch_floats(int64_t rows, int padded) {
    return rows * (2 * padded + TILE + LANES + 1);
}
DUO_INLINE int64_t partial_floats(int64_t rows, int padded) { return rows * (padded + 2); }

}  // namespace
}  // namespace duo
