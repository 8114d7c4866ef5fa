// The sampler's products, attention and draw in bfloat16 for CPUs with AMX; amx.py says what each computes.
//
// A tile holds 16 rows of 64 bytes. A left one, 16 rows of 32 inputs, is multiplied by a right one that holds its 32
// inputs in pairs: [16 pairs, 16 columns, 2]. Sums are float32, in the same order whatever is computed beside them.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using bfloat16 = uint16_t;
using Narrow = ffi::Buffer<ffi::BF16>;
using Float32 = ffi::Buffer<ffi::F32>;
using Int32 = ffi::Buffer<ffi::S32>;

constexpr int kTile = 16;           // rows of a tile, or columns
constexpr int kPanel = 32;          // outputs that are computed together
constexpr int kInputs = 32;         // that a product of two tiles adds up
constexpr int kFewRows = 64;        // of x at most: then threads share out the matrix's rows, else x's
constexpr int kRows = 128;          // of x, at most, that a thread takes at a time
constexpr int kParts = 8;           // of matrices, at least, that threads take in turn
constexpr int kAhead = 1;           // panels of 32 outputs that are asked for early
constexpr int kBlock = 128;         // words of the vocabulary: the first level of a draw
constexpr int kQueries = 4;         // heads that read a page together
constexpr float kLeast = -3.0e38f;  // the logit of a token that is not seen

// What was stored is in memory from here on. Compilers do not know that tiles are loaded from there: between a store
// and the next tile that is loaded there must be this, or a new `Tiles`.
void Stored() { std::atomic_signal_fence(std::memory_order_seq_cst); }

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

// f(0), …, f(n - 1) by the threads there are. Whoever is free takes the next: this waits for nobody who has not begun.
// A helper may come when all is done and keep its copy of f, which holds what it needs by value, for longer; and f
// calls no `Each`, since its thread's buffers are taken.
template <class F>
void Each(ffi::ThreadPool& pool, int n, F f) {
  struct Progress {
    std::atomic<int> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto take = [=] {
    for (int i; (i = progress->next.fetch_add(1)) < n; progress->done.fetch_add(1)) f(i);
  };
  for (int helper = std::min<int>(pool.num_threads(), n) - 1; helper > 0; --helper) pool.Schedule([=] { take(); });
  take();
  while (progress->done.load() < n) _mm_pause();
}

int Ceil(int n, int unit) { return (n + unit - 1) / unit; }

__m512 Wide(const bfloat16* x) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

__m512 Wide(const float* x) { return _mm512_loadu_ps(x); }

float One(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

void Store(bfloat16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

void Store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }

// Of numbers not greater than 0, to 2e-7 of it (the polynomial of Cephes); below -87 it is 0, of NaN NaN.
__m512 Exp(__m512 x) {
  auto all = [](float y) { return _mm512_set1_ps(y); };
  const __mmask16 there = _mm512_cmp_ps_mask(x, all(-87.0f), _CMP_NLT_UQ);
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), _mm512_fnmadd_ps(n, all(0.693359375f), x));
  __m512 p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, all(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), all(1.0f));
  return _mm512_maskz_scalef_ps(there, p, n);
}

__m512 Capped(__m512 logits, float cap) {
  if (!cap) return logits;
  alignas(64) float x[16];
  _mm512_store_ps(x, logits);
  for (float& each : x) each = cap * std::tanh(each / cap);
  return _mm512_load_ps(x);
}

// Lanes of 16 that lie in [first, end).
__mmask16 Between(int first, int end) {
  auto below = [](int n) { return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1; };
  return static_cast<__mmask16>(below(end) & ~below(first));
}

void Transpose(__m512 (&x)[16]) {
  __m512 y[16];
  auto pd = [](__m512 a) { return _mm512_castps_pd(a); };
  auto ps = [](__m512d a) { return _mm512_castpd_ps(a); };
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = ps(_mm512_unpacklo_pd(pd(y[i + j]), pd(y[i + j + 2])));
      x[i + 2 * j + 1] = ps(_mm512_unpackhi_pd(pd(y[i + j]), pd(y[i + j + 2])));
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 16; j += 8) {
      y[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
  }
}

// Rows of I inputs, `stride` apart, as right tiles: [rows / 16, I / 2 pairs, 16 rows, 2], zeros in the place of more.
void PackRows(const bfloat16* x, int rows, int I, size_t stride, bfloat16* right) {
  for (int row = 0; row < rows; row += kTile) {
    for (int i = 0; i < I; i += kInputs, right += kTile * kInputs) {
      __m512 tile[16];
      for (int r = 0; r < kTile; ++r)
        tile[r] = row + r < rows ? _mm512_loadu_ps(x + (row + r) * stride + i) : _mm512_setzero_ps();
      Transpose(tile);
      for (int pair = 0; pair < kTile; ++pair) _mm512_storeu_ps(right + pair * kInputs, tile[pair]);
    }
  }
}

// S inputs of H columns, `stride` apart, as right tiles: [S / 32, H / 16, 16 pairs, 16 columns, 2]; zeros likewise.
void PackInputs(const bfloat16* x, int S, int H, size_t stride, bfloat16* right) {
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
    // What is read in two turns, which lies in one piece, is asked for now: the hardware guesses tiles' rows badly.
    const char* soon = reinterpret_cast<const char*>(upper + static_cast<size_t>(kAhead * kPanel) * I);
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
  auto* rows = reinterpret_cast<const bfloat16*>(x.untyped_data());
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

// Pages of tokens: keys [P, K, H, S], values [P, K, S, H].
struct Pages {
  const void *key, *value;
  const int32_t *start, *end;  // [P]
  const int32_t* page;         // [R, J], -1 where there is no more
  int J, S;
};

// Of a page what one row sees: tokens from `first` to `end`, with room for their logits.
template <class T>
struct Seen {
  const T *key, *value;
  int first, end, S;
  size_t logits;
};

struct Rule {
  float scale, cap;
};

// n heads of one row that share a key head read its pages and the row's own new token.
template <int n, class T>
void ReadPages(const bfloat16* query, const bfloat16* key, const bfloat16* value, const std::vector<Seen<T>>& seen,
               size_t room, Rule rule, int H, bfloat16* output) {
  static thread_local std::vector<float> logits;
  logits.resize(room * n);
  float wide[n][256], own[n], highest[n], total[n];
  for (int i = 0; i < n; ++i) {
    own[i] = 0;
    for (int h = 0; h < H; ++h) own[i] += (wide[i][h] = One(query[i * H + h])) * One(key[h]);
    own[i] *= rule.scale;
    highest[i] = own[i] = rule.cap ? rule.cap * std::tanh(own[i] / rule.cap) : own[i];
  }
  for (const Seen<T>& page : seen) {
    // Its values, and the keys of the next: by the time they are read they are here.
    const Seen<T>& next = &page == &seen.back() ? page : *(&page + 1);
    for (size_t at = 0; at < sizeof(T) * H * page.S; at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(page.value) + at, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(next.key) + at, _MM_HINT_T1);
    }
    for (int s = page.first / 16 * 16; s < page.end; s += 32) {
      const int beside = s + 16 < page.S ? 16 : 0;  // else the same ones twice
      __m512 sums[n][2];
      for (int i = 0; i < n; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
      for (int h = 0; h < H; ++h) {
        const T* keys = page.key + static_cast<size_t>(h) * page.S + s;
        const __m512 left = Wide(keys), right = Wide(keys + beside);
        for (int i = 0; i < n; ++i) {
          const __m512 query_h = _mm512_set1_ps(wide[i][h]);
          sums[i][0] = _mm512_fmadd_ps(query_h, left, sums[i][0]);
          sums[i][1] = _mm512_fmadd_ps(query_h, right, sums[i][1]);
        }
      }
      for (int i = 0; i < n; ++i) {
        for (int half = 0; half <= beside; half += 16) {
          const __m512 scaled = Capped(_mm512_mul_ps(sums[i][half / 16], _mm512_set1_ps(rule.scale)), rule.cap);
          const __mmask16 there = Between(page.first - s - half, page.end - s - half);
          const __m512 mine = _mm512_mask_mov_ps(_mm512_set1_ps(kLeast), there, scaled);
          highest[i] = std::max(highest[i], _mm512_reduce_max_ps(mine));
          _mm512_storeu_ps(&logits[(page.logits + s + half) * n + i * 16], mine);
        }
      }
    }
  }
  for (int i = 0; i < n; ++i) total[i] = own[i] = std::exp(own[i] - highest[i]);
  for (const Seen<T>& page : seen) {
    for (int s = page.first / 16 * 16; s < page.end; s += 16) {
      for (int i = 0; i < n; ++i) {
        float* at = &logits[(page.logits + s) * n + i * 16];
        const __m512 weights = _mm512_maskz_mov_ps(Between(page.first - s, page.end - s),
                                                   Exp(_mm512_sub_ps(_mm512_loadu_ps(at), _mm512_set1_ps(highest[i]))));
        total[i] += _mm512_reduce_add_ps(weights);
        _mm512_storeu_ps(at, weights);
      }
    }
  }
  for (int h = 0; h < H; h += 32) {
    __m512 sums[n][2];
    for (int i = 0; i < n; ++i)
      for (int half = 0; half < 2; ++half)
        sums[i][half] = _mm512_mul_ps(_mm512_set1_ps(own[i]), Wide(value + h + 16 * half));
    for (const Seen<T>& page : seen) {
      for (int s = page.first; s < page.end; ++s) {
        const T* values = page.value + static_cast<size_t>(s) * H + h;
        const __m512 left = Wide(values), right = Wide(values + 16);
        const float* weights = &logits[(page.logits + s / 16 * 16) * n + s % 16];
        for (int i = 0; i < n; ++i) {
          const __m512 weight = _mm512_set1_ps(weights[i * 16]);
          sums[i][0] = _mm512_fmadd_ps(weight, left, sums[i][0]);
          sums[i][1] = _mm512_fmadd_ps(weight, right, sums[i][1]);
        }
      }
    }
    for (int i = 0; i < n; ++i)
      for (int half = 0; half < 2; ++half)
        Store(output + i * H + h + 16 * half, _mm512_div_ps(sums[i][half], _mm512_set1_ps(total[i])));
  }
}

template <class T>
void ReadByAll(ffi::ThreadPool& pool, const bfloat16* query, const bfloat16* key, const bfloat16* value,
               const int32_t* place, int window, const std::vector<Pages>& pools, Rule rule, int R, int N, int K, int H,
               bfloat16* output) {
  auto shared = std::make_shared<std::vector<Pages>>(pools);
  Each(pool, R * K, [=](int part) {
    const int r = part / K, k = part % K, group = N / K;
    static thread_local std::vector<Seen<T>> seen;
    seen.clear();
    size_t room = 0;
    for (const Pages& pages : *shared) {
      for (int j = 0; j < pages.J; ++j) {
        const int p = pages.page[static_cast<size_t>(r) * pages.J + j];
        if (p < 0) continue;
        const int start = pages.start[p], oldest = window > place[r] ? 0 : place[r] - window + 1;
        const int first = std::max(0, oldest - start);
        const int end = std::min(pages.S, std::min(pages.end[p], place[r]) - start);
        if (first >= end) continue;
        const size_t at = (static_cast<size_t>(p) * K + k) * H * pages.S;
        auto *keys = static_cast<const T*>(pages.key) + at, *values = static_cast<const T*>(pages.value) + at;
        seen.push_back({keys, values, first, end, pages.S, room});
        room += pages.S;
      }
    }
    for (int first = 0; first < group; first += kQueries) {
      const size_t head = static_cast<size_t>(r) * N + k * group + first, own = (static_cast<size_t>(r) * K + k) * H;
      auto read = [&](auto f) { f(query + head * H, key + own, value + own, seen, room, rule, H, output + head * H); };
      switch (std::min(kQueries, group - first)) {
        case 1: read(ReadPages<1, T>); break;
        case 2: read(ReadPages<2, T>); break;
        case 3: read(ReadPages<3, T>); break;
        default: read(ReadPages<kQueries, T>);
      }
    }
  });
}

ffi::Error Paged(ffi::ThreadPool pool, float scale, float softcap, Narrow query, Narrow key, Narrow value, Int32 place,
                 Int32 window, ffi::RemainingArgs pools, ffi::Result<Narrow> output) {
  const int R = query.dimensions()[0], N = query.dimensions()[1], H = query.dimensions()[2], K = key.dimensions()[1];
  std::vector<Pages> all;
  bool wide = false;
  for (size_t i = 0; i < pools.size(); i += 5) {
    auto get = [&](size_t part) { return *pools.get<ffi::AnyBuffer>(i + part); };
    auto ints = [&](size_t part) { return static_cast<const int32_t*>(get(part).untyped_data()); };
    wide = get(0).element_type() == ffi::F32;
    all.push_back({get(0).untyped_data(), get(1).untyped_data(), ints(2), ints(3), ints(4),
                   static_cast<int>(get(4).dimensions()[1]), static_cast<int>(get(0).dimensions()[3])});
  }
  auto data = [](Narrow x) { return reinterpret_cast<const bfloat16*>(x.untyped_data()); };
  auto read = [&](auto f) {
    f(pool, data(query), data(key), data(value), place.typed_data(), *window.typed_data(), all, Rule{scale, softcap}, R,
      N, K, H, reinterpret_cast<bfloat16*>(output->untyped_data()));
  };
  if (wide)
    read(ReadByAll<float>);
  else
    read(ReadByAll<bfloat16>);
  return ffi::Error::Success();
}

// Queries of 16 tokens from `begin` on, one head, to the keys and values of `base` and later in right tiles.
void ReadBlock(const bfloat16* query, size_t stride, const bfloat16* keys, const bfloat16* values,
               const int32_t* segment, int begin, int base, int first, int T, int H, int window, Rule rule,
               bfloat16* output) {
  static thread_local std::vector<float> logits;
  static thread_local std::vector<bfloat16> weights;
  const int from = first / kInputs * kInputs, width = Ceil(begin + kTile - from, kInputs) * kInputs;
  const int rows = std::min(kTile, T - begin);
  logits.resize(static_cast<size_t>(kTile) * width);
  weights.assign(static_cast<size_t>(kTile) * width, 0);
  alignas(64) bfloat16 left[kTile * 256] = {};
  alignas(64) float sums[kTile * kTile], total[kTile];
  for (int t = 0; t < rows; ++t) std::memcpy(left + t * H, query + t * stride, H * 2);
  Stored();
  for (int s = 0; s < width; s += kTile) {
    _tile_zero(0);
    for (int h = 0; h < H; h += kInputs) {
      _tile_loadd(4, left + h, H * 2);
      _tile_loadd(5, keys + static_cast<size_t>(from - base + s) * H + h * kTile, 64);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, &logits[s], width * 4);
  }
  for (int t = 0; t < rows; ++t) {
    const int place = begin + t, oldest = std::max(first, window > place ? 0 : place - window + 1);
    float* mine = &logits[static_cast<size_t>(t) * width];
    float highest = kLeast;
    auto seen = [&](int s) {
      const __mmask16 near = Between(oldest - from - s, place + 1 - from - s);
      const __m512i others = _mm512_maskz_loadu_epi32(near, segment + from + s);
      return _mm512_mask_cmpeq_epi32_mask(near, others, _mm512_set1_epi32(segment[place]));
    };
    for (int s = 0; s <= place - from; s += 16) {
      const __m512 scaled = Capped(_mm512_mul_ps(_mm512_loadu_ps(mine + s), _mm512_set1_ps(rule.scale)), rule.cap);
      const __m512 masked = _mm512_mask_mov_ps(_mm512_set1_ps(kLeast), seen(s), scaled);
      highest = std::max(highest, _mm512_reduce_max_ps(masked));
      _mm512_storeu_ps(mine + s, masked);
    }
    __m512 sum = _mm512_setzero_ps();
    for (int s = 0; s <= place - from; s += 16) {
      const __m512 given = Exp(_mm512_sub_ps(_mm512_loadu_ps(mine + s), _mm512_set1_ps(highest)));
      const __m512 weight = _mm512_maskz_mov_ps(seen(s), given);
      sum = _mm512_add_ps(sum, weight);
      Store(&weights[static_cast<size_t>(t) * width + s], weight);
    }
    total[t] = _mm512_reduce_add_ps(sum);
  }
  Stored();
  for (int h = 0; h < H; h += kTile) {
    _tile_zero(0);
    for (int s = 0; s < width; s += kInputs) {
      _tile_loadd(4, &weights[s], width * 2);
      _tile_loadd(5, values + static_cast<size_t>(from - base + s) * H + h * kInputs, 64);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, sums, 64);
    for (int t = 0; t < rows; ++t)
      Store(output + t * stride + h, _mm512_div_ps(_mm512_load_ps(sums + t * kTile), _mm512_set1_ps(total[t])));
  }
}

ffi::Error Causal(ffi::ThreadPool pool, float scale, float softcap, int32_t window, Narrow query, Narrow key,
                  Narrow value, Int32 segment, ffi::Result<Narrow> output) {
  const int R = query.dimensions()[0], T = query.dimensions()[1], N = query.dimensions()[2];
  const int H = query.dimensions()[3], K = key.dimensions()[2], group = N / K, each = 4 * kTile, parts = Ceil(T, each);
  auto data = [](Narrow x) { return reinterpret_cast<const bfloat16*>(x.untyped_data()); };
  const bfloat16 *queries = data(query), *keys = data(key), *values = data(value);
  const int32_t* segments = segment.typed_data();
  auto* read = reinterpret_cast<bfloat16*>(output->untyped_data());
  Each(pool, R * K * parts, [=](int part) {
    static thread_local std::vector<bfloat16> key_tiles, value_tiles;
    const int r = part / (K * parts), k = part / parts % K;
    const int begin = part % parts * each, end = std::min(T, begin + each);
    const int32_t* mine = segments + static_cast<size_t>(r) * T;
    // The first token of the same segment as one of those from `t` on, of which a window leaves the newest.
    auto first_seen = [=](int t, int end) {
      int first = t;
      for (int s = 0; s < first; ++s)
        if (std::find(mine + t, mine + end, mine[s]) != mine + end) first = s;
      return std::max(first, window > t ? 0 : t - window + 1);
    };
    const int base = first_seen(begin, end) / kInputs * kInputs, room = Ceil(end - base, kInputs) * kInputs + kInputs;
    const size_t at = ((static_cast<size_t>(r) * T + base) * K + k) * H, stride = static_cast<size_t>(K) * H;
    key_tiles.assign(static_cast<size_t>(room) * H, 0), value_tiles.assign(static_cast<size_t>(room) * H, 0);
    PackRows(keys + at, end - base, H, stride, key_tiles.data());
    PackInputs(values + at, end - base, H, stride, value_tiles.data());
    Tiles tiles;
    for (int t = begin; t < end; t += kTile) {
      const int first = first_seen(t, std::min(end, t + kTile));
      for (int head = k * group; head < (k + 1) * group; ++head) {
        const size_t mine_at = ((static_cast<size_t>(r) * T + t) * N + head) * H;
        ReadBlock(queries + mine_at, static_cast<size_t>(N) * H, key_tiles.data(), value_tiles.data(), mine, t, base,
                  first, T, H, window, Rule{scale, softcap}, read + mine_at);
      }
    }
  });
  return ffi::Error::Success();
}

// The largest threshold from 0 to 1 by which the weights that reach it, and `least`, sum to `enough`, or are so many;
// else 0. Two bits of the threshold at a time, as in scoring.py.
float Largest(const float* weights, int V, float least, float enough, bool counted) {
  auto number = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  const __m512 one = _mm512_set1_ps(1.0f);
  uint32_t bits = 0;
  for (int shift = 28; shift >= 0; shift -= 2) {
    __m512 thresholds[3], sums[3];
    for (uint32_t digit = 1; digit <= 3; ++digit) {
      thresholds[digit - 1] = _mm512_set1_ps(std::max(number(bits | digit << shift), least));
      sums[digit - 1] = _mm512_setzero_ps();
    }
    for (int v = 0; v < V; v += 16) {
      const __m512 weight = _mm512_loadu_ps(weights + v);
      for (int i = 0; i < 3; ++i) {
        const __mmask16 kept = _mm512_cmp_ps_mask(weight, thresholds[i], _CMP_GE_OQ);
        sums[i] = _mm512_mask_add_ps(sums[i], kept, sums[i], counted ? one : weight);
      }
    }
    uint32_t chosen = bits;
    for (uint32_t digit = 1; digit <= 3; ++digit)
      if (_mm512_reduce_add_ps(sums[digit - 1]) >= enough) chosen = bits | digit << shift;
    bits = chosen;
  }
  return std::min(number(bits), 1.0f);  // all bits are set where `enough` is 0
}

float Sum(const float* weights, int V, float least) {
  __m512 sum = _mm512_setzero_ps();
  for (int v = 0; v < V; v += 16) {
    const __m512 weight = _mm512_loadu_ps(weights + v);
    sum = _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(weight, _mm512_set1_ps(least), _CMP_GE_OQ), sum, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

struct Choice {
  float temperature, top_p, top_k, min_p;
};

// Of one row of logits: the weights that a token is drawn by, the greatest 1 and 0 what is cut off; and the logarithm
// of the sum of exp(logit) over the whole vocabulary.
float Weigh(const float* logits, int V, const Choice& choice, float* weights) {
  __m512 greatest = _mm512_set1_ps(-INFINITY), all = _mm512_setzero_ps();
  for (int v = 0; v < V; v += 16) greatest = _mm512_max_ps(greatest, _mm512_loadu_ps(logits + v));
  const float most = _mm512_reduce_max_ps(greatest);
  const bool heated = choice.temperature > 0 && choice.temperature != 1;
  const __m512 scale = _mm512_set1_ps(heated ? 1 / choice.temperature : 1);
  for (int v = 0; v < V; v += 16) {
    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(logits + v), _mm512_set1_ps(most)), plain = Exp(below);
    all = _mm512_add_ps(all, plain);
    _mm512_storeu_ps(weights + v, heated ? Exp(_mm512_mul_ps(below, scale)) : plain);
  }
  const float log_total = most + std::log(_mm512_reduce_add_ps(all));
  if (choice.temperature <= 0) {
    std::fill_n(weights, V, 0.0f);
    const float* first = std::find(logits, logits + V, most);
    if (first < logits + V) weights[first - logits] = 1;
    return log_total;
  }
  if (choice.top_k <= 0 && choice.top_p >= 1 && choice.min_p <= 0) return log_total;
  const float least = choice.top_k > 0 ? Largest(weights, V, 0, choice.top_k, true) : 0;
  auto nucleus_of = [&] { return Largest(weights, V, least, choice.top_p * Sum(weights, V, least), false); };
  const float nucleus = choice.top_p < 1 ? nucleus_of() : 0;
  const __m512 threshold = _mm512_set1_ps(std::max({nucleus, least, choice.min_p}));
  for (int v = 0; v < V; v += 16) {
    const __m512 weight = _mm512_loadu_ps(weights + v);
    const __mmask16 kept = _mm512_cmp_ps_mask(weight, threshold, _CMP_GE_OQ);
    _mm512_storeu_ps(weights + v, _mm512_maskz_mov_ps(kept, weight));
  }
  return log_total;
}

// The first index of positive mass whose cumulative mass exceeds the target, else the last of positive mass; the target
// becomes what is left of it there.
int Quantile(const float* masses, int n, float& target) {
  int index = 0;
  float before = 0, sum = 0;
  for (int i = 0; i < n; sum += masses[i++]) {
    if (masses[i] <= 0) continue;
    index = i, before = sum;
    if (sum + masses[i] > target) break;
  }
  target -= before;
  return index;
}

ffi::Error Draw(ffi::ThreadPool pool, Float32 logits, Float32 choice, Float32 uniform, ffi::Result<Int32> token,
                ffi::Result<Float32> behaviour, ffi::Result<Float32> plain) {
  const int R = logits.dimensions()[0], V = logits.dimensions()[1];
  const float *x = logits.typed_data(), *how = choice.typed_data(), *quantile = uniform.typed_data();
  int32_t* drawn = token->typed_data();
  float *of_behaviour = behaviour->typed_data(), *of_all = plain->typed_data();
  Each(pool, R, [=](int r) {
    static thread_local std::vector<float> weights, masses;
    weights.resize(V), masses.clear();
    const float* mine = x + static_cast<size_t>(r) * V;
    const float log_total = Weigh(mine, V, {how[0], how[1], how[2], how[3]}, weights.data());
    float total = 0;
    for (int v = 0; v < V; v += kBlock) {
      masses.push_back(Sum(&weights[v], std::min(kBlock, V - v), 0));
      total += masses.back();
    }
    float target = quantile[r] * total;
    const int first = Quantile(masses.data(), masses.size(), target) * kBlock;
    const int chosen = first + Quantile(&weights[first], std::min(kBlock, V - first), target);
    drawn[r] = chosen;
    of_behaviour[r] = std::isnan(log_total) ? log_total : std::log(weights[chosen] / total);
    of_all[r] = mine[chosen] - log_total;
  });
  return ffi::Error::Success();
}

}  // namespace

// Asks Linux for the tiles, which a process has to; 0 where it may use them.
extern "C" int advgame_amx_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_products, Products,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Narrow>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_paged, Paged,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Arg<Narrow>()
                                  .Arg<Narrow>()
                                  .Arg<Narrow>()
                                  .Arg<Int32>()
                                  .Arg<Int32>()
                                  .RemainingArgs()
                                  .Ret<Narrow>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_causal, Causal,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int32_t>("window")
                                  .Arg<Narrow>()
                                  .Arg<Narrow>()
                                  .Arg<Narrow>()
                                  .Arg<Int32>()
                                  .Ret<Narrow>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_draw, Draw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Ret<Int32>()
                                  .Ret<Float32>()
                                  .Ret<Float32>());
