// Copies of keys and values: into the caches, and to and from snapshots.
#pragma once

#include "common.h"

namespace duo {

// Writes the step's tokens [first, last) of the flat order into a class's cache, where a later
// query can see them.
void write_tokens(const LayerStep& step, const HeadClass& heads, int64_t first, int64_t last);

struct SnapshotCopy {
    bool store;          // to the snapshot, else from it
    int row;             // request
    int64_t num_tokens;  // of the state
    const int64_t* blocks;
    int64_t num_blocks;
};

// One copy, for the heads [first, last) of the class.
void copy_snapshot(const LayerStep& step, const HeadClass& heads, const SnapshotCopy& copy,
                   int first, int last);

}  // namespace duo
