// Tiles of AMX, and what is laid out for them.
//
// A tile holds 16 rows of 64 bytes. A left one, 16 rows of 32 inputs, is multiplied by a right one that holds its 32
// inputs in pairs: [16 pairs, 16 columns, 2]. Sums are float32, in the same order whatever is computed beside them.

#pragma once

#include <algorithm>
#include <atomic>

#include "vectors.h"

namespace {

constexpr int kTile = 16;    // rows of a tile, or columns
constexpr int kInputs = 32;  // that a product of two tiles adds up

// What was stored is in memory from here on. Compilers do not know that tiles are loaded from there: between a store
// and the next tile that is loaded there must be this, or a new `Tiles`.
inline void Stored() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// A thread's tiles, all of them whole.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    std::fill_n(config.bytes, 8, 64);
    std::fill_n(config.rows, 8, kTile);
    Stored();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// What a thread that multiplies numbers of this type has.
struct NoTiles {};
template <class T>
using TilesOf = std::conditional_t<std::is_same_v<T, bfloat16>, Tiles, NoTiles>;

// Rows of I inputs, `stride` apart, as right tiles, zeros in the place of more: [rows / 16, I / 2 pairs, 16 rows, 2],
// of float32 [rows / 16, I, 16 rows].
template <class T>
void PackRows(const T* x, int rows, int I, size_t stride, T* right) {
  constexpr int kLine = 64 / sizeof(T);
  for (int row = 0; row < rows; row += kTile) {
    for (int i = 0; i < I; i += kLine, right += kTile * kLine) {
      __m512 tile[kTile];
      for (int r = 0; r < kTile; ++r)
        tile[r] = row + r < rows ? _mm512_loadu_ps(x + (row + r) * stride + i) : _mm512_setzero_ps();
      Transpose(tile);
      for (int line = 0; line < kTile; ++line) _mm512_storeu_ps(right + line * kLine, tile[line]);
    }
  }
}

// S inputs of H columns, `stride` apart, as right tiles: [S / 32, H / 16, 16 pairs, 16 columns, 2]; zeros likewise.
// With room for more behind them.
inline void PackInputs(const bfloat16* x, int S, int H, size_t stride, int, bfloat16* right) {
  for (int s = 0; s < S; s += kInputs) {
    for (int h = 0; h < H; h += kTile, right += kTile * kInputs) {
      for (int pair = 0; pair < kTile; ++pair) {
        int at = s + 2 * pair;
        auto load = [&](int row) {
          if (row >= S) return _mm512_setzero_si512();
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + row * stride + h)));
        };
        _mm512_storeu_si512(right + pair * kInputs, _mm512_or_si512(load(at), _mm512_slli_epi32(load(at + 1), 16)));
      }
    }
  }
}

}  // namespace
