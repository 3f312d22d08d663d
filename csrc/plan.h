// Cuts a step's attention into items for the threads' queue.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels/kernels.h"

namespace duo {

// Chunks of up to so many tokens are decoded, longer ones prefilled.
constexpr int64_t MAX_DECODE_TOKENS = 8;
constexpr bool is_decoded(const Request& request) { return request.length <= MAX_DECODE_TOKENS; }

// Visible keys of a decode item. A constant, so that a request's result depends neither on the
// number of threads nor on the rest of the batch.
constexpr int64_t KEYS_PER_ITEM = 512;

// Query rows (tokens times query heads of a KV head) of a prefill item.
constexpr int64_t ROWS_PER_ITEM = 512;

// What threads write at the same time lies this far apart, two lines of cache: processors fetch
// pairs.
constexpr int64_t APART_FLOATS = 32;

constexpr int64_t apart(int64_t floats) {
    return (floats + APART_FLOATS - 1) / APART_FLOATS * APART_FLOATS;
}

// Memory that only grows, aligned for vectors.
class Scratch {
  public:
    float* floats(int64_t count);

  private:
    struct Free {
        void operator()(float* data) const;
    };
    std::unique_ptr<float, Free> data_;
    int64_t count_ = 0;
};

// Items of a step, most costly first in `order`; reused from step to step.
class Plan {
  public:
    // Plans the attention of requests [first, last). `steps`: the step as each class meets it, here
    // and below.
    void make(const LayerStep* steps, const Kernels& kernels, int first, int last);

    int64_t cost() const { return cost_; }
    int64_t thread_floats() const { return thread_floats_; }

    // Computes items until none is left; for each of so many threads, with thread_floats() floats
    // of its own.
    void work(const LayerStep* steps, const Kernels& kernels, int threads, float* scratch);

  private:
    void add_decode(const LayerStep& step, const Kernels& kernels, int request, int head_class);
    void add_prefill(const LayerStep& step, const Kernels& kernels, int request, int head_class);
    void decode(const LayerStep* steps, const Kernels& kernels, const Item& item,
                const Item* following, float* scratch);
    void assign_partials();
    void sort_by_cost();

    std::vector<Item> items_;
    std::vector<int64_t> partial_offset_;  // of each item, -1 where it has none
    std::vector<int32_t> order_;
    std::unique_ptr<std::atomic<int>[]> done_;  // of an item's group, at its first item
    size_t done_size_ = 0;
    std::atomic<int64_t> next_ = 0;
    Scratch partials_;
    int64_t partial_floats_ = 0;
    int64_t thread_floats_ = 0;
    int64_t cost_ = 0;
};

}  // namespace duo
