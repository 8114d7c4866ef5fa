// The logits of attention.

#pragma once

#include "vectors.h"

namespace {

constexpr float kLeast = -3.0e38f;  // of a token that is not seen

struct Rule {
  float scale, cap;
};

inline float Logit(float product, Rule rule) {
  const float scaled = product * rule.scale;
  return rule.cap ? rule.cap * std::tanh(scaled / rule.cap) : scaled;
}

inline __m512 Logits(__m512 products, Rule rule) {
  if (!rule.cap) return _mm512_mul_ps(products, _mm512_set1_ps(rule.scale));
  alignas(64) float x[kLanes];
  _mm512_store_ps(x, products);
  for (float& each : x) each = Logit(each, rule);
  return _mm512_load_ps(x);
}

// Where not `seen`, the least.
inline __m512 Masked(__mmask16 seen, __m512 logits) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(kLeast), seen, logits);
}

}  // namespace
