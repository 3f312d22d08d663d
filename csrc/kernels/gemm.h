// The one multiplication of prefill: a few rows times a panel of PANEL columns, in registers.
#pragma once

#include "pack.h"

namespace duo {
namespace {

// Rows of a register block: with PANEL / LANES = 2 columns of vectors, all but a few registers hold
// sums. A portable machine has 16 short registers, AVX-512 has 32.
constexpr int BLOCK_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;

// Elements of the head that are summed in one run: the rounding errors of longer runs add up.
constexpr int SUM_ELEMENTS = 128;

// to[r] = (Add ? to[r] : 0) + sum over k of a[r * RowStride + k * StepStride] * b[k * PANEL ...].
template <int RowStride, int StepStride, bool Add>
DUO_INLINE void multiply_panel(const float* a, const float* b, int64_t count, float* to,
                               int64_t to_stride) {
    Vec total[BLOCK_ROWS][2] = {};
    for (int64_t k = 0; k < count; ++k) {
        const Vec b0 = load(b);
        const Vec b1 = load(b + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < BLOCK_ROWS; ++r) {
            const Vec x = broadcast(a[r * RowStride]);
            total[r][0] += x * b0;
            total[r][1] += x * b1;
        }
        a += StepStride;
        b += PANEL;
    }
#pragma GCC unroll 16
    for (int r = 0; r < BLOCK_ROWS; ++r) {
        float* row = to + r * to_stride;
        store(row, Add ? load(row) + total[r][0] : total[r][0]);
        store(row + LANES, Add ? load(row + LANES) + total[r][1] : total[r][1]);
    }
}

}  // namespace
}  // namespace duo
