// Products of one matrix of bfloat16 by others, as they lie in memory: outputs first.

#pragma once

#include <vector>

#include "threads.h"
#include "tiles.h"

namespace {

constexpr int kLeastRows = 64, kMostRows = 256;  // of x that a thread packs at a time
constexpr int kRoom = 1 << 19;                   // numbers that more rows than the least may have
constexpr int kAhead = 128;                      // inputs that matrices are asked for before few rows read them

enum class Finish { kNarrow, kWide, kSilu, kGelu };

// What x is multiplied by, in panels of two tiles: the upper half of some outputs and the lower half, or an output's
// gate and what it lets through.
struct Factor {
  const bfloat16 *upper, *lower;
  int panels, step;  // how many, and how many of the matrix's rows each is behind the last
  int O;
  Finish finish;
  void* product;                   // [X, O]
  const bfloat16* plus = nullptr;  // likewise, to add before it is rounded
};

// x · sigmoid(t): SiLU is that of t = x, the approximate GELU of t = 2 √(2/π) (x + 0.044715 x³).
__m512 Activated(__m512 x, bool gelu) {
  auto all = [](float y) { return _mm512_set1_ps(y); };
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(all(0.044715f), _mm512_mul_ps(x, x)), x, x);
  const __m512 t = gelu ? _mm512_mul_ps(all(1.5957691216f), cubic) : x;
  const __m512 small = Exp(_mm512_sub_ps(all(0), _mm512_abs_ps(t)));  // of the two that the sigmoid is a ratio of
  const __m512 over = _mm512_mask_mov_ps(all(1), _mm512_cmp_ps_mask(t, all(0), _CMP_LT_OQ), small);
  const __m512 under = _mm512_add_ps(all(1), small), near = _mm512_rcp14_ps(under);
  const __m512 inverse = _mm512_fmadd_ps(near, _mm512_fnmadd_ps(under, near, all(1)), near);  // a step of Newton's
  return _mm512_mul_ps(x, _mm512_mul_ps(over, inverse));
}

// What tiles have summed: [16 outputs, 16 rows of x].
using Sums = float[kTile * kTile];

// Of 16 rows the sums of a panel's upper outputs and of its lower ones, with what is to be added to them.
void PutNarrow(const Sums& upper, const Sums& lower, const bfloat16* plus, int rows, bfloat16* to, size_t stride) {
  __m512 pairs[kTile] = {};
  for (int row = 0; plus && row < rows; ++row) pairs[row] = _mm512_loadu_ps(plus + row * stride);
  if (plus) Transpose(pairs);
  for (int i = 0; i < kTile; ++i) {
    const float* sums = (i < kTile / 2 ? upper : lower) + i % (kTile / 2) * 2 * kTile;
    const __m512 first = _mm512_load_ps(sums), second = _mm512_load_ps(sums + kTile);
    pairs[i] = plus ? Pairs(_mm512_add_ps(First(pairs[i]), first), _mm512_add_ps(Second(pairs[i]), second))
                    : Pairs(first, second);
  }
  Transpose(pairs);
  for (int row = 0; row < rows; ++row) _mm512_storeu_ps(to + row * stride, pairs[row]);
}

// The same of no more than the sums, without rounding.
void PutWide(const Sums& upper, const Sums& lower, int rows, float* to, size_t stride) {
  for (const float* sums : {upper, lower}) {
    __m512 x[kTile];
    for (int i = 0; i < kTile; ++i) x[i] = _mm512_load_ps(sums + i * kTile);
    Transpose(x);
    for (int row = 0; row < rows; ++row) Store(to + row * stride, x[row]);
    to += kTile;
  }
}

// Of 32 rows, the first 16 and then the rest, the sums of 16 gates and of what they let through.
void PutGated(const Sums (&sums)[2][2], bool gelu, int rows, bfloat16* to, size_t stride) {
  __m512 pairs[kTile] = {};
  for (int i = 0; i < (rows > kTile ? kTile : kTile / 2); ++i) {
    const float *gate = sums[i / (kTile / 2)][0], *up = sums[i / (kTile / 2)][1];
    auto gated = [&](int output) {
      return _mm512_mul_ps(Activated(_mm512_load_ps(gate + output * kTile), gelu), _mm512_load_ps(up + output * kTile));
    };
    const int output = i % (kTile / 2) * 2;
    pairs[i] = Pairs(gated(output), gated(output + 1));
  }
  Transpose(pairs);
  for (int row = 0; row < rows; ++row) {
    const __m512d both = _mm512_castps_pd(pairs[row % kTile]);
    const __m256d mine = row < kTile ? _mm512_castpd512_pd256(both) : _mm512_extractf64x4_pd(both, 1);
    _mm256_storeu_pd(reinterpret_cast<double*>(to + row * stride), mine);
  }
}

// Of 32 rows of a product, from `row` on, so many that there are.
void Put(const Sums (&sums)[2][2], const Factor& factor, int row, int rows, int panel) {
  const size_t O = factor.O, at = row * O + static_cast<size_t>(panel) * factor.step;
  auto* narrow = static_cast<bfloat16*>(factor.product) + at;
  auto* wide = static_cast<float*>(factor.product) + at;
  if (factor.finish == Finish::kSilu || factor.finish == Finish::kGelu)
    return PutGated(sums, factor.finish == Finish::kGelu, rows, narrow, O);
  for (int half = 0, first = 0; first < rows; ++half, first += kTile) {
    const Sums &upper = sums[half][0], &lower = sums[half][1];
    const int count = std::min(kTile, rows - first);
    if (factor.finish == Finish::kWide)
      PutWide(upper, lower, count, wide + first * O, O);
    else
      PutNarrow(upper, lower, factor.plus ? factor.plus + at + first * O : nullptr, count, narrow + first * O, O);
  }
}

// One panel of the product's rows from `row` on, of which `right` holds x in right tiles; the thread has its `Tiles`.
void Multiply(const bfloat16* right, const Factor& factor, int row, int rows, int I, int panel) {
  alignas(64) Sums sums[2][2];  // of 16 rows of x and 16 more
  const size_t step = static_cast<size_t>(factor.step) * I;
  const bfloat16 *upper = factor.upper + panel * step, *lower = factor.lower + panel * step;
  // What is read soon is asked for now, little by little: the hardware guesses tiles' rows badly. Of few rows inputs of
  // this panel, of more the next panel.
  const int passes = Ceil(rows, 2 * kTile), ahead = passes == 1 ? kAhead : I;
  for (int x = 0, pass = 0; x < rows; x += 2 * kTile, ++pass) {
    const bfloat16 *left = right + static_cast<size_t>(x) * I, *beside = left + static_cast<size_t>(kTile) * I;
    const bool both = x + kTile < rows;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < I; i += kInputs) {
      const size_t soon = i + ahead < I ? i + ahead : step + i + ahead - I;
      for (int line = kTile * pass / passes; line < kTile * (pass + 1) / passes; ++line) {
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
    Put(sums, factor, row + x, std::min(2 * kTile, rows - x), panel);
  }
}

// In parts of x's rows that stay in a core's own cache, if inputs are not too many. A thread packs what it multiplies.
void MultiplyBy(ffi::ThreadPool& pool, const Narrow& x, const std::shared_ptr<std::vector<Factor>>& factors) {
  const int X = x.dimensions()[0], I = x.dimensions()[1];
  if (!X) return;
  const int most = std::clamp(kRoom / I, kLeastRows, kMostRows) / (2 * kTile) * (2 * kTile);
  const int each = Ceil(Ceil(X, Ceil(X, most)), 2 * kTile) * 2 * kTile, parts = Ceil(X, each);
  int panels = 0;
  for (const Factor& factor : *factors) panels += factor.panels;
  const bfloat16* rows = Data(x);
  ShareOut(pool, parts * panels, [=](auto next) {
    static thread_local Lines<bfloat16> right;
    Tiles tiles;
    for (int taken, packed = -1; (taken = next()) >= 0;) {
      const int part = taken / panels, first = part * each, count = std::min(each, X - first);
      if (part != packed) {
        right.resize(std::max(right.size(), static_cast<size_t>(Ceil(count, kTile)) * kTile * I));
        PackRows(rows + static_cast<size_t>(first) * I, count, I, I, right.data());
        Stored();
        packed = part;
      }
      int panel = taken % panels;
      auto factor = factors->begin();
      for (; panel >= factor->panels; ++factor) panel -= factor->panels;
      Multiply(right.data(), *factor, first, count, I, panel);
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
  Factor factor = Whole(matrix, Finish::kNarrow, Data(y));
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
