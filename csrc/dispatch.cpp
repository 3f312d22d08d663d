#include "dispatch.h"

#include <cpuid.h>

#include <cstdlib>
#include <stdexcept>

namespace duo {

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_on_avx2;

namespace {

struct Cpu {
    bool avx2 = false;
    bool avx512 = false;
};

// Registers that the operating system saves, as bits of XCR0.
uint64_t saved_registers() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

Cpu detect() {
    Cpu cpu;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    const bool fma = c & bit_FMA, f16c = c & bit_F16C, osxsave = c & bit_OSXSAVE;
    if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    const uint64_t saved = saved_registers();
    constexpr uint64_t ymm = 0x6, zmm = 0xe6;
    cpu.avx2 = fma && f16c && (b & bit_AVX2) && (saved & ymm) == ymm;
    constexpr uint32_t needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    cpu.avx512 = cpu.avx2 && (b & needed) == needed && (saved & zmm) == zmm;
    return cpu;
}

}  // namespace

const std::vector<Variant>& variants() {
    static const std::vector<Variant> all = [] {
        const Cpu cpu = detect();
        return std::vector<Variant>{
            {&kernels_portable, true, true},
            // The wide variant's source, for machines that lack its instructions: a test of its
            // logic.
            {&kernels_avx512_on_avx2, cpu.avx2, false},
            {&kernels_avx2, cpu.avx2, true},
            // Until the tests have run on a machine that has it, it must be asked for by name.
            {&kernels_avx512, cpu.avx512, false},
        };
    }();
    return all;
}

const Kernels& kernels_named(const std::string& name) {
    std::string known;
    for (const Variant& variant : variants()) {
        if (name == variant.kernels->name) {
            if (variant.supported) return *variant.kernels;
            throw std::runtime_error("VLLM_DUO_CPU_ISA=" + name +
                                     ": this machine lacks its instructions");
        }
        known += std::string(known.empty() ? "" : ", ") + variant.kernels->name;
    }
    throw std::runtime_error("VLLM_DUO_CPU_ISA=" + name + " is unknown: use one of " + known);
}

const Kernels& best_kernels() {
    const char* forced = std::getenv("VLLM_DUO_CPU_ISA");
    if (forced && *forced) return kernels_named(forced);
    const Kernels* best = nullptr;
    for (const Variant& variant : variants()) {
        if (variant.supported && variant.automatic) best = variant.kernels;
    }
    return *best;
}

}  // namespace duo
