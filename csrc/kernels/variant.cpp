// One variant of the kernels. The build compiles this file once for each instruction set, with
// DUO_VARIANT (its name) and DUO_LANES (floats in a vector).
#include "decode.h"
#include "kernels.h"
#include "prefill.h"

namespace duo {
namespace {

// Calls Template<T> for the caches' dtype.
#define DUO_BY_DTYPE(function)                              \
    switch (step.dtype) {                                   \
        case Dtype::f32:                                    \
            return function<float>(step, item, scratch);    \
        case Dtype::bf16:                                   \
            return function<BFloat16>(step, item, scratch); \
        case Dtype::f16:                                    \
            return function<Float16>(step, item, scratch);  \
    }

void decode(const LayerStep& step, const Item& item, float* scratch) { DUO_BY_DTYPE(decode_item) }

void prefill(const LayerStep& step, const Item& item, float* scratch) { DUO_BY_DTYPE(prefill_item) }

void merge(const LayerStep& step, const Item* items, int count) {
    switch (step.dtype) {
        case Dtype::f32:
            return merge_items<float>(step, items, count);
        case Dtype::bf16:
            return merge_items<BFloat16>(step, items, count);
        case Dtype::f16:
            return merge_items<Float16>(step, items, count);
    }
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

#define DUO_STRING(x) #x
#define DUO_NAME_OF(x) DUO_STRING(x)
#define DUO_JOIN(a, b) a##b
#define DUO_SYMBOL_OF(x) DUO_JOIN(kernels_, x)

}  // namespace

extern const Kernels DUO_SYMBOL_OF(DUO_VARIANT);
const Kernels DUO_SYMBOL_OF(DUO_VARIANT) = {
    DUO_NAME_OF(DUO_VARIANT), decode, prefill, merge, decode_floats, prefill_floats, partials,
};

}  // namespace duo
