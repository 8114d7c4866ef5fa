// Products of one matrix by others, as they lie in memory: outputs first.

#pragma once

#include <vector>

#include "blocks.h"
#include "threads.h"
#include "tiles.h"

namespace {

constexpr int kLeastRows = 64, kMostRows = 256;  // of x that a thread packs at a time
constexpr int kRoom = 1 << 20;                   // bytes that more rows than the least may have
constexpr int kAhead = 128;                      // inputs that matrices are asked for before few rows read them
constexpr int kTogether = 512;                   // inputs of float32 that are summed before others are added

// Tiles of x's rows that a pass over a panel takes: as many as there are registers for their sums.
template <class T>
constexpr int kPass = std::is_same_v<T, bfloat16> ? 2 : 3;

enum class Finish { kPlain, kWide, kSilu, kGelu };  // the second: in float32, whatever the inputs

// What x is multiplied by, in panels of two tiles: the upper half of some outputs and the lower half, or an output's
// gate and what it lets through.
template <class T>
struct Factor {
  const T *upper, *lower;
  int panels, step;  // how many, and how many of the matrix's rows each is behind the last
  int O;
  Finish finish;
  void* product;            // [X, O]
  const T* plus = nullptr;  // likewise, to add before it is rounded
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

// What has been summed: [16 outputs, 16 rows of x]; of a pass: of each tile of rows those of the upper outputs and of
// the lower ones.
using Sums = float[kTile * kTile];
using PassSums = Sums[3][2];

// Of 16 rows the sums of a panel's upper outputs and of its lower ones, with what is to be added to them.
void PutSums(const Sums& upper, const Sums& lower, const bfloat16* plus, int rows, bfloat16* to, size_t stride) {
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

void PutSums(const Sums& upper, const Sums& lower, const float* plus, int rows, float* to, size_t stride) {
  for (int first : {0, kTile}) {
    __m512 x[kTile];
    for (int i = 0; i < kTile; ++i) x[i] = _mm512_load_ps((first ? lower : upper) + i * kTile);
    Transpose(x);
    for (int row = 0; row < rows; ++row) {
      const size_t at = row * stride + first;
      Store(to + at, plus ? _mm512_add_ps(x[row], _mm512_loadu_ps(plus + at)) : x[row]);
    }
  }
}

// Of one output, its gate and what that lets through.
__m512 GatedSums(const Sums (&sums)[2], int output, bool gelu) {
  const __m512 gate = Activated(_mm512_load_ps(sums[0] + output * kTile), gelu);
  return _mm512_mul_ps(gate, _mm512_load_ps(sums[1] + output * kTile));
}

// Of 32 rows, the first 16 and then the rest, the sums of 16 gates and of what they let through.
void PutGated(const PassSums& sums, bool gelu, int rows, bfloat16* to, size_t stride) {
  __m512 pairs[kTile] = {};
  for (int i = 0; i < (rows > kTile ? kTile : kTile / 2); ++i) {
    auto gated = [&](int output) { return GatedSums(sums[i / (kTile / 2)], output, gelu); };
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

// Likewise of all rows of a pass.
void PutGated(const PassSums& sums, bool gelu, int rows, float* to, size_t stride) {
  for (int tile = 0, first = 0; first < rows; ++tile, first += kTile) {
    __m512 x[kTile];
    for (int i = 0; i < kTile; ++i) x[i] = GatedSums(sums[tile], i, gelu);
    Transpose(x);
    for (int row = 0; row < std::min(kTile, rows - first); ++row) Store(to + (first + row) * stride, x[row]);
  }
}

// Of a pass the product's rows, from `row` on, so many that there are.
template <class T>
void Put(const PassSums& sums, const Factor<T>& factor, int row, int rows, int panel) {
  const size_t O = factor.O, at = row * O + static_cast<size_t>(panel) * factor.step;
  T* product = static_cast<T*>(factor.product) + at;
  if (factor.finish == Finish::kSilu || factor.finish == Finish::kGelu)
    return PutGated(sums, factor.finish == Finish::kGelu, rows, product, O);
  for (int tile = 0, first = 0; first < rows; ++tile, first += kTile) {
    const Sums &upper = sums[tile][0], &lower = sums[tile][1];
    const int count = std::min(kTile, rows - first);
    const T* plus = factor.plus ? factor.plus + at + first * O : nullptr;
    const float* nothing = nullptr;
    if (factor.finish == Finish::kWide)
      PutSums(upper, lower, nothing, count, static_cast<float*>(factor.product) + at + first * O, O);
    else
      PutSums(upper, lower, plus, count, product + first * O, O);
  }
}

// Where a panel of I inputs lies, and how far behind it the next; the pass over it that this is.
template <class T>
struct Panel {
  const T *upper, *lower;
  size_t step;
  int I, pass, passes;
};

// The sums of a panel and of x's rows in so many right tiles; the thread has its `Tiles`. What is read soon is asked
// for now, little by little, since the hardware guesses tiles' rows badly: of few rows inputs of this panel, of more
// the next panel.
void Contract(const Panel<bfloat16>& panel, const bfloat16* right, int tiles, PassSums& sums) {
  const int I = panel.I, ahead = panel.passes == 1 ? kAhead : I;
  const bfloat16* beside = right + static_cast<size_t>(kTile) * I;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < I; i += kInputs) {
    const size_t soon = i + ahead < I ? i + ahead : panel.step + i + ahead - I;
    for (int line = kTile * panel.pass / panel.passes; line < kTile * (panel.pass + 1) / panel.passes; ++line) {
      _mm_prefetch(panel.upper + soon + line * I, _MM_HINT_T0);
      _mm_prefetch(panel.lower + soon + line * I, _MM_HINT_T0);
    }
    _tile_loadd(4, panel.upper + i, I * 2);
    _tile_loadd(5, panel.lower + i, I * 2);
    _tile_loadd(6, right + i * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (tiles == 1) continue;
    _tile_loadd(7, beside + i * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[1][0], 64);
  _tile_stored(3, sums[1][1], 64);
}

// Likewise of float32, of which the hardware guesses a block's rows, but not the next block's.
void Contract(const Panel<float>& panel, const float* right, int tiles, PassSums& sums) {
  const size_t block = static_cast<size_t>(kBlockRows) * panel.I;
  const float* parts[] = {panel.upper, panel.upper + block, panel.lower, panel.lower + block,
                          panel.upper + panel.step};
  for (int part = 0; part < 4; ++part) {
    auto to = [&](int tile) { return sums[tile][part / 2] + part % 2 * kBlockRows * kTile; };
    auto contract = [&](auto& sums) {
      ContractBlock(parts[part], panel.I, kTogether, parts[part + 1], right, panel.I, sums, kTile);
    };
    float *one[] = {to(0)}, *two[] = {to(0), to(1)}, *three[] = {to(0), to(1), to(2)};
    tiles == 1 ? contract(one) : tiles == 2 ? contract(two) : contract(three);
  }
}

// One panel of the product's rows from `row` on, of which `right` holds x in right tiles.
template <class T>
void Multiply(const T* right, const Factor<T>& factor, int row, int rows, int I, int panel) {
  alignas(64) PassSums sums;
  const size_t step = static_cast<size_t>(factor.step) * I;
  const T *upper = factor.upper + panel * step, *lower = factor.lower + panel * step;
  const int each = kPass<T> * kTile, passes = Ceil(rows, each);
  for (int x = 0, pass = 0; x < rows; x += each, ++pass) {
    const int count = std::min(each, rows - x);
    Contract({upper, lower, step, I, pass, passes}, right + static_cast<size_t>(x) * I, Ceil(count, kTile), sums);
    Put(sums, factor, row + x, count, panel);
  }
}

// In parts of x's rows that stay in a core's own cache, if inputs are not too many. A thread packs what it multiplies.
template <class T>
void MultiplyBy(ffi::ThreadPool& pool, ffi::AnyBuffer x, std::vector<Factor<T>> all) {
  const int X = x.dimensions()[0], I = x.dimensions()[1];
  if (!X) return;
  const int room = kRoom / sizeof(T) / I, pass = kPass<T> * kTile;
  const int most = std::clamp(room, kLeastRows, kMostRows) / pass * pass;
  const int each = Ceil(Ceil(X, Ceil(X, most)), pass) * pass, parts = Ceil(X, each);
  int panels = 0;
  for (const Factor<T>& factor : all) panels += factor.panels;
  const T* rows = Data<T>(x);
  ShareOut(pool, parts * panels, [=, factors = std::make_shared<std::vector<Factor<T>>>(std::move(all))](auto next) {
    static thread_local Lines<T> right;
    TilesOf<T> tiles;
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
template <class T>
Factor<T> Whole(ffi::AnyBuffer matrix, Finish finish, void* product) {
  const int O = matrix.dimensions()[0];
  const size_t half = static_cast<size_t>(kTile) * matrix.dimensions()[1];
  return {Data<T>(matrix), Data<T>(matrix) + half, O / (2 * kTile), 2 * kTile, O, finish, product};
}

ffi::Error Products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs matrices, ffi::RemainingRets products) {
  ByType(x, [&](auto T) {
    std::vector<Factor<decltype(T)>> factors;
    for (size_t i = 0; i < matrices.size(); ++i) {
      auto product = *products.get<ffi::AnyBuffer>(i);
      const Finish finish = product->element_type() == ffi::F32 ? Finish::kWide : Finish::kPlain;
      factors.push_back(Whole<decltype(T)>(*matrices.get<ffi::AnyBuffer>(i), finish, product->untyped_data()));
    }
    MultiplyBy(pool, x, std::move(factors));
  });
  return ffi::Error::Success();
}

ffi::Error Added(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer matrix, ffi::AnyBuffer plus,
                 ffi::Result<ffi::AnyBuffer> y) {
  ByType(x, [&](auto T) {
    auto factor = Whole<decltype(T)>(matrix, Finish::kPlain, y->untyped_data());
    factor.plus = Data<decltype(T)>(plus);
    MultiplyBy<decltype(T)>(pool, x, {factor});
  });
  return ffi::Error::Success();
}

ffi::Error Gated(ffi::ThreadPool pool, bool gelu, ffi::AnyBuffer x, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                 ffi::Result<ffi::AnyBuffer> y) {
  const int O = gate.dimensions()[0];
  ByType(x, [&](auto T) {
    const Finish finish = gelu ? Finish::kGelu : Finish::kSilu;
    auto data = [](ffi::AnyBuffer matrix) { return Data<decltype(T)>(matrix); };
    MultiplyBy<decltype(T)>(pool, x, {{data(gate), data(up), O / kTile, kTile, O, finish, y->untyped_data()}});
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    advgame_cpu_products, Products,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_gated, Gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("gelu")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_added, Added,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
