// AMX' tile registers: each 16 rows of 64 bytes. Where the variant is compiled without
// AMX they are plain memory, so that the logic around them is tested on every machine.
#pragma once

#include "pairs.h"

namespace duo {
namespace {

constexpr int TILE_SIDE = 16;
constexpr int TILE_WORDS = TILE_SIDE * TILE_SIDE;
constexpr int64_t TILE_ROW_BYTES = TILE_SIDE * sizeof(uint32_t);

struct TileShape {
    int rows = TILE_SIDE;
    int words = TILE_SIDE;  // of a row
};

// What the registers are configured with, as the processor reads it.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    constexpr void set(int tile, TileShape shape) {
        row_bytes[tile] = static_cast<uint16_t>(shape.words * sizeof(uint32_t));
        rows[tile] = static_cast<uint8_t>(shape.rows);
    }
};

constexpr TileConfig whole_tiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.set(i, {});
    return config;
}
constexpr TileConfig WHOLE_TILES = whole_tiles();

// The registers of this thread while it lives. They are given back at the end: whoever else uses
// them wants his own shapes, and the operating system would have to save them. Configuring them
// takes as long as scoring some forty keys, so that those who follow each other on one thread may
// keep them.
class Tiles {
  public:
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    DUO_INLINE Tiles() : Tiles(WHOLE_TILES, false, false) {}

#if defined(__AMX_BF16__)
    // `configured`: this thread's last ones had this very configuration, and `keep`.
    DUO_INLINE Tiles(const TileConfig& config, bool configured, bool keep) : keep_(keep) {
        if (!configured) __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }

    DUO_INLINE ~Tiles() {
        if (!keep_) __asm__ volatile("tilerelease");
    }

    // Written out: the compiler's own ones take literal numbers alone, and do not tell it that they
    // read memory.
    template <int I>
    DUO_INLINE void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(I));
    }

    template <int I>
    DUO_INLINE void load(const void* from, int64_t stride_bytes) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(I)
                         : "memory");
    }

    // Lines that are not in the first-level cache do not displace others there.
    template <int I>
    DUO_INLINE void load_once(const void* from, int64_t stride_bytes) {
        __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(I)
                         : "memory");
    }

    template <int I>
    DUO_INLINE void store(void* to, int64_t stride_bytes) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(I)
                         : "memory");
    }

    // C += A * B: A's rows of consecutive elements, B's rows of pairs of two rows' elements.
    template <int C, int A, int B>
    DUO_INLINE void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }

  private:
    const bool keep_;
#else
    Tiles(const TileConfig& config, bool, bool) : config_(config) {}

    template <int I>
    void zero() {
        std::memset(words_[I], 0, sizeof(words_[I]));
    }

    // What a shape leaves out is 0.
    template <int I>
    void load(const void* from, int64_t stride_bytes) {
        zero<I>();
        for (int r = 0; r < config_.rows[I]; ++r) {
            std::memcpy(words_[I][r], static_cast<const char*>(from) + r * stride_bytes,
                        config_.row_bytes[I]);
        }
    }

    template <int I>
    void load_once(const void* from, int64_t stride_bytes) {
        load<I>(from, stride_bytes);
    }

    template <int I>
    void store(void* to, int64_t stride_bytes) {
        for (int r = 0; r < config_.rows[I]; ++r) {
            std::memcpy(static_cast<char*>(to) + r * stride_bytes, words_[I][r],
                        config_.row_bytes[I]);
        }
    }

    template <int C, int A, int B>
    void multiply() {
        for (int r = 0; r < TILE_SIDE; ++r) {
            Vec total = duo::load(reinterpret_cast<const float*>(words_[C][r]));
            for (int p = 0; p < TILE_SIDE; ++p) {
                const Pairs b = *reinterpret_cast<const VecBitsAny*>(words_[B][p]);
                total = add_products(total, broadcast_pair(words_[A][r] + p), b);
            }
            duo::store(reinterpret_cast<float*>(words_[C][r]), total);
        }
    }

  private:
    const TileConfig config_;
    uint32_t words_[8][TILE_SIDE][TILE_SIDE];
#endif
};

}  // namespace
}  // namespace duo
