// Products of one matrix of bfloat16 by others, as they lie in memory: outputs first.

#pragma once

#include <vector>

#include "threads.h"
#include "tiles.h"

namespace {

constexpr int kFewRows = 64;  // of x at most: then threads share out the matrices' rows, else x's
constexpr int kRows = 128;    // of x, at most, that a thread takes at a time
constexpr int kAhead = 128;   // inputs that matrices are asked for before they are read

enum class Finish { kNarrow, kWide, kSilu, kGelu, kAdded };

// What x is multiplied by, in panels of two tiles: the upper half of some outputs and the lower half, or an output's
// gate and what it lets through.
struct Factor {
  const bfloat16 *upper, *lower;
  int panels, step;  // how many, and how many of the matrix's rows each is behind the last
  int O;
  Finish finish;
  void* product;                   // [X, O]
  const bfloat16* plus = nullptr;  // likewise, to add
};

// x · sigmoid(t): SiLU is that of t = x, the approximate GELU of t = 2 √(2/π) (x + 0.044715 x³).
__m512 Activated(__m512 x, bool gelu) {
  auto all = [](float y) { return _mm512_set1_ps(y); };
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(all(0.044715f), _mm512_mul_ps(x, x)), x, x);
  const __m512 t = gelu ? _mm512_mul_ps(all(1.5957691216f), cubic) : x;
  const __m512 small = Exp(_mm512_sub_ps(all(0), _mm512_abs_ps(t)));  // of the two that the sigmoid is a ratio of
  const __m512 over = _mm512_mask_mov_ps(all(1), _mm512_cmp_ps_mask(t, all(0), _CMP_LT_OQ), small);
  return _mm512_mul_ps(x, _mm512_div_ps(over, _mm512_add_ps(all(1), small)));
}

// Of 16 rows the sums of both tiles of a panel, [16 outputs, 16 rows] → the product's rows from `row` on, `rows` of them.
void PutSums(const float (&sums)[2][kTile * kTile], const Factor& factor, int row, int rows, int panel) {
  __m512 upper[kTile], lower[kTile];
  for (int i = 0; i < kTile; ++i) {
    upper[i] = _mm512_load_ps(sums[0] + kTile * i);
    lower[i] = _mm512_load_ps(sums[1] + kTile * i);
  }
  Transpose(upper);
  Transpose(lower);
  const size_t at = static_cast<size_t>(row) * factor.O + static_cast<size_t>(panel) * factor.step;
  auto* narrow = static_cast<bfloat16*>(factor.product) + at;
  auto* wide = static_cast<float*>(factor.product) + at;
  const bfloat16* plus = factor.plus + (factor.plus ? at : 0);
  for (int i = 0; i < rows; ++i, narrow += factor.O, wide += factor.O, plus += factor.plus ? factor.O : 0) {
    switch (factor.finish) {
      case Finish::kNarrow:
        Store(narrow, upper[i]);
        Store(narrow + kTile, lower[i]);
        break;
      case Finish::kWide:
        Store(wide, upper[i]);
        Store(wide + kTile, lower[i]);
        break;
      case Finish::kAdded:
        Store(narrow, _mm512_add_ps(Wide(plus), upper[i]));
        Store(narrow + kTile, _mm512_add_ps(Wide(plus + kTile), lower[i]));
        break;
      default:
        Store(narrow, _mm512_mul_ps(Activated(upper[i], factor.finish == Finish::kGelu), lower[i]));
    }
  }
}

// One panel of the product's rows from `row` on, of which `right` holds x in right tiles; the thread has its `Tiles`.
void Multiply(const bfloat16* right, const Factor& factor, int row, int rows, int I, int panel) {
  alignas(64) float sums[2][2][kTile * kTile];  // of 16 rows of x and 16 more
  const size_t step = static_cast<size_t>(factor.step) * I;
  const bfloat16 *upper = factor.upper + panel * step, *lower = factor.lower + panel * step;
  for (int x = 0; x < rows; x += 2 * kTile) {
    const bfloat16 *left = right + static_cast<size_t>(x) * I, *beside = left + static_cast<size_t>(kTile) * I;
    const bool both = x + kTile < rows;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < I; i += kInputs) {
      // What is read soon, of this panel or the next, is asked for now: the hardware guesses tiles' rows badly.
      const size_t soon = i + kAhead < I ? i + kAhead : step + i + kAhead - I;
      for (int line = 0; x == 0 && line < kTile; ++line) {
        _mm_prefetch(upper + soon + line * I, _MM_HINT_T0);
        _mm_prefetch(lower + soon + line * I, _MM_HINT_T0);
      }
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
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
    for (int done = x, half = 0; half <= both; ++half, done += kTile)
      PutSums(sums[half], factor, row + done, std::min(kTile, rows - done), panel);
  }
}

// 0, …, n - 1 in equal shares, one for each thread: of its own it takes the next, as they lie in memory, and then of the
// others' the last.
class Shares {
 public:
  Shares(int n, int threads) : left_(threads) {
    for (int64_t i = 0; i < threads; ++i) left_[i].range = Packed(n * i / threads, n * (i + 1) / threads);
  }

  // -1 where there is no more.
  int Take(int mine) {
    for (size_t i = 0; i < left_.size(); ++i) {
      auto& share = left_[(mine + i) % left_.size()].range;
      for (uint64_t range = share.load();;) {
        const uint32_t first = range >> 32, end = range;
        if (first == end) break;
        if (share.compare_exchange_weak(range, i ? Packed(first, end - 1) : Packed(first + 1, end)))
          return i ? end - 1 : first;
      }
    }
    return -1;
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> range;
  };
  static uint64_t Packed(uint64_t first, uint64_t end) { return first << 32 | end; }

  std::vector<Share> left_;
};

void MultiplyBy(ffi::ThreadPool& pool, const Narrow& x, const std::shared_ptr<std::vector<Factor>>& factors) {
  const int X = x.dimensions()[0], I = x.dimensions()[1], threads = std::max<int>(1, pool.num_threads());
  const bfloat16* rows = Data(x);
  if (X > kFewRows) {
    const int each = std::min(kRows, Ceil(Ceil(X, threads), 2 * kTile) * 2 * kTile);
    Each(pool, Ceil(X, each), [=](int part) {
      static thread_local std::vector<bfloat16> right;
      const int first = part * each, count = std::min(each, X - first);
      right.resize(static_cast<size_t>(Ceil(count, kTile)) * kTile * I);
      PackRows(rows + static_cast<size_t>(first) * I, count, I, I, right.data());
      Tiles tiles;
      for (const Factor& factor : *factors)
        for (int panel = 0; panel < factor.panels; ++panel) Multiply(right.data(), factor, first, count, I, panel);
    });
    return;
  }
  auto right = std::make_shared<std::vector<bfloat16>>(static_cast<size_t>(Ceil(X, kTile)) * kTile * I);
  PackRows(rows, X, I, I, right->data());
  int panels = 0;
  for (const Factor& factor : *factors) panels += factor.panels;
  const int sharing = std::min(threads, panels);
  auto shares = std::make_shared<Shares>(panels, sharing);
  Each(pool, sharing, [=](int mine) {
    Tiles tiles;
    for (int panel; (panel = shares->Take(mine)) >= 0;) {
      auto factor = factors->begin();
      for (; panel >= factor->panels; ++factor) panel -= factor->panels;
      Multiply(right->data(), *factor, 0, X, I, panel);
    }
  });
}

// A whole matrix [O, I].
Factor Whole(const Narrow& matrix, Finish finish, void* product) {
  const int O = matrix.dimensions()[0];
  const size_t half = static_cast<size_t>(kTile) * matrix.dimensions()[1];
  return {Data(matrix), Data(matrix) + half, O / (2 * kTile), 2 * kTile, O, finish, product};
}

ffi::Error Products(ffi::ThreadPool pool, Narrow x, ffi::RemainingArgs matrices, ffi::RemainingRets products) {
  auto factors = std::make_shared<std::vector<Factor>>();
  for (size_t i = 0; i < matrices.size(); ++i) {
    auto product = *products.get<ffi::AnyBuffer>(i);
    const Finish finish = product->element_type() == ffi::F32 ? Finish::kWide : Finish::kNarrow;
    factors->push_back(Whole(*matrices.get<Narrow>(i), finish, product->untyped_data()));
  }
  MultiplyBy(pool, x, factors);
  return ffi::Error::Success();
}

ffi::Error Added(ffi::ThreadPool pool, Narrow x, Narrow matrix, Narrow plus, ffi::Result<Narrow> y) {
  Factor factor = Whole(matrix, Finish::kAdded, Data(y));
  factor.plus = Data(plus);
  MultiplyBy(pool, x, std::make_shared<std::vector<Factor>>(1, factor));
  return ffi::Error::Success();
}

ffi::Error Gated(ffi::ThreadPool pool, bool gelu, Narrow x, Narrow gate, Narrow up, ffi::Result<Narrow> y) {
  const int O = gate.dimensions()[0];
  const Factor factor{Data(gate), Data(up), O / kTile, kTile, O, gelu ? Finish::kGelu : Finish::kSilu, Data(y)};
  MultiplyBy(pool, x, std::make_shared<std::vector<Factor>>(1, factor));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_products, Products,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Narrow>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_gated, Gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("gelu")
                                  .Arg<Narrow>()
                                  .Arg<Narrow>()
                                  .Arg<Narrow>()
                                  .Ret<Narrow>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    advgame_amx_added, Added,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Narrow>().Arg<Narrow>().Arg<Narrow>().Ret<Narrow>());
