#include "dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

namespace duo {

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx_bf16;
extern const Kernels kernels_avx512_on_avx2;
extern const Kernels kernels_avx512_bf16_on_avx2;
extern const Kernels kernels_amx_bf16_on_avx2;

namespace {

struct Cpu {
    bool avx2 = false;
    bool avx512 = false;
    bool avx512_bf16 = false;
    bool amx_bf16 = false;
    bool amd = false;
};

// Registers that the operating system saves, as bits of XCR0.
uint64_t saved_registers() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

// Whether the operating system lets this process use tile registers: it has to be asked, since they
// make its threads' saved state larger. Refused where a signal stack is too small for that.
bool may_use_tiles() {
    constexpr long ask_for_state = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long tile_data = 18;
    return syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
}

Cpu detect() {
    Cpu cpu;
    uint32_t a, b, c, d;
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        cpu.amd = b == signature_AMD_ebx && d == signature_AMD_edx && c == signature_AMD_ecx;
    }
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    const bool fma = c & bit_FMA, f16c = c & bit_F16C, osxsave = c & bit_OSXSAVE;
    if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    const uint64_t saved = saved_registers();
    constexpr uint64_t ymm = 0x6, zmm = 0xe6;
    cpu.avx2 = fma && f16c && (b & bit_AVX2) && (saved & ymm) == ymm;
    constexpr uint32_t needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    cpu.avx512 = cpu.avx2 && (b & needed) == needed && (saved & zmm) == zmm;
    constexpr uint32_t tile_instructions = 1 << 22 | 1 << 24;  // AMX-BF16, AMX-TILE
    constexpr uint64_t tiles = 0x60000;
    const bool has_tiles = (d & tile_instructions) == tile_instructions && (saved & tiles) == tiles;
    if (!cpu.avx512 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return cpu;
    cpu.avx512_bf16 = a & bit_AVX512BF16;
    cpu.amx_bf16 = cpu.avx512_bf16 && has_tiles && may_use_tiles();
    return cpu;
}

}  // namespace

const std::vector<Variant>& variants() {
    static const std::vector<Variant> all = [] {
        const Cpu cpu = detect();
        return std::vector<Variant>{
            {&kernels_portable, true, true},
            // The wide variants' sources, for machines that lack their instructions: a test of
            // their logic.
            {&kernels_avx512_on_avx2, cpu.avx2, false},
            {&kernels_avx512_bf16_on_avx2, cpu.avx2, false},
            {&kernels_amx_bf16_on_avx2, cpu.avx2, false},
            {&kernels_avx2, cpu.avx2, true},
            {&kernels_avx512, cpu.avx512, true},
            // AMD's bf16 products take no longer than float32's and are twice as many (measured on
            // the fifth generation of EPYC). Intel's (Xeon, fifth generation) are no faster: there
            // by name.
            {&kernels_avx512_bf16, cpu.avx512_bf16, cpu.amd},
            {&kernels_amx_bf16, cpu.amx_bf16, true},
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
