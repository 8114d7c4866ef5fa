// Sixteen numbers at a time.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using bfloat16 = uint16_t;
using Float32 = ffi::Buffer<ffi::F32>;
using Int32 = ffi::Buffer<ffi::S32>;

namespace {

constexpr int kLanes = 16;

// f(0), …, f(n - 1), each written out: what such numbers choose stays in registers.
template <int n, class F>
[[gnu::always_inline]] inline void For(F f) {
  if constexpr (n > 1) For<n - 1>(f);
  f(std::integral_constant<int, n - 1>());
}

// Memory from the beginning of a cache line on: tiles' rows that lie in two lines each load half as fast.
template <class T>
struct FromLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  FromLines() = default;
  template <class U>
  FromLines(const FromLines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* x, size_t) { ::operator delete(x, kLine); }
  bool operator==(const FromLines&) const { return true; }
  bool operator!=(const FromLines&) const { return false; }
};

template <class T>
using Lines = std::vector<T, FromLines<T>>;

template <class T>
const T* Data(const ffi::AnyBuffer& x) {
  return static_cast<const T*>(x.untyped_data());
}

template <class T>
T* Data(ffi::Result<ffi::AnyBuffer>& x) {
  return static_cast<T*>(x->untyped_data());
}

// f of a number of the type that these are: float or bfloat16.
template <class F>
void ByType(const ffi::AnyBuffer& x, F f) {
  x.element_type() == ffi::F32 ? f(float()) : f(bfloat16());
}

inline __m512 Wide(const bfloat16* x) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline __m512 Wide(const float* x) { return _mm512_loadu_ps(x); }

inline float One(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void Store(bfloat16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

inline void Store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }

inline void StoreSome(bfloat16* to, __mmask16 some, __m512 x) {
  _mm256_mask_storeu_epi16(to, some, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

inline void StoreSome(float* to, __mmask16 some, __m512 x) { _mm512_mask_storeu_ps(to, some, x); }

// Rounded and side by side: 16 pairs; and the numbers of such pairs.
inline __m512 Pairs(__m512 first, __m512 second) {
  const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  const auto narrow = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, narrow));
}

inline __m512 First(__m512 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }

inline __m512 Second(__m512 pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(0xffff0000)));
}

// 32 numbers that lie side by side: 16 and the next 16; of bfloat16 in turn, which is one step less.
struct Two {
  __m512 first, second;
};

inline Two WideTwo(const bfloat16* x, __mmask32 there = ~0u) {
  const __m512 pairs = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, x));
  return {First(pairs), Second(pairs)};
}

inline Two WideTwo(const float* x, __mmask32 there = ~0u) {
  return {_mm512_maskz_loadu_ps(there, x), _mm512_maskz_loadu_ps(there >> kLanes, x + kLanes)};
}

// As they lie side by side where what was so loaded was of type T.
template <class T>
Two InOrder(Two x) {
  if (sizeof(T) == sizeof(float)) return x;
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  auto take = [&](__m512i which) { return _mm512_permutex2var_ps(x.first, which, x.second); };
  return {take(low), take(_mm512_add_epi32(low, _mm512_set1_epi32(8)))};
}

// Of numbers not greater than 0, to 2e-7 of it (the polynomial of Cephes); below -87 it is 0, of NaN NaN.
inline __m512 Exp(__m512 x) {
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

// Lanes of 16 that lie in [first, end).
inline __mmask16 Between(int first, int end) {
  auto below = [](int n) { return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1; };
  return static_cast<__mmask16>(below(end) & ~below(first));
}

inline void Transpose(__m512 (&x)[16]) {
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

}  // namespace
