// Causal attention of packed rows.

#pragma once

#include "attention.h"
#include "threads.h"
#include "tiles.h"

namespace {

// Queries of 16 tokens from `begin` on, one head, to the keys and values of `base` and later in right tiles.
void ReadBlock(const bfloat16* query, size_t stride, const bfloat16* keys, const bfloat16* values,
               const int32_t* segment, int begin, int base, int first, int T, int H, int window, Rule rule,
               bfloat16* output) {
  static thread_local Lines<float> logits;
  static thread_local Lines<bfloat16> weights;
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
      const __m512 masked = Masked(seen(s), Logits(_mm512_loadu_ps(mine + s), rule));
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
  const bfloat16 *queries = Data(query), *keys = Data(key), *values = Data(value);
  const int32_t* segments = segment.typed_data();
  bfloat16* read = Data(output);
  Each(pool, R * K * parts, [=](int part) {
    static thread_local Lines<bfloat16> key_tiles, value_tiles;
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

}  // namespace

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
