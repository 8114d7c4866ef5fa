// Gradients of causal attention, in float32 whatever the numbers' type. Nothing is kept of the forward pass.

#pragma once

#include "causal.h"

namespace {

// One key head of a row: its first token's numbers, and those of the first query head that reads it.
template <class T>
struct KeyHead {
  const T *query, *key, *value, *slope;
  T *query_slope, *key_slope, *value_slope;
  size_t queries, keys;  // numbers from a token to the next
  int group;             // query heads
};

// Rows of H numbers, so far apart.
template <class From, class To>
void CopyRows(const From* x, size_t x_stride, int rows, int H, To* y, size_t y_stride) {
  for (int row = 0; row < rows; ++row)
    for (int h = 0; h < H; h += kLanes) Store(y + row * y_stride + h, Wide(x + row * x_stride + h));
}

// [X, width] → [width, X], both multiples of 16.
void TurnOver(const float* x, int X, int width, float* turned) {
  for (int row = 0; row < X; row += kTile) {
    for (int s = 0; s < width; s += kTile) {
      __m512 tile[kTile];
      for (int i = 0; i < kTile; ++i) tile[i] = _mm512_loadu_ps(x + static_cast<size_t>(row + i) * width + s);
      Transpose(tile);
      for (int i = 0; i < kTile; ++i) _mm512_storeu_ps(turned + static_cast<size_t>(s + i) * X + row, tile[i]);
    }
  }
}

// Of the query at a place: its products with keys, and its slope's with values → the latter's place takes the slopes of
// the former; and weights that sum to 1.
void SlopesOfProducts(const Past<float>& past, int place, int first, float* products, float* slopes, float* weights) {
  const __m512 total = _mm512_set1_ps(Weigh(past, place, first, products, weights));
  __m512 sum = _mm512_setzero_ps();
  for (int s = first; s <= place; s += kLanes) {
    const __mmask16 near = Between(0, place + 1 - s);
    const __m512 weight = _mm512_div_ps(_mm512_maskz_loadu_ps(near, weights + s), total);
    sum = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(near, slopes + s), sum);
    _mm512_mask_storeu_ps(weights + s, near, weight);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), scale = _mm512_set1_ps(past.rule.scale);
  const __m512 over_cap = _mm512_set1_ps(past.rule.cap ? 1 / past.rule.cap : 0);
  for (int s = first; s <= place; s += kLanes) {
    const __mmask16 near = Between(0, place + 1 - s);
    const __m512 weight = _mm512_maskz_loadu_ps(near, weights + s);
    const __mmask16 weighs = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 capped = _mm512_mul_ps(_mm512_maskz_loadu_ps(weighs, products + s), over_cap);
    const __m512 above = _mm512_sub_ps(_mm512_maskz_loadu_ps(near, slopes + s), mean);
    const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(weight, above), scale);
    _mm512_mask_storeu_ps(slopes + s, near, _mm512_fnmadd_ps(_mm512_mul_ps(slope, capped), capped, slope));
  }
}

// Adds [X, width] turned over times [X, H] to a sum [width, H]; `turned` and `right` have room for both as they are
// read.
void AddTurned(const float* x, int X, int width, const float* y, int H, float* turned, float* right, float* sum) {
  TurnOver(x, X, width, turned);
  PackInputs(y, X, H, H, X, right);
  for (int s = 0; s < width; s += kBlockRows) {
    const float *block = turned + static_cast<size_t>(s) * X, *then = block + kBlockRows * X;
    for (int h = 0; h < H; h += 2 * kTile) {
      float* to = sum + static_cast<size_t>(s) * H + h;
      ContractBlock<true>(block, X, X, then, right + static_cast<size_t>(h) * X, X, {to, to + kTile}, H);
    }
  }
}

template <class T>
void SlopesOfHead(const KeyHead<T>& head, Past<float> past) {
  // In float32: keys and values as they are, in right tiles and as inputs; sums of slopes; of some queries they and
  // their slopes, what they give, products with keys and with values, weights; and what `AddTurned` needs.
  static thread_local Lines<float> wide, keys, inputs, values, key_sum, value_sum, query, slope, read, products, slopes,
      weights, turned, right;
  const int H = past.H, X = kTile * head.group;
  past.room = Ceil(past.tokens, kInputs) * kInputs + kInputs;
  const size_t numbers = static_cast<size_t>(past.room) * H, logits = static_cast<size_t>(X) * past.room;
  for (auto* x : {&wide, &keys, &inputs, &values, &key_sum, &value_sum}) x->assign(numbers, 0);
  for (auto* x : {&products, &slopes, &weights, &turned}) x->resize(logits + kBlockRows * X);
  for (auto* x : {&query, &slope, &read, &right}) x->resize(static_cast<size_t>(X) * H);
  CopyRows(head.key, head.keys, past.tokens, H, wide.data(), H);
  PackRows(wide.data(), past.tokens, H, H, keys.data());
  PackInputs(wide.data(), past.tokens, H, H, past.room, inputs.data());
  CopyRows(head.value, head.keys, past.tokens, H, wide.data(), H);
  PackRows(wide.data(), past.tokens, H, H, values.data());
  for (int begin = 0; begin < past.tokens; begin += kTile) {
    const int rows = std::min(kTile, past.tokens - begin), first = past.FirstSeen(begin, begin + rows);
    const int from = first / kTile * kTile, width = Ceil(begin + kTile - from, kInputs) * kInputs;
    const size_t at = static_cast<size_t>(from) * H, block = static_cast<size_t>(kTile) * H;
    std::fill(query.begin(), query.end(), 0), std::fill(slope.begin(), slope.end(), 0);
    std::fill_n(weights.begin(), static_cast<size_t>(X) * width, 0);
    for (int n = 0; n < head.group; ++n) {
      const size_t mine = begin * head.queries + n * H, to = static_cast<size_t>(n) * kTile * width;
      CopyRows(head.query + mine, head.queries, rows, H, query.data() + n * block, H);
      CopyRows(head.slope + mine, head.queries, rows, H, slope.data() + n * block, H);
      Compare(query.data() + n * block, keys.data() + at, H, width, products.data() + to);
      Compare(slope.data() + n * block, values.data() + at, H, width, slopes.data() + to);
      for (int t = 0; t < kTile; ++t) {
        const size_t row = to + static_cast<size_t>(t) * width;
        float *products_t = products.data() + row - from, *slopes_t = slopes.data() + row - from;
        const int place = begin + t;
        if (t < rows) SlopesOfProducts(past, place, first, products_t, slopes_t, weights.data() + row - from);
        // 0 of what comes later, and of what no query of these sees.
        std::fill(slopes_t + from, slopes_t + first, 0);
        std::fill(slopes_t + (t < rows ? place + 1 : first), slopes_t + from + width, 0);
      }
      Gather(slopes.data() + to, inputs.data(), from, past.room, H, width, read.data() + n * block);
      CopyRows(read.data() + n * block, H, rows, H, head.query_slope + mine, head.queries);
    }
    AddTurned(slopes.data(), X, width, query.data(), H, turned.data(), right.data(), key_sum.data() + at);
    AddTurned(weights.data(), X, width, slope.data(), H, turned.data(), right.data(), value_sum.data() + at);
  }
  CopyRows(key_sum.data(), H, past.tokens, H, head.key_slope, head.keys);
  CopyRows(value_sum.data(), H, past.tokens, H, head.value_slope, head.keys);
}

ffi::Error CausalSlopes(ffi::ThreadPool pool, float scale, float softcap, int32_t window, ffi::AnyBuffer query,
                        ffi::AnyBuffer key, ffi::AnyBuffer value, Int32 segment, ffi::AnyBuffer slope,
                        ffi::Result<ffi::AnyBuffer> query_slope, ffi::Result<ffi::AnyBuffer> key_slope,
                        ffi::Result<ffi::AnyBuffer> value_slope) {
  const int R = query.dimensions()[0], tokens = query.dimensions()[1], N = query.dimensions()[2];
  const int H = query.dimensions()[3], K = key.dimensions()[2];
  const int32_t* segments = segment.typed_data();
  ByType(query, [&](auto T) {
    auto data = [](auto& x) { return Data<decltype(T)>(x); };
    KeyHead<decltype(T)> all{};
    all.query = data(query), all.key = data(key), all.value = data(value), all.slope = data(slope);
    all.query_slope = data(query_slope), all.key_slope = data(key_slope), all.value_slope = data(value_slope);
    all.queries = static_cast<size_t>(N) * H, all.keys = static_cast<size_t>(K) * H, all.group = N / K;
    Each(pool, R * K, [=](int part) {
      const int r = part / K, k = part % K;
      const size_t q = (static_cast<size_t>(r) * tokens * N + k * all.group) * H;
      const size_t kv = (static_cast<size_t>(r) * tokens * K + k) * H;
      auto head = all;
      head.query += q, head.slope += q, head.query_slope += q;
      head.key += kv, head.value += kv, head.key_slope += kv, head.value_slope += kv;
      SlopesOfHead(head, PastOfRow<float>(segments, r, tokens, H, window, {scale, softcap}));
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_causal_slopes, CausalSlopes,
                              BindRows()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
