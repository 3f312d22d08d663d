// What each compiled variant of the kernels offers.
#pragma once

#include "../common.h"

namespace duo {

// Computes an item; `scratch` holds scratch_floats(...) floats, aligned to 64 bytes.
// `following`: the item that this thread decodes next, or null; its first keys are asked for.
using DecodeItem = void(const LayerStep& step, const Item& item, const Item* following,
                        float* scratch);
using PrefillItem = void(const LayerStep& step, const Item& item, float* scratch);
// Merges the partial results of one request and head into the output.
using MergeItems = void(const LayerStep& step, const Item* items, int count);
// Quantises keys and values of the tokens [first, last) to rows of [T, heads, row_bytes]; those of
// the classes whose caches have the step's dtype.
using QuantiseTokens = void(const LayerStep& step, int heads, int64_t first, int64_t last,
                            char* to);
using CountFloats = int64_t(int64_t rows, int head_size);

struct Kernels {
    const char* name;
    DecodeItem* decode;
    PrefillItem* prefill;
    MergeItems* merge;
    QuantiseTokens* quantise;
    CountFloats* decode_scratch_floats;
    CountFloats* prefill_scratch_floats;
    CountFloats* partial_floats;
    // Where decode has keys brought that it needs soon: into the first-level cache, or the second.
    bool ahead_to_first_level;
};

}  // namespace duo
