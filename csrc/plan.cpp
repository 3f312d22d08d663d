#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "locate.h"

namespace duo {

void Scratch::Free::operator()(float* data) const { std::free(data); }

float* Scratch::floats(int64_t count) {
    if (count > count_) {
        constexpr size_t alignment = APART_FLOATS * sizeof(float);
        const size_t bytes = static_cast<size_t>(apart(count)) * sizeof(float);
        data_.reset(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
        if (!data_) throw std::bad_alloc();
        count_ = count;
    }
    return data_.get();
}

void Plan::make(const LayerStep* steps, const Kernels& kernels, int first, int last) {
    items_.clear();
    partial_offset_.clear();
    partial_floats_ = thread_floats_ = cost_ = 0;
    for (int head_class = 0; head_class < 2; ++head_class) {
        const LayerStep& step = steps[head_class];
        if (step.classes[head_class].num_heads == 0) continue;
        for (int request = first; request < last; ++request) {
            if (step.requests[request].length == 0) continue;
            if (is_decoded(step.requests[request])) {
                add_decode(step, kernels, request, head_class);
            } else {
                add_prefill(step, kernels, request, head_class);
            }
        }
    }
    assign_partials();
    sort_by_cost();
    next_ = 0;
}

void Plan::add_decode(const LayerStep& step, const Kernels& kernels, int request, int head_class) {
    const HeadClass& heads = step.classes[head_class];
    const Request& at = step.requests[request];
    const int64_t keys = size(visible_ranges(heads, at.context, at.context + at.length - 1));
    const int64_t parts = (keys + KEYS_PER_ITEM - 1) / KEYS_PER_ITEM;
    const int64_t rows = at.length * step.group;
    // In bytes, with four operations as costly as a byte.
    const int64_t key_cost = step.head_size * (2 * element_bytes(step.dtype) + rows);
    const int64_t floats = apart(kernels.partial_floats(rows, step.head_size));
    thread_floats_ = std::max(thread_floats_, kernels.decode_scratch_floats(rows, step.head_size));
    for (int head = 0; head < heads.num_heads; ++head) {
        const auto group = static_cast<int32_t>(items_.size());
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = part * KEYS_PER_ITEM;
            const int64_t end = std::min(begin + KEYS_PER_ITEM, keys);
            items_.push_back({request, static_cast<int16_t>(head_class), static_cast<int16_t>(head),
                              begin, end, nullptr, group, static_cast<int32_t>(parts),
                              (end - begin) * key_cost});
            cost_ += items_.back().cost;
            partial_offset_.push_back(parts > 1 ? partial_floats_ : -1);
            if (parts > 1) partial_floats_ += floats;
        }
    }
}

void Plan::add_prefill(const LayerStep& step, const Kernels& kernels, int request, int head_class) {
    const HeadClass& heads = step.classes[head_class];
    const Request& at = step.requests[request];
    const int64_t tokens = std::max<int64_t>(ROWS_PER_ITEM / step.group, 1);
    thread_floats_ = std::max(thread_floats_,
                              kernels.prefill_scratch_floats(tokens * step.group, step.head_size));
    for (int head = 0; head < heads.num_heads; ++head) {
        for (int64_t begin = 0; begin < at.length; begin += tokens) {
            const int64_t end = std::min(begin + tokens, at.length);
            const int64_t keys =
                size(visible_ranges(heads, at.context + begin, at.context + end - 1));
            const int64_t cost = keys * step.head_size *
                                 (2 * element_bytes(step.dtype) + (end - begin) * step.group);
            const auto index = static_cast<int32_t>(items_.size());
            items_.push_back({request, static_cast<int16_t>(head_class), static_cast<int16_t>(head),
                              begin, end, nullptr, index, 1, cost});
            cost_ += cost;
            partial_offset_.push_back(-1);
        }
    }
}

void Plan::assign_partials() {
    if (partial_floats_ == 0) return;
    float* base = partials_.floats(partial_floats_);
    for (size_t i = 0; i < items_.size(); ++i) {
        if (partial_offset_[i] >= 0) items_[i].partial = base + partial_offset_[i];
    }
    if (done_size_ < items_.size()) {
        done_size_ = items_.size();
        done_ = std::make_unique<std::atomic<int>[]>(done_size_);
    }
    for (size_t i = 0; i < items_.size(); ++i) done_[i].store(0, std::memory_order_relaxed);
}

void Plan::sort_by_cost() {
    order_.resize(items_.size());
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<int32_t>(i);
    const auto costlier = [this](int32_t a, int32_t b) { return items_[a].cost > items_[b].cost; };
    if (!std::is_sorted(order_.begin(), order_.end(), costlier)) {
        std::sort(order_.begin(), order_.end(), costlier);
    }
}

void Plan::work(const LayerStep* steps, const Kernels& kernels, int threads, float* scratch) {
    const auto count = static_cast<int64_t>(items_.size());
    for (int64_t i = next_++; i < count;) {
        const Item& item = items_[order_[i]];
        const LayerStep& step = steps[item.head_class];
        if (!is_decoded(step.requests[item.request])) {
            kernels.prefill(step, item, scratch);
            i = next_++;
            continue;
        }
        // Taken early, the next item's first keys are on their way when it starts; not where that
        // would keep one of the last items from another thread.
        const bool early = next_.load(std::memory_order_relaxed) + threads - 1 < count;
        const int64_t following = early ? next_++ : count;
        const Item* next = following < count ? &items_[order_[following]] : nullptr;
        // An item knows where the keys of its own dtype lie.
        if (next && (!is_decoded(step.requests[next->request]) ||
                     steps[next->head_class].dtype != step.dtype)) {
            next = nullptr;
        }
        decode(steps, kernels, item, next, scratch);
        i = early ? following : next_++;
    }
}

void Plan::decode(const LayerStep* steps, const Kernels& kernels, const Item& item,
                  const Item* following, float* scratch) {
    const LayerStep& step = steps[item.head_class];
    kernels.decode(step, item, following, scratch);
    if (item.num_items == 1) return;
    // Whoever ends a request's and head's last item merges them.
    if (done_[item.first_item].fetch_add(1, std::memory_order_acq_rel) + 1 == item.num_items) {
        kernels.merge(step, &items_[item.first_item], item.num_items);
    }
}

}  // namespace duo
