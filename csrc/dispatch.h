// Which variant of the kernels runs here.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace duo {

struct Variant {
    const Kernels* kernels;
    bool supported;  // by this machine and its operating system
    bool automatic;  // may be chosen without being asked for
};

// From the least to the most demanding.
const std::vector<Variant>& variants();

// The best variant that this machine supports, or the one that VLLM_DUO_CPU_ISA names.
// Throws std::runtime_error where that is unknown or not supported here.
const Kernels& best_kernels();

// The variant of that name; throws like best_kernels.
const Kernels& kernels_named(const std::string& name);

}  // namespace duo
