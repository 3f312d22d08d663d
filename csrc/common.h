// Plain data that the kernels, the planner and the binding share. No Python, no framework.
//
// Dimension letters: T tokens, B requests, Hq query heads, Hkv KV heads, D head size, N blocks,
// P tokens per block. Strides are in elements of the tensors' dtype.
#pragma once

#include <cstdint>

// Headers that variants of the kernels include define nothing that the linker could merge: the copy
// it keeps might use instructions of a variant that the machine lacks.
#define DUO_ALWAYS_INLINE static inline __attribute__((always_inline))

namespace duo {

constexpr int MAX_HEAD_SIZE = 512;

// Of activations the first three; of caches all. `scaled`: of each token and head, the keys' and
// the values' scale stand behind them as two floats.
enum class Dtype : int { f32, bf16, f16, e4m3, e5m2, scaled_e4m3, scaled_i8, scaled_i4 };

// [T, H, D] activations, last dimension contiguous.
struct Rows {
    char* data = nullptr;
    int64_t token_stride = 0;
    int64_t head_stride = 0;
};

// [N, H, P, row], keys before values, last dimension contiguous.
struct Cache {
    char* data = nullptr;
    int64_t block_stride = 0;
    int64_t head_stride = 0;
    int64_t slot_stride = 0;
    int64_t num_blocks = 0;
};

// [B, width] int32 block ids; 0 is the null block.
struct Table {
    const int32_t* blocks = nullptr;
    int64_t row_stride = 0;
    int64_t num_rows = 0;
    int64_t width = 0;
    int64_t block_size = 0;
};

// One request of the step: its context lies in the caches, its chunk in the activations.
struct Request {
    int64_t first_token;  // of the chunk, in the flat token order
    int64_t length;       // of the chunk, in tokens
    int64_t context;      // tokens before the chunk
};

// One class of KV heads of a layer. With `is_ring`, a query at position i sees key j iff j <= i and
// (j < sink or j > i - recent), and position p >= sink lives in slot sink + (p - sink) % ring;
// otherwise it sees all j <= i, and position p lives in slot p.
struct HeadClass {
    Dtype dtype = Dtype::f32;  // of the cache: that of the activations, or a quantised one
    Cache cache;
    Table table;
    const int32_t* heads = nullptr;  // KV heads of the layer, ascending
    int num_heads = 0;
    bool is_ring = false;
    int64_t sink = 0;
    int64_t recent = 0;
    int64_t ring = 0;
};

// One layer's work in one step; while it runs, as one class of heads meets it: two classes may keep
// their keys and values in different dtypes.
struct LayerStep {
    Dtype dtype;        // of the class's cache, and of keys and values once they are quantised
    Dtype activations;  // of queries and output, and of keys and values before
    int head_size;
    int group;  // query heads of a KV head
    Rows query, key, value, output;
    float scale;
    const float* sinks;  // [Hq] learned logits that have no key and no value; null: there are none
    float key_scale;     // of a quantised layer's keys; 1 where tokens have their own
    float value_scale;   // likewise
    const Request* requests;
    int num_requests;
    HeadClass classes[2];
    bool ahead_to_first_level;  // as of the kernels
};

DUO_ALWAYS_INLINE constexpr bool is_quantised(Dtype dtype) { return dtype >= Dtype::e4m3; }

DUO_ALWAYS_INLINE constexpr int64_t element_bytes(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : is_quantised(dtype) ? 1 : 2;
}

// Bytes of a token's and head's scales.
DUO_ALWAYS_INLINE constexpr int64_t scale_bytes(Dtype dtype) {
    return dtype >= Dtype::scaled_e4m3 ? 2 * sizeof(float) : 0;
}

// Bytes of a token's keys, or of its values, in one head.
DUO_ALWAYS_INLINE constexpr int64_t number_bytes(Dtype dtype, int64_t head_size) {
    return dtype == Dtype::scaled_i4 ? head_size / 2 : head_size * element_bytes(dtype);
}

// Bytes of a token's keys, values and scales in one head.
DUO_ALWAYS_INLINE constexpr int64_t row_bytes(Dtype dtype, int64_t head_size) {
    return 2 * number_bytes(dtype, head_size) + scale_bytes(dtype);
}

// A piece of attention that one thread computes alone.
struct Item {
    int32_t request;
    int16_t head_class;
    int16_t head;   // index within the class
    int64_t begin;  // decode: visible keys; prefill: tokens of the chunk
    int64_t end;
    float* partial;      // decode: where an item that is one of several leaves its result
    int32_t first_item;  // of the same request and head
    int32_t num_items;   // of the same request and head
    int64_t cost;        // relative
};

}  // namespace duo
