// A variant with instructions for bf16: its own prefill of bf16 activations, with tile
// registers its own decode over bf16 caches too, all else of another one.
// The build compiles this file with DUO_VARIANT (its name), DUO_BASE (the other's), DUO_TILES
// (whether it uses tile registers) and DUO_LANES.
#if DUO_TILES
#include "decode_pairs.h"
#endif
#include "names.h"
#include "prefill_pairs.h"

namespace duo {

// Of variant.cpp.
namespace DUO_BASE {
DecodeItem decode;
PrefillItem prefill;
MergeItems merge;
QuantiseTokens quantise;
CountFloats decode_floats, prefill_floats, partials;
}  // namespace DUO_BASE

namespace {

#if DUO_TILES
void decode(const LayerStep& step, const Item& item, const Item* following, float* scratch) {
    if (!decode_pairs(step, item, following, scratch)) {
        DUO_BASE::decode(step, item, following, scratch);
    }
}

int64_t decode_floats(int64_t rows, int head_size) {
    const int64_t others = DUO_BASE::decode_floats(rows, head_size);
    const int64_t own = decode_pairs_floats(rows, head_chunks(head_size).padded());
    return own > others ? own : others;
}
#else
using DUO_BASE::decode;
using DUO_BASE::decode_floats;
#endif

void prefill(const LayerStep& step, const Item& item, float* scratch) {
    if (!prefill_pairs(step, item, scratch)) DUO_BASE::prefill(step, item, scratch);
}

int64_t prefill_floats(int64_t rows, int head_size) {
    const int64_t others = DUO_BASE::prefill_floats(rows, head_size);
    const int64_t own = pairs_scratch_floats(rows, head_chunks(head_size).padded());
    return own > others ? own : others;
}

}  // namespace

extern const Kernels DUO_SYMBOL_OF(DUO_VARIANT);
const Kernels DUO_SYMBOL_OF(DUO_VARIANT) = {
    .name = DUO_NAME_OF(DUO_VARIANT),
    .decode = decode,
    .prefill = prefill,
    .merge = DUO_BASE::merge,
    .quantise = DUO_BASE::quantise,
    .decode_scratch_floats = decode_floats,
    .prefill_scratch_floats = prefill_floats,
    .partial_floats = DUO_BASE::partials,
    .ahead_to_first_level = !DUO_TILES,
};

}  // namespace duo
