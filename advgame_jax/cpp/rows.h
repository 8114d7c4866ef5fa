// What a layer does with each row beside products and attention.

#pragma once

#include "threads.h"
#include "vectors.h"

namespace {

// Rows of M numbers at their root mean square: x / sqrt(mean x² + epsilon) · (scale + offset).
void NormRow(const bfloat16* x, const bfloat16* scale, int M, float epsilon, float offset, bfloat16* y) {
  __m512 sum = _mm512_setzero_ps();
  for (int m = 0; m < M; m += kLanes) sum = _mm512_fmadd_ps(Wide(x + m), Wide(x + m), sum);
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(sum) / M + epsilon));
  for (int m = 0; m < M; m += kLanes) {
    const __m512 weight = _mm512_add_ps(Wide(scale + m), _mm512_set1_ps(offset));
    Store(y + m, _mm512_mul_ps(_mm512_mul_ps(Wide(x + m), factor), weight));
  }
}

ffi::Error Norm(ffi::ThreadPool pool, float epsilon, float offset, Narrow x, Narrow scale, ffi::Result<Narrow> y) {
  const int M = scale.element_count(), X = x.element_count() / M;
  const bfloat16 *rows = Data(x), *weights = Data(scale);
  bfloat16* out = Data(y);
  EachOf(pool, X, M, [=](size_t row) { NormRow(rows + row * M, weights, M, epsilon, offset, out + row * M); });
  return ffi::Error::Success();
}

// Of the first 2h dimensions of H, i is turned with i + h.
ffi::Error Rotate(ffi::ThreadPool pool, Narrow x, Float32 cos, Float32 sin, ffi::Result<Narrow> y) {
  const int N = x.dimensions()[2], H = x.dimensions()[3], h = cos.dimensions()[3];
  const int X = x.element_count() / (N * H), turns = cos.element_count() / h;
  const bfloat16* tokens = Data(x);
  const float *cosines = cos.typed_data(), *sines = sin.typed_data();
  bfloat16* out = Data(y);
  EachOf(pool, X, N * H, [=](size_t token) {
    const float *c = cosines + token % turns * h, *s = sines + token % turns * h;
    for (int n = 0; n < N; ++n) {
      const bfloat16* from = tokens + (token * N + n) * H;
      bfloat16* to = out + (token * N + n) * H;
      for (int i = 0; i < h; i += kLanes) {
        const __m512 left = Wide(from + i), right = Wide(from + h + i), cosine = Wide(c + i), sine = Wide(s + i);
        Store(to + i, _mm512_fnmadd_ps(right, sine, _mm512_mul_ps(left, cosine)));
        Store(to + h + i, _mm512_fmadd_ps(left, sine, _mm512_mul_ps(right, cosine)));
      }
      std::copy(from + 2 * h, from + H, to + 2 * h);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<float>("offset")
                                  .Arg<Narrow>()
                                  .Arg<Narrow>()
                                  .Ret<Narrow>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_rotate, Rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Narrow>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Ret<Narrow>());
