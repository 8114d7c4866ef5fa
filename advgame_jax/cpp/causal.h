// Causal attention of packed rows.

#pragma once

#include "attention.h"
#include "blocks.h"
#include "threads.h"
#include "tiles.h"

namespace {

// 16 queries [16, H] times keys in right tiles → logits [16, width], before they are scaled.
void Compare(const bfloat16* queries, const bfloat16* keys, int H, int width, float* logits) {
  for (int s = 0; s < width; s += kTile) {
    _tile_zero(0);
    for (int h = 0; h < H; h += kInputs) {
      _tile_loadd(4, queries + h, H * 2);
      _tile_loadd(5, keys + static_cast<size_t>(s) * H + h * kTile, 64);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, logits + s, width * 4);
  }
}

void Compare(const float* queries, const float* keys, int H, int width, float* logits) {
  for (int s = 0; s < width; s += 2 * kTile) {
    for (int t = 0; t < kTile; t += kBlockRows) {
      float* to = logits + static_cast<size_t>(t) * width + s;
      ContractBlock(queries + t * H, H, H, queries, keys + static_cast<size_t>(s) * H, H, {to, to + kTile}, width);
    }
  }
}

// Weights [16, width] times the values from `first` on of `room` in right tiles → [16, H].
void Gather(const bfloat16* weights, const bfloat16* values, int first, int, int H, int width, float* read) {
  for (int h = 0; h < H; h += kTile) {
    _tile_zero(0);
    for (int s = 0; s < width; s += kInputs) {
      _tile_loadd(4, weights + s, width * 2);
      _tile_loadd(5, values + static_cast<size_t>(first + s) * H + h * kInputs, 64);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, read + h, H * 4);
  }
}

// Values are added one after the other from the first, so that what is read depends on no place in the row.
void Gather(const float* weights, const float* values, int first, int room, int H, int width, float* read) {
  for (int h = 0; h < H; h += 2 * kTile) {
    const float* right = values + (static_cast<size_t>(h) / kTile * room + first) * kTile;
    for (int t = 0; t < kTile; t += kBlockRows) {
      float* to = read + t * H + h;
      ContractBlock(weights + static_cast<size_t>(t) * width, width, width, weights, right, room, {to, to + kTile}, H);
    }
  }
}

// What the queries of a part of a row see of one key head: its tokens from `base` on, in right tiles with room for so
// many; and the segments of all the row's tokens.
template <class T>
struct Past {
  const T *keys, *values;
  const int32_t* segment;
  int base, room, tokens, H, window;
  Rule rule;

  // The first token of the same segment as one of those from `begin` on, of which a window leaves the newest.
  int FirstSeen(int begin, int end) const {
    int first = begin;
    for (int s = 0; s < first; ++s)
      if (std::find(segment + begin, segment + end, segment[s]) != segment + end) first = s;
    return std::max(first, window > begin ? 0 : begin - window + 1);
  }
};

// Row r's, before a key head's tokens are in their tiles.
template <class T>
Past<T> PastOfRow(const int32_t* segments, int r, int tokens, int H, int window, Rule rule) {
  return {nullptr, nullptr, segments + static_cast<size_t>(r) * tokens, 0, 0, tokens, H, window, rule};
}

// Of the query at a place its products with the keys there are from `first` on → their logits, and weights, which are
// rounded, and 0 of what it does not see. Returns the weights' sum.
template <class T>
float Weigh(const Past<T>& past, int place, int first, float* products, T* weights) {
  const int own = past.segment[place];
  int oldest = std::max(first, past.window > place ? 0 : place - past.window + 1);
  while (past.segment[oldest] != own) ++oldest;  // sums begin with the first that is seen, wherever that is
  float highest = kLeast;
  auto seen = [&](int s) {
    const __mmask16 near = Between(0, place + 1 - s);
    const __m512i others = _mm512_maskz_loadu_epi32(near, past.segment + s);
    return _mm512_mask_cmpeq_epi32_mask(near, others, _mm512_set1_epi32(own));
  };
  for (int s = oldest; s <= place; s += kLanes) {
    const __m512 masked = Masked(seen(s), Logits(_mm512_loadu_ps(products + s), past.rule));
    highest = std::max(highest, _mm512_reduce_max_ps(masked));
    _mm512_mask_storeu_ps(products + s, Between(0, place + 1 - s), masked);
  }
  __m512 sum = _mm512_setzero_ps();
  for (int s = oldest; s <= place; s += kLanes) {
    const __mmask16 near = Between(0, place + 1 - s);
    const __m512 weight = Exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(near, products + s), _mm512_set1_ps(highest)));
    const __m512 of_seen = _mm512_maskz_mov_ps(seen(s), weight);
    sum = _mm512_add_ps(sum, of_seen);
    StoreSome(weights + s, near, of_seen);
  }
  return _mm512_reduce_add_ps(sum);
}

// Queries of 16 tokens from `begin` on, one head; none sees what is before `first`.
template <class T>
void ReadBlock(const T* query, size_t stride, const Past<T>& past, int begin, int first, T* output) {
  static thread_local Lines<float> logits;
  static thread_local Lines<T> weights;
  const int H = past.H, from = first / kInputs * kInputs, rows = std::min(kTile, past.tokens - begin);
  const int width = Ceil(begin + kTile - from, kInputs) * kInputs;
  logits.resize(static_cast<size_t>(kTile) * width + kTile);
  weights.assign(static_cast<size_t>(kTile) * width + kTile, 0);
  alignas(64) T queries[kTile * 256] = {};
  alignas(64) float read[kTile * 256], total[kTile];
  for (int t = 0; t < rows; ++t) std::memcpy(queries + t * H, query + t * stride, H * sizeof(T));
  Stored();
  Compare(queries, past.keys + static_cast<size_t>(from - past.base) * H, H, width, logits.data());
  for (int t = 0; t < rows; ++t) {
    const size_t at = static_cast<size_t>(t) * width;
    total[t] = Weigh(past, begin + t, first, logits.data() + at - from, weights.data() + at - from);
  }
  Stored();
  Gather(weights.data(), past.values, from - past.base, past.room, H, width, read);
  for (int t = 0; t < rows; ++t)
    for (int h = 0; h < H; h += kTile)
      Store(output + t * stride + h, _mm512_div_ps(_mm512_load_ps(read + t * H + h), _mm512_set1_ps(total[t])));
}

// The queries of row r that read key head k, from `begin` on and below `end`.
template <class T>
void ReadPart(const T* query, const T* key, const T* value, int r, int begin, int end, int k, int N, int K,
              Past<T> past, T* output) {
  static thread_local Lines<T> keys, values;
  const int H = past.H;
  past.base = past.FirstSeen(begin, end) / kInputs * kInputs;
  past.room = Ceil(end - past.base, kInputs) * kInputs + kInputs;
  const size_t at = ((static_cast<size_t>(r) * past.tokens + past.base) * K + k) * H;
  const size_t stride = static_cast<size_t>(K) * H, numbers = static_cast<size_t>(past.room) * H;
  keys.assign(numbers, 0), values.assign(numbers, 0);
  PackRows(key + at, end - past.base, H, stride, keys.data());
  PackInputs(value + at, end - past.base, H, stride, past.room, values.data());
  past.keys = keys.data(), past.values = values.data();
  TilesOf<T> tiles;
  for (int t = begin; t < end; t += kTile) {
    const int first = past.FirstSeen(t, std::min(end, t + kTile)), group = N / K;
    for (int head = k * group; head < (k + 1) * group; ++head) {
      const size_t mine = ((static_cast<size_t>(r) * past.tokens + t) * N + head) * H;
      ReadBlock(query + mine, static_cast<size_t>(N) * H, past, t, first, output + mine);
    }
  }
}

ffi::Error Causal(ffi::ThreadPool pool, float scale, float softcap, int32_t window, ffi::AnyBuffer query,
                  ffi::AnyBuffer key, ffi::AnyBuffer value, Int32 segment, ffi::Result<ffi::AnyBuffer> output) {
  const int R = query.dimensions()[0], tokens = query.dimensions()[1], N = query.dimensions()[2];
  const int H = query.dimensions()[3], K = key.dimensions()[2], each = 4 * kTile, parts = Ceil(tokens, each);
  const int32_t* segments = segment.typed_data();
  ByType(query, [&](auto T) {
    auto data = [](ffi::AnyBuffer x) { return Data<decltype(T)>(x); };
    auto *queries = data(query), *keys = data(key), *values = data(value);
    auto* read = Data<decltype(T)>(output);
    Each(pool, R * K * parts, [=](int part) {
      const int r = part / (K * parts), k = part / parts % K, begin = part % parts * each;
      const auto past = PastOfRow<decltype(T)>(segments, r, tokens, H, window, {scale, softcap});
      ReadPart(queries, keys, values, r, begin, std::min(tokens, begin + each), k, N, K, past, read);
    });
  });
  return ffi::Error::Success();
}

// A rule, and queries, keys, values and segments.
inline auto BindRows() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<float>("scale")
      .Attr<float>("softcap")
      .Attr<int32_t>("window")
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Int32>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_causal, Causal, BindRows().Ret<ffi::AnyBuffer>());
