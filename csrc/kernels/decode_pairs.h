// Decode over bf16 caches for KV heads with several query heads: keys are scored in tile registers,
// where they lie; weights and weighted values are as in decode.h. Queries stay bf16; scores,
// weights and sums are float32, so that nothing is rounded that decode.h does not round.
#pragma once

#include "decode.h"
#include "tiles.h"

namespace duo {
namespace {

static_assert(TILE == 2 * TILE_SIDE, "a tile of keys is scored in two tile registers");

// The most rows: query heads of a KV head, of all tokens of a chunk.
constexpr int MAX_PAIRS_ROWS = TILE_SIDE;
// The most chunks of a head, each of whose queries fill a register.
constexpr int MAX_PAIRS_CHUNKS = 4;

// Asks for the lines ahead, evenly while a tile of keys is scored, weighed and applied: the
// products of tile registers are done too soon to wait for memory in between. Into the second
// level, which has more lines on the way at a time.
struct LinesAhead {
    BlockLines upcoming;

    DUO_INLINE void lines(int count) {
        for (int i = 0; i < count; ++i) __builtin_prefetch(upcoming.next(), 0, 2);
    }

    // Half of a tile's lines: of each 32 elements of a key and a value, one.
    template <typename T>
    DUO_INLINE void chunk(int) {
        lines(1);
    }
};

// Columns of queries and scores: the item's rows, to a power of two; 0 where decode.h does better,
// or where registers do not reach.
DUO_INLINE int pairs_columns(const LayerStep& step, const Item& item) {
    const HeadChunks chunks = head_chunks(step.head_size);
    const int64_t rows = step.requests[item.request].length * step.group;
    // Scores are compared before they are scaled. With one row memory is the limit.
    if (step.dtype != Dtype::bf16 || !(step.scale > 0)) return 0;
    if (chunks.half || chunks.full > MAX_PAIRS_CHUNKS) return 0;
    if (rows < 2 || rows > MAX_PAIRS_ROWS) return 0;
    return rows <= 4 ? 4 : rows <= 8 ? 8 : 16;
}

// Scores: 0 and 1; keys: 2 and 3; queries: 4 to 7.
constexpr TileConfig pairs_config(int columns) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.set(i, {TILE_SIDE, columns});
    for (int i = 2; i < 4; ++i) config.set(i, {});
    return config;
}

// What this thread's registers are configured for, if its last item left them to the next.
thread_local int held_columns = 0;

template <int R>
class DecodePairs {
  public:
    DecodePairs(const LayerStep& step, const Item& item, float* scratch)
        : step_(step),
          item_(item),
          heads_(step.classes[item.head_class]),
          request_(step.requests[item.request]),
          chunks_(head_chunks(step.head_size)),
          padded_(chunks_.padded()),
          rows_(static_cast<int>(request_.length) * step.group),
          factor_(step.scale * LOG2E),
          score_(scratch),
          query_(score_ + 2 * TILE * R),
          staged_(reinterpret_cast<BFloat16*>(query_ + R * padded_ / 2)),
          values_(item.num_items == 1 ? reinterpret_cast<float*>(staged_ + TILE * padded_)
                                      : item.partial + 2 * rows_) {}

    void run(const Item* following) {
        static constexpr TileConfig config = pairs_config(R);
        const bool keep = following && pairs_columns(step_, *following) != 0;
        Tiles tiles(config, held_columns == R, keep);
        held_columns = keep ? R : 0;
        load_queries(tiles);
        std::memset(values_, 0, rows_ * padded_ * sizeof(float));

        // The next tile is scored before this one is weighed: whose turn it is never waits for
        // registers.
        KeyWalk walk = keys_of(step_, item_);
        KeyWalk others = keys_of(step_, following ? *following : item_);
        Keys ring[3], other;
        Keys* now = &ring[0];
        Keys* next = &ring[1];
        Keys* third = &ring[2];
        fill_tile(walk, *now);
        fill_tile(walk, *next);
        LinesAhead ahead{lines_of(next->count ? *next : *now)};
        score(tiles, *now, score_, ahead);
        for (int turn = 0; now->count; ++turn) {
            fill_tile(walk, *third);
            if (third->count) {
                ahead.upcoming = lines_of(*third);
            } else {
                others.fill(other);
                ahead.upcoming = lines_of(other.count ? other : *now);
            }
            if (next->count) score(tiles, *next, score_of(turn + 1), ahead);
            hide_keys(Strides{}, heads_, request_, step_.group, *now, rows_, score_of(turn));
            weigh(score_of(turn), ahead);
            apply(*now, score_of(turn), ahead);
            Keys* done = now;
            now = next;
            next = third;
            third = done;
        }
        finish();
    }

  private:
    using Keys = KeyBlock<BFloat16, TILE>;
    using Strides = ScoreStrides<1, R>;

    char* address(const Rows& tensor, int row) const {
        return query_address(step_, tensor, heads_, item_.head, request_.first_token, row);
    }

    float* score_of(int turn) const { return score_ + (turn & 1) * TILE * R; }

    BlockLines lines_of(const Keys& keys) const {
        return {keys, row_bytes(step_.dtype, step_.head_size)};
    }

    // [chunks, 16 pairs, R] to registers; columns without a row are 0.
    void load_queries(Tiles& tiles) {
        float* to = query_;
        for (int c = 0; c < chunks_.full; ++c, to += TILE_SIDE * R) {
            Vec row[R], column[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                if (r < rows_) {
                    const auto* from = reinterpret_cast<const BFloat16*>(address(step_.query, r));
                    row[r] = (Vec)load_pairs(from + c * CHUNK);
                } else {
                    row[r] = Vec{};
                }
            }
            rows_to_columns<R>(row, column);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) store(to + r * LANES, column[r]);
        }
        load_query<0>(tiles);
        load_query<1>(tiles);
        load_query<2>(tiles);
        load_query<3>(tiles);
    }

    template <int C>
    DUO_INLINE void load_query(Tiles& tiles) {
        if (C < chunks_.full) tiles.load<4 + C>(query_ + C * TILE_SIDE * R, R * sizeof(float));
    }

    // 16 keys as a register loads them.
    struct Side {
        const BFloat16* first;
        int64_t stride_bytes;
    };

    // Keys that do not lie at equal distances are copied together.
    DUO_INLINE Side side_of(const Keys& keys, int first) {
        const BFloat16* const* key = keys.key + first;
        const int64_t stride = key[1] - key[0];
        bool apart = false;
        if (keys.runs > 1 || keys.count < TILE) {
            for (int i = 2; i < TILE_SIDE; ++i) apart |= key[i] - key[0] != i * stride;
        }
        if (!apart) return {key[0], stride * static_cast<int64_t>(sizeof(BFloat16))};
        BFloat16* to = staged_ + first * padded_;
        for (int i = 0; i < TILE_SIDE; ++i) {
            for (int d = 0; d < padded_; d += CHUNK) {
                *reinterpret_cast<VecBitsAny*>(to + i * padded_ + d) = load_pairs(key[i] + d);
            }
        }
        return {to, padded_ * static_cast<int64_t>(sizeof(BFloat16))};
    }

    template <int C>
    DUO_INLINE void multiply(Tiles& tiles, Side one, Side two, LinesAhead& ahead) {
        if (C >= chunks_.full) return;
        tiles.load<2>(one.first + C * CHUNK, one.stride_bytes);
        tiles.multiply<0, 2, 4 + C>();
        tiles.load<3>(two.first + C * CHUNK, two.stride_bytes);
        tiles.multiply<1, 3, 4 + C>();
        ahead.lines(TILE / 2);
    }

    // [TILE, R], not scaled yet.
    void score(Tiles& tiles, const Keys& keys, float* to, LinesAhead& ahead) {
        const Side one = side_of(keys, 0);
        const Side two = side_of(keys, TILE_SIDE);
        tiles.zero<0>();
        tiles.zero<1>();
        multiply<0>(tiles, one, two, ahead);
        multiply<1>(tiles, one, two, ahead);
        multiply<2>(tiles, one, two, ahead);
        multiply<3>(tiles, one, two, ahead);
        tiles.store<0>(to, R * sizeof(float));
        tiles.store<1>(to + TILE_SIDE * R, R * sizeof(float));
    }

    // 0 for a row that has not seen any key yet: all its scores are -inf, and so are the
    // differences.
    DUO_INLINE Vec seen_max() const {
        return (Vec)((VecBits)max_ & (VecBits)(max_ != -__builtin_inff()));
    }

    // Scores become weights; where they pass a row's maximum, its sums follow. Lane i is of row i %
    // R.
    void weigh(float* score, LinesAhead& ahead) {
        Vec most = load(score);
        for (int i = LANES; i < TILE * R; i += LANES) most = max(most, load(score + i));
        if (any_greater(most, max_)) {
            const Vec before = max_;
            max_ = max(max_, max_of_rest<R>(most));
            const Vec decay = exp2_nonpositive((before - seen_max()) * factor_);
            sum_ *= decay;
            for (int r = 0; r < rows_; ++r) {
                float* values = values_ + r * padded_;
                for (int i = 0; i < padded_; i += LANES)
                    store(values + i, load(values + i) * decay[r]);
            }
        }
        const Vec base = seen_max() * factor_;
        for (int i = 0; i < TILE * R; i += LANES) {
            const Vec weight = exp2_nonpositive(load(score + i) * factor_ - base);
            store(score + i, weight);
            sum_ += weight;
            ahead.lines(TILE / 4 * chunks_.full / R);
        }
    }

    void apply(const Keys& keys, const float* weight, LinesAhead& ahead) {
        for_row_groups(rows_, [&]<int N>(int r, Indices<N>) __attribute__((always_inline)) {
            float* values = values_ + r * padded_;
            if (r == 0) {
                apply_tile<BFloat16, N, true>(Strides{}, weight, keys.value, ahead, chunks_,
                                              values);
            } else {
                apply_tile<BFloat16, N, false>(Strides{}, weight + r, keys.value, ahead, chunks_,
                                               values);
            }
        });
    }

    void finish() const {
        const Vec total = sum_of_rest<R>(sum_);
        for (int r = 0; r < rows_; ++r) {
            const float max = max_[r] * factor_;
            if (item_.num_items == 1) {
                const float all = sum_with_sink(step_, heads_, item_.head, r, max, total[r]);
                store_activations<BFloat16>(values_ + r * padded_, chunks_, 1.0f / all, step_,
                                            address(step_.output, r));
            } else {
                item_.partial[r] = max;
                item_.partial[rows_ + r] = total[r];
            }
        }
    }

    const LayerStep& step_;
    const Item& item_;
    const HeadClass& heads_;
    const Request& request_;
    const HeadChunks chunks_;
    const int padded_;
    const int rows_;
    const float factor_;      // of scores, so that their differences are exponents of 2
    float* const score_;      // [2, TILE, R], of two tiles in turns
    float* const query_;      // [chunks, 16 pairs of bf16, R]
    BFloat16* const staged_;  // [TILE, padded], keys that lie apart
    float* const values_;     // [rows, padded] in chunk order
    Vec max_ = broadcast(-__builtin_inff());
    Vec sum_{};
};

// Floats of a thread's scratch.
DUO_INLINE int64_t decode_pairs_floats(int64_t rows, int padded) {
    constexpr int most = MAX_PAIRS_ROWS;
    return 2 * TILE * most + most * padded / 2 + TILE * padded / 2 + rows * padded;
}

// Whether the item is one for these registers; if so, computes it.
DUO_INLINE bool decode_pairs(const LayerStep& step, const Item& item, const Item* following,
                             float* scratch) {
    switch (pairs_columns(step, item)) {
        case 4:
            DecodePairs<4>(step, item, scratch).run(following);
            return true;
        case 8:
            DecodePairs<8>(step, item, scratch).run(following);
            return true;
        case 16:
            DecodePairs<16>(step, item, scratch).run(following);
            return true;
        default:
            return false;
    }
}

}  // namespace
}  // namespace duo
