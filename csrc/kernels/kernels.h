// What each compiled variant of the kernels offers.
#pragma once

#include "../common.h"

namespace duo {

struct Kernels {
    const char* name;
    // Computes an item; `scratch` holds scratch_floats(...) floats, aligned to 64 bytes.
    // `following`: the item that this thread decodes next, or null; its first keys are asked for.
    void (*decode)(const LayerStep& step, const Item& item, const Item* following, float* scratch);
    void (*prefill)(const LayerStep& step, const Item& item, float* scratch);
    // Merges the partial results of one request and head into the output.
    void (*merge)(const LayerStep& step, const Item* items, int count);
    // Quantises keys and values of the tokens [first, last) to rows of [T, heads, row_bytes].
    void (*quantise)(const LayerStep& step, int heads, int64_t first, int64_t last, char* to);
    int64_t (*decode_scratch_floats)(int64_t rows, int head_size);
    int64_t (*prefill_scratch_floats)(int64_t rows, int head_size);
    int64_t (*partial_floats)(int64_t rows, int head_size);
};

}  // namespace duo
