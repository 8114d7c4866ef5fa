// What tiles do, of float32 and by vectors.
//
// A left block is 8 rows of inputs; a right tile [inputs, 16 columns]. Each sum is that of one input after the other,
// whatever is computed beside it.

#pragma once

#include "tiles.h"

namespace {

constexpr int kBlockRows = 8;

// S inputs of H columns, `stride` apart, as right tiles with room for more: [H / 16, room, 16 columns].
inline void PackInputs(const float* x, int S, int H, size_t stride, int room, float* right) {
  for (int h = 0; h < H; h += kTile, right += static_cast<size_t>(room) * kTile)
    for (int s = 0; s < S; ++s) Store(right + s * kTile, Wide(x + s * stride + h));
}

// A block of I inputs times n right tiles, which lie `apart` inputs apart → sums of each, [8, 16], whose rows lie
// `stride` apart; or `onto` what is there. Only so many inputs are summed `together`, since rounding grows with what is
// added to. Asks for the block that is read `then`.
template <bool onto = false, int n>
void ContractBlock(const float* block, int I, int together, const float* then, const float* right, int apart,
                   float* const (&sums)[n], int stride) {
  for (int from = 0; from < I; from += together) {
    __m512 sum[kBlockRows][n];
    For<kBlockRows>([&](auto row) { For<n>([&](auto tile) { sum[row][tile] = _mm512_setzero_ps(); }); });
    for (int i = from; i < std::min(I, from + together); i += kTile) {
      for (int j = 0; j < kTile; ++j) {
        if (j < kBlockRows) _mm_prefetch(then + static_cast<size_t>(i) * kBlockRows + j * kTile, _MM_HINT_T1);
        __m512 column[n];
        For<n>([&](auto tile) {
          column[tile] = _mm512_load_ps(right + (static_cast<size_t>(tile) * apart + i + j) * kTile);
        });
        For<kBlockRows>([&](auto row) {
          const __m512 input = _mm512_set1_ps(block[static_cast<size_t>(row) * I + i + j]);
          For<n>([&](auto tile) { sum[row][tile] = _mm512_fmadd_ps(input, column[tile], sum[row][tile]); });
        });
      }
    }
    For<kBlockRows>([&](auto row) {
      For<n>([&](auto tile) {
        float* to = sums[tile] + static_cast<size_t>(row) * stride;
        _mm512_storeu_ps(to, from || onto ? _mm512_add_ps(_mm512_loadu_ps(to), sum[row][tile]) : sum[row][tile]);
      });
    });
  }
}

}  // namespace
