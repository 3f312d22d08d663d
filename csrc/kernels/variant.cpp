// One variant of the kernels. The build compiles this file once for each instruction set, with
// DUO_VARIANT (its name) and DUO_LANES (floats in a vector).
#include "decode.h"
#include "names.h"
#include "prefill.h"
#include "quantise.h"

namespace duo {
namespace {

// Calls function<T>(...) for the caches' dtype.
#define DUO_BY_DTYPE(function, ...)                   \
    switch (step.dtype) {                             \
        case Dtype::f32:                              \
            return function<float>(__VA_ARGS__);      \
        case Dtype::bf16:                             \
            return function<BFloat16>(__VA_ARGS__);   \
        case Dtype::f16:                              \
            return function<Float16>(__VA_ARGS__);    \
        case Dtype::e4m3:                             \
        case Dtype::scaled_e4m3:                      \
            return function<Float8E4M3>(__VA_ARGS__); \
        case Dtype::e5m2:                             \
            return function<Float8E5M2>(__VA_ARGS__); \
        case Dtype::scaled_i8:                        \
            return function<Int8>(__VA_ARGS__);       \
        case Dtype::scaled_i4:                        \
            return function<Int4Pair>(__VA_ARGS__);   \
    }

}  // namespace

// In a namespace of its own: variant_pairs.cpp takes most of them from here.
namespace DUO_VARIANT {

void decode(const LayerStep& step, const Item& item, const Item* following, float* scratch) {
    DUO_BY_DTYPE(decode_item, step, item, following, scratch)
}

void prefill(const LayerStep& step, const Item& item, float* scratch) {
    DUO_BY_DTYPE(prefill_item, step, item, scratch)
}

void merge(const LayerStep& step, const Item* items, int count) {
    DUO_BY_DTYPE(merge_items, step, items, count)
}

void quantise(const LayerStep& step, int heads, int64_t first, int64_t last, char* to) {
    quantise_tokens(step, heads, first, last, to);
}

int64_t decode_floats(int64_t rows, int head_size) {
    return decode_scratch_floats(rows, head_chunks(head_size).padded());
}

int64_t prefill_floats(int64_t rows, int head_size) {
    return prefill_scratch_floats(rows, head_chunks(head_size).padded());
}

int64_t partials(int64_t rows, int head_size) {
    return partial_floats(rows, head_chunks(head_size).padded());
}

}  // namespace DUO_VARIANT

extern const Kernels DUO_SYMBOL_OF(DUO_VARIANT);
const Kernels DUO_SYMBOL_OF(DUO_VARIANT) = {
    .name = DUO_NAME_OF(DUO_VARIANT),
    .decode = DUO_VARIANT::decode,
    .prefill = DUO_VARIANT::prefill,
    .merge = DUO_VARIANT::merge,
    .quantise = DUO_VARIANT::quantise,
    .decode_scratch_floats = DUO_VARIANT::decode_floats,
    .prefill_scratch_floats = DUO_VARIANT::prefill_floats,
    .partial_floats = DUO_VARIANT::partials,
    .ahead_to_first_level = DUO_LANES < 16,
};

}  // namespace duo
