// Products of one matrix of bfloat16 by others, as they lie in memory: outputs first.

#pragma once

#include <vector>

#include "threads.h"
#include "tiles.h"

namespace {

constexpr int kPanel = 32;    // outputs that are computed together
constexpr int kFewRows = 64;  // of x at most: then threads share out the matrix's rows, else x's
constexpr int kRows = 128;    // of x, at most, that a thread takes at a time
constexpr int kParts = 8;     // of matrices, at least, that threads take in turn

// A tile of sums [16 outputs, 16 rows] → the first `rows` rows of y, O numbers apart.
template <class T>
void PutTurned(const float* sums, int rows, int O, T* y) {
  __m512 tile[16];
  for (int i = 0; i < 16; ++i) tile[i] = _mm512_load_ps(sums + 16 * i);
  Transpose(tile);
  for (int row = 0; row < std::min(rows, kTile); ++row) Store(y + static_cast<size_t>(row) * O, tile[row]);
}

// y [X, O], of it the outputs from `first` to `end`, multiples of 32: x in right tiles, the matrix [O, I].
template <class T>
void Multiply(const bfloat16* right, const bfloat16* matrix, int X, int I, int O, int first, int end, T* y) {
  Tiles tiles;
  alignas(64) float sums[4][kTile * kTile];
  for (int o = first; o < end; o += kPanel) {
    const bfloat16 *upper = matrix + static_cast<size_t>(o) * I, *lower = upper + static_cast<size_t>(kTile) * I;
    // What is read next, which lies in one piece, is asked for now: the hardware guesses tiles' rows badly.
    const char* soon = reinterpret_cast<const char*>(upper + static_cast<size_t>(kPanel) * I);
    for (int x = 0; x < X; x += 2 * kTile) {
      const bfloat16 *left = right + static_cast<size_t>(x) * I, *beside = left + static_cast<size_t>(kTile) * I;
      const bool both = x + kTile < X;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int i = 0; i < I; i += kInputs) {
        for (int line = 0; x == 0 && line < kPanel; ++line, soon += 64) _mm_prefetch(soon, _MM_HINT_T1);
        _tile_loadd(4, upper + i, I * 2);
        _tile_loadd(5, lower + i, I * 2);
        _tile_loadd(6, left + i * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (!both) continue;
        _tile_loadd(7, beside + i * kTile, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      for (int part = 0; part < (both ? 4 : 2); ++part) {
        const int row = x + part / 2 * kTile, column = o + part % 2 * kTile;
        PutTurned(sums[part], X - row, O, y + static_cast<size_t>(row) * O + column);
      }
    }
  }
}

// A matrix [O, I], and where its product [X, O] goes.
struct Factor {
  const bfloat16* matrix;
  int O;
  void* product;
  bool wide;  // float32
};

void Multiply(const bfloat16* right, const Factor& factor, int row, int rows, int I, int first, int end) {
  const size_t at = static_cast<size_t>(row) * factor.O;
  auto into = [&](auto* y) { Multiply(right, factor.matrix, rows, I, factor.O, first, end, y + at); };
  factor.wide ? into(static_cast<float*>(factor.product)) : into(static_cast<bfloat16*>(factor.product));
}

ffi::Error Products(ffi::ThreadPool pool, Narrow x, ffi::RemainingArgs matrices, ffi::RemainingRets products) {
  const int X = x.dimensions()[0], I = x.dimensions()[1];
  const bfloat16* rows = Data(x);
  auto factors = std::make_shared<std::vector<Factor>>();
  for (size_t i = 0; i < matrices.size(); ++i) {
    auto matrix = *matrices.get<ffi::AnyBuffer>(i);
    auto product = *products.get<ffi::AnyBuffer>(i);
    factors->push_back({static_cast<const bfloat16*>(matrix.untyped_data()), static_cast<int>(matrix.dimensions()[0]),
                        product->untyped_data(), product->element_type() == ffi::F32});
  }
  const int threads = std::max<int>(1, pool.num_threads());
  if (X > kFewRows) {
    const int each = std::min(kRows, Ceil(Ceil(X, threads), 2 * kTile) * 2 * kTile);
    Each(pool, Ceil(X, each), [=](int part) {
      static thread_local std::vector<bfloat16> right;
      const int first = part * each, count = std::min(each, X - first);
      right.resize(static_cast<size_t>(Ceil(count, kTile)) * kTile * I);
      PackRows(rows + static_cast<size_t>(first) * I, count, I, I, right.data());
      for (const Factor& factor : *factors) Multiply(right.data(), factor, first, count, I, 0, factor.O);
    });
    return ffi::Error::Success();
  }
  auto right = std::make_shared<std::vector<bfloat16>>(static_cast<size_t>(Ceil(X, kTile)) * kTile * I);
  PackRows(rows, X, I, I, right->data());
  int panels = 0;
  for (const Factor& factor : *factors) panels += factor.O / kPanel;
  const int each = Ceil(panels, std::max(kParts, 2 * threads));
  Each(pool, Ceil(panels, each), [=](int part) {
    int first = part * each, end = first + each;  // panels, counted from each matrix's first
    for (const Factor& factor : *factors) {
      const int there = factor.O / kPanel, from = std::max(0, first), to = std::min(there, end);
      if (from < to) Multiply(right->data(), factor, 0, X, I, from * kPanel, to * kPanel);
      first -= there, end -= there;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_products, Products,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Narrow>().RemainingArgs().RemainingRets());
