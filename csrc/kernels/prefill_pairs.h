// Prefill of bf16 activations in bf16 products: like prefill.h, but keys, values, queries and
// weights stay bf16 and only scores, sums and outputs are float32. Quantised keys and values become
// bf16 without their scales, which is exact; scores and weights are scaled in float32.
#pragma once

#include "prefill_pairs_blocks.h"

namespace duo {
namespace {

template <typename T>
struct PrefillPairsItem : PrefillPairs {
    using Keys = KeyBlock<T, PAIR_TILE_KEYS>;

    PrefillPairsItem(const LayerStep& s, const Item& item, float* base)
        : PrefillPairs(s, item, IS_ROTATED<T> ? PairsScratch::MOST_PARTS : 1, UNIT<T>, base) {}

    // Missing keys and values become 0, so that nothing unwritten is ever multiplied.
    void pack_keys(const Keys& keys, int whole) {
        for (int first = 0; first < whole; first += TILE_SIDE) {
            uint32_t* to = scratch.key + first / TILE_SIDE * chunks.all() * TILE_WORDS;
            for (int c = 0; c < chunks.all(); ++c, to += TILE_WORDS) {
                Vec x[TILE_SIDE];
#pragma GCC unroll 16
                for (int i = 0; i < TILE_SIDE; ++i) {
                    x[i] = first + i < keys.count
                               ? (Vec)load_any_pairs(keys.key[first + i], c, chunks)
                               : Vec{};
                }
                transpose(x);
#pragma GCC unroll 16
                for (int i = 0; i < TILE_SIDE; ++i) {
                    *reinterpret_cast<Vec*>(to + i * TILE_SIDE) = x[i];
                }
            }
        }
    }

    void pack_values(const Keys& keys, int whole) {
        for (int k = 0; k < whole; k += 2) {
            uint32_t* to = scratch.value + k / 2 * TILE_SIDE;
            for (int c = 0; c < chunks.all(); ++c, to += 2 * HALF_WORDS) {
                const auto row = [&](int i) __attribute__((always_inline)) {
                    return i < keys.count ? load_any_pairs(keys.value[i], c, chunks) : Pairs{};
                };
                const RowPairs x = pair_rows(row(k), row(k + 1));
                *reinterpret_cast<Pairs*>(to) = x.even;
                *reinterpret_cast<Pairs*>(to + HALF_WORDS) = x.odd;
            }
        }
    }

    void add_tile(int64_t begin, int64_t end, bool recent) {
        Keys keys;
        keys.count = 0;
        source.append(keys, begin, end);
        const int whole = widened({0, keys.count}, TILE_DEPTH).high;
        pack_keys(keys, whole);
        pack_values(keys, whole);
        const bool scaled = IS_QUANTISED<T> && scale_bytes(step.dtype);
        PairsScales scales;
        if (scaled) {
            load_scales(keys, keys.count, number_bytes(step.dtype, step.head_size), scales.key,
                        scales.value);
        }
        for (int r = 0; r < rows; r += BLOCK_SIDE) {
            add_block(r, begin, keys.count, recent, scaled ? &scales : nullptr);
        }
    }

    // Sums are in the chunk order of bf16, and of what is rotated.
    void store_output(int row, float own_factor) {
        const float* from = scratch.output + int64_t{row} * padded;
        char* to = address(step.output, row);
        if constexpr (IS_ROTATED<T>) {
            store_activations<T>(from, chunks, own_factor, step, to);
        } else {
            store_row(from, chunks, own_factor, reinterpret_cast<BFloat16*>(to));
        }
    }

    void run() {
        load_queries();
        for_tiles(PAIR_TILE_KEYS,
                  [&](int64_t begin, int64_t end, bool recent) { add_tile(begin, end, recent); });
        for (int r = 0; r < rows; ++r) {
            const float total = with_sink(r, scratch.base[r], sum(load(scratch.sum + r * LANES)));
            store_output(r, step.value_scale * UNIT<T> / total);
        }
    }
};

// Whether the item is one for these products; if so, computes it.
DUO_INLINE bool prefill_pairs(const LayerStep& step, const Item& item, float* scratch) {
    // Scores are compared before they are scaled.
    if (step.activations != Dtype::bf16 || !(step.scale * step.key_scale > 0)) return false;
    switch (step.dtype) {
        case Dtype::bf16:
            PrefillPairsItem<BFloat16>(step, item, scratch).run();
            return true;
        case Dtype::e4m3:
        case Dtype::scaled_e4m3:
            PrefillPairsItem<Float8E4M3>(step, item, scratch).run();
            return true;
        case Dtype::e5m2:
            PrefillPairsItem<Float8E5M2>(step, item, scratch).run();
            return true;
        case Dtype::scaled_i8:
            PrefillPairsItem<Int8>(step, item, scratch).run();
            return true;
        case Dtype::scaled_i4:
            PrefillPairsItem<Int4Pair>(step, item, scratch).run();
            return true;
        default:
            return false;
    }
}

}  // namespace
}  // namespace duo
