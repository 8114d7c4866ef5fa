// What a layer does with each row beside products and attention.

#pragma once

#include "threads.h"
#include "vectors.h"

namespace {

// Rows of M numbers at their root mean square: x / sqrt(mean x² + epsilon) · (scale + offset).
template <class T>
void NormRow(const T* x, const T* scale, int M, float epsilon, float offset, T* y) {
  __m512 sum = _mm512_setzero_ps();
  for (int m = 0; m < M; m += kLanes) sum = _mm512_fmadd_ps(Wide(x + m), Wide(x + m), sum);
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(sum) / M + epsilon));
  for (int m = 0; m < M; m += kLanes) {
    const __m512 weight = _mm512_add_ps(Wide(scale + m), _mm512_set1_ps(offset));
    Store(y + m, _mm512_mul_ps(_mm512_mul_ps(Wide(x + m), factor), weight));
  }
}

ffi::Error Norm(ffi::ThreadPool pool, float epsilon, float offset, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                ffi::Result<ffi::AnyBuffer> y) {
  const int M = scale.element_count(), X = x.element_count() / M;
  ByType(x, [&](auto T) {
    auto *rows = Data<decltype(T)>(x), *weights = Data<decltype(T)>(scale);
    auto* out = Data<decltype(T)>(y);
    EachOf(pool, X, M, [=](size_t row) { NormRow(rows + row * M, weights, M, epsilon, offset, out + row * M); });
  });
  return ffi::Error::Success();
}

// Of the first 2h dimensions of H, i is turned with i + h: N heads of one token.
template <class T>
void RotateToken(const T* from, const float* cos, const float* sin, int N, int H, int h, T* to) {
  for (int n = 0; n < N; ++n, from += H, to += H) {
    for (int i = 0; i < h; i += kLanes) {
      const __m512 left = Wide(from + i), right = Wide(from + h + i), cosine = Wide(cos + i), sine = Wide(sin + i);
      Store(to + i, _mm512_fnmadd_ps(right, sine, _mm512_mul_ps(left, cosine)));
      Store(to + h + i, _mm512_fmadd_ps(left, sine, _mm512_mul_ps(right, cosine)));
    }
    std::copy(from + 2 * h, from + H, to + 2 * h);
  }
}

ffi::Error Rotate(ffi::ThreadPool pool, ffi::AnyBuffer x, Float32 cos, Float32 sin, ffi::Result<ffi::AnyBuffer> y) {
  const int N = x.dimensions()[2], H = x.dimensions()[3], h = cos.dimensions()[3];
  const int X = x.element_count() / (N * H), turns = cos.element_count() / h;
  const float *cosines = cos.typed_data(), *sines = sin.typed_data();
  ByType(x, [&](auto T) {
    auto* tokens = Data<decltype(T)>(x);
    auto* out = Data<decltype(T)>(y);
    EachOf(pool, X, N * H, [=](size_t token) {
      const size_t at = token * N * H, turn = token % turns * h;
      RotateToken(tokens + at, cosines + turn, sines + turn, N, H, h, out + at);
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<float>("offset")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_rotate, Rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Ret<ffi::AnyBuffer>());
