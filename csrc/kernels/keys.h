// Pointers to the keys and values of consecutive visible positions.
#pragma once

#include "../locate.h"
#include "elements.h"

namespace duo {
namespace {

template <typename T, int Size>
struct KeyBlock {
    const T* key[Size];
    const T* value[Size];
    int64_t position[Size];
    int count;
    int runs;
    int run_end[Size];  // the place behind each run

    // The first `keys` of a run, the first at position `begin`, go to the places from `place` on.
    DUO_INLINE void put(int place, const KeyRun& run, int64_t begin, int keys) {
        for (int i = 0; i < keys; ++i, ++place) {
            key[place] = reinterpret_cast<const T*>(run.key + i * run.key_stride_bytes);
            value[place] = reinterpret_cast<const T*>(run.value + i * run.value_stride_bytes);
            position[place] = begin + i;
        }
    }
};

// Where the keys of one request and KV head lie.
struct KeySource {
    const LayerStep& step;
    const HeadClass& heads;
    const Request& request;
    int head;
    int64_t row;

    // The run that starts at `begin` and ends at `end` or sooner.
    KeyRun run(int64_t begin, int64_t end) const {
        return locate(step, heads, head, request, row, begin, end);
    }

    // Appends the positions [begin, end) to a block that has room for them.
    template <typename T, int Size>
    void append(KeyBlock<T, Size>& block, int64_t begin, int64_t end) const {
        int n = block.count;
        while (begin < end) {
            const KeyRun found = run(begin, end);
            const int count = static_cast<int>(found.count);
            block.put(n, found, begin, count);
            begin += count;
            n += count;
        }
        block.count = n;
    }
};

// The visible keys number `begin`, `begin` + 1, ... up to `end` of one request and KV head, block
// by block.
class KeyWalk {
  public:
    KeyWalk(const KeySource& source, int64_t begin, int64_t end) : source_(source) {
        const Request& request = source.request;
        const int64_t last = request.context + request.length - 1;
        const VisibleRanges ranges = visible_ranges(source.heads, request.context, last);
        const int64_t first = ranges.end[0] - ranges.begin[0];
        const int64_t skipped = ranges.begin[1] - first;
        if (begin < first) {
            at_ = begin;
            end_ = end < first ? end : first;
        } else {
            at_ = begin + skipped;
            end_ = end + skipped;
        }
        if (begin < first && end > first) {
            then_begin_ = ranges.begin[1];
            then_end_ = end + skipped;
        }
    }

    // Fills a block; its count falls below Size at the end alone.
    template <typename T, int Size>
    void fill(KeyBlock<T, Size>& block) {
        int n = 0;
        block.runs = 0;
        while (n < Size && next_run()) {
            ++block.runs;
            const int64_t room = Size - n;
            const int count = static_cast<int>(run_.count < room ? run_.count : room);
            block.put(n, run_, at_, count);
            run_.key += count * run_.key_stride_bytes;
            run_.value += count * run_.value_stride_bytes;
            run_.count -= count;
            at_ += count;
            n += count;
            block.run_end[block.runs - 1] = n;
        }
        block.count = n;
    }

  private:
    // Whether a key is left; if so, `run_` starts with it.
    bool next_run() {
        if (run_.count) return true;
        if (at_ == end_) {
            at_ = then_begin_;
            end_ = then_end_;
            then_begin_ = then_end_;
        }
        if (at_ == end_) return false;
        run_ = source_.run(at_, end_);
        return true;
    }

    KeySource source_;
    int64_t at_ = 0;
    int64_t end_ = 0;
    int64_t then_begin_ = 0;
    int64_t then_end_ = 0;
    KeyRun run_{};
};

// The memory lines of a block's keys and values, run after run; then what follows the last one.
class BlockLines {
  public:
    // `row_bytes`: from a key to the next one of a run, with its value between.
    template <typename T, int Size>
    DUO_INLINE BlockLines(const KeyBlock<T, Size>& block, int64_t row_bytes)
        : key_(reinterpret_cast<const char* const*>(block.key)),
          run_end_(block.run_end),
          runs_(block.runs),
          row_bytes_(row_bytes) {
        if (runs_) next_run();
    }

    DUO_INLINE const char* next() {
        const char* line = at_;
        at_ += 64;
        if (at_ >= end_ && run_ < runs_) next_run();
        return line;
    }

  private:
    DUO_INLINE void next_run() {
        at_ = key_[place_];
        end_ = at_ + (run_end_[run_] - place_) * row_bytes_;
        place_ = run_end_[run_++];
    }

    const char* const* key_;
    const int* run_end_;
    int runs_;
    int64_t row_bytes_;
    const char* at_ = nullptr;
    const char* end_ = nullptr;
    int run_ = 0;
    int place_ = 0;
};

// Scales of a token's keys and values, which follow its values.
struct Scales {
    float key, value;
};

// `bytes`: of the value's numbers.
DUO_INLINE Scales load_scales(const void* value, int64_t bytes) {
    Scales scales;
    std::memcpy(&scales, static_cast<const char*>(value) + bytes, sizeof(scales));
    return scales;
}

// Those of the first `count` tokens of a block, to arrays of their own.
template <typename T, int Size>
DUO_INLINE void load_scales(const KeyBlock<T, Size>& block, int count, int64_t bytes, float* key,
                            float* value) {
    for (int k = 0; k < count; ++k) {
        const Scales own = load_scales(block.value[k], bytes);
        key[k] = own.key;
        value[k] = own.value;
    }
}

// The rule.
DUO_INLINE bool sees(const HeadClass& heads, int64_t position, int64_t key) {
    return key <= position && (!heads.is_ring || key < heads.sink || key > position - heads.recent);
}

}  // namespace
}  // namespace duo
