#include "step.h"

#include <algorithm>

#include "plan.h"
#include "threads.h"

namespace duo {
namespace {

// Bytes (or as costly work) below which a further thread costs more than it saves.
constexpr int64_t BYTES_PER_THREAD = 128 << 10;

int threads_for(int64_t bytes) {
    const int64_t useful = bytes / BYTES_PER_THREAD;
    return useful <= 1 ? 1 : static_cast<int>(std::min<int64_t>(useful, max_threads()));
}

void write(const LayerStep& step, const HeadClass& heads) {
    if (heads.num_heads == 0 || step.num_requests == 0) return;
    const Request& end = step.requests[step.num_requests - 1];
    const int64_t tokens = end.first_token + end.length;
    const int64_t token_bytes = row_bytes(step.dtype, step.head_size) * heads.num_heads;
    const int threads = threads_for(tokens * token_bytes);
    parallel(threads, [&](int thread) {
        write_tokens(step, heads, tokens * thread / threads, tokens * (thread + 1) / threads);
    });
}

// Puts the step's keys and values into the rows of a quantised class's cache, [T, Hkv, row_bytes].
// All who need them read these, the step's own queries too: what a query sees must not depend on
// what was in a cache already and what is not there yet. Two quantised classes share the rows.
void quantise(const LayerStep& step, const Kernels& kernels, LayerStep* steps) {
    thread_local Scratch scratch;
    if (step.num_requests == 0) return;
    const Request& end = step.requests[step.num_requests - 1];
    const int64_t tokens = end.first_token + end.length;
    const int64_t heads = step.classes[0].num_heads + step.classes[1].num_heads;
    const int64_t row = row_bytes(step.dtype, step.head_size);
    const int64_t bytes = tokens * heads * row;
    char* to =
        reinterpret_cast<char*>(scratch.floats(bytes / static_cast<int64_t>(sizeof(float)) + 1));
    const int threads = threads_for(bytes * 4);
    parallel(threads, [&](int thread) {
        kernels.quantise(step, static_cast<int>(heads), tokens * thread / threads,
                         tokens * (thread + 1) / threads, to);
    });
    for (int i = 0; i < 2; ++i) {
        if (steps[i].dtype != step.dtype) continue;
        steps[i].key = {to, heads * row, row};
        steps[i].value = {to + number_bytes(step.dtype, step.head_size), heads * row, row};
    }
}

// The step as each class meets it: in its cache's dtype, with keys and values to match. What a
// class computes does not depend on the other's dtype.
void split_by_class(const LayerStep& given, const Kernels& kernels, LayerStep* steps) {
    const LayerStep* quantised = nullptr;
    for (int i = 0; i < 2; ++i) {
        steps[i] = given;
        steps[i].dtype = given.classes[i].dtype;
        steps[i].ahead_to_first_level = kernels.ahead_to_first_level;
        // Only where the layer has scales do they count.
        if (!is_quantised(steps[i].dtype) || scale_bytes(steps[i].dtype)) {
            steps[i].key_scale = steps[i].value_scale = 1.0f;
        }
        if (given.classes[i].num_heads && is_quantised(steps[i].dtype)) quantised = &steps[i];
    }
    if (quantised) quantise(LayerStep(*quantised), kernels, steps);
}

void copy_all(const LayerStep& step, const std::vector<SnapshotCopy>& copies) {
    const HeadClass& heads = step.classes[1];
    if (copies.empty() || heads.num_heads == 0) return;
    const int threads = std::min(max_threads(), heads.num_heads);
    parallel(threads, [&](int thread) {
        const int first = heads.num_heads * thread / threads;
        const int last = heads.num_heads * (thread + 1) / threads;
        for (const SnapshotCopy& copy : copies) copy_snapshot(step, heads, copy, first, last);
    });
}

void attend(const LayerStep* steps, const Kernels& kernels, int first, int last) {
    // Of the calling thread: two threads may serve two engines of one process.
    thread_local Plan plan;
    thread_local Scratch scratch;
    plan.make(steps, kernels, first, last);
    if (plan.cost() == 0) return;
    const int threads = threads_for(plan.cost());
    const int64_t floats = apart(plan.thread_floats());
    float* base = scratch.floats(floats * threads);
    Plan& shared = plan;
    parallel(threads,
             [&](int thread) { shared.work(steps, kernels, threads, base + floats * thread); });
}

}  // namespace

void run_step(const LayerStep& given, const Kernels& kernels, unsigned phases, int first, int last,
              const std::vector<SnapshotCopy>& copies) {
    LayerStep steps[2];
    split_by_class(given, kernels, steps);
    if (phases & WRITE_RETRIEVAL) write(steps[0], given.classes[0]);
    if (phases & COPY_SNAPSHOTS) copy_all(steps[1], copies);
    if (phases & ATTEND) attend(steps, kernels, first, last);
    if (phases & WRITE_STREAMING) write(steps[1], given.classes[1]);
}

}  // namespace duo
