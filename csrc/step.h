// One layer's work in one step, in the order that makes it correct.
#pragma once

#include <vector>

#include "kernels/kernels.h"
#include "write.h"

namespace duo {

enum Phase : unsigned {
    WRITE_RETRIEVAL = 1,
    COPY_SNAPSHOTS = 2,
    ATTEND = 4,
    WRITE_STREAMING = 8,
};

// Runs the phases in the order of their values. A request may resume at blocks that another one
// fills in this same step, so retrieval blocks and snapshots are written before anybody reads; the
// ring is written last, since a chunk's first queries see keys that its last tokens overwrite.
// `first` and `last`: the requests that attend. `step.dtype` is not read: each class has its own.
void run_step(const LayerStep& step, const Kernels& kernels, unsigned phases, int first, int last,
              const std::vector<SnapshotCopy>& copies);

}  // namespace duo
