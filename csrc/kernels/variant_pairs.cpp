// A variant with instructions for bf16: its own prefill over bf16 caches, all else of another one.
// The build compiles this file with DUO_VARIANT (its name), DUO_BASE (the other's), DUO_TILES
// (whether it uses tile registers) and DUO_LANES.
#include "names.h"
#include "prefill_pairs.h"

namespace duo {

extern const Kernels DUO_SYMBOL_OF(DUO_BASE);

namespace {

const Kernels& base = DUO_SYMBOL_OF(DUO_BASE);

void decode(const LayerStep& step, const Item& item, const Item* following, float* scratch) {
    base.decode(step, item, following, scratch);
}

void prefill(const LayerStep& step, const Item& item, float* scratch) {
    // Scores are compared before they are scaled.
    if (step.dtype == Dtype::bf16 && step.scale > 0) {
        PrefillPairs(step, item, scratch).run();
    } else {
        base.prefill(step, item, scratch);
    }
}

void merge(const LayerStep& step, const Item* items, int count) { base.merge(step, items, count); }

void quantise(const LayerStep& step, int heads, int64_t first, int64_t last, char* to) {
    base.quantise(step, heads, first, last, to);
}

int64_t decode_floats(int64_t rows, int head_size) {
    return base.decode_scratch_floats(rows, head_size);
}

int64_t prefill_floats(int64_t rows, int head_size) {
    const int64_t others = base.prefill_scratch_floats(rows, head_size);
    const int64_t own = pairs_scratch_floats(rows, head_chunks(head_size).padded());
    return own > others ? own : others;
}

int64_t partials(int64_t rows, int head_size) { return base.partial_floats(rows, head_size); }

}  // namespace

extern const Kernels DUO_SYMBOL_OF(DUO_VARIANT);
const Kernels DUO_SYMBOL_OF(DUO_VARIANT) = {
    DUO_NAME_OF(DUO_VARIANT), decode,   prefill, merge, quantise, decode_floats,
    prefill_floats,           partials,
};

}  // namespace duo
