// The draw of a token from each row's logits.

#pragma once

#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int kBlock = 128;  // words of the vocabulary: the first level of a draw

// The largest threshold from 0 to 1 by which the weights that reach it, and `least`, sum to `enough`, or are so many;
// else 0. Two bits of the threshold at a time, as in scoring.py; each time only those weights stay whose bits so far are
// the threshold's.
float Largest(const float* weights, int V, float least, float enough, bool counted) {
  static thread_local std::vector<float> near;
  near.resize(V + kLanes);  // the last vector's zeros
  auto number = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  const __m512 one = _mm512_set1_ps(1.0f);
  uint32_t bits = 0;
  float above = 0;  // what those weights give that are left out for being too large
  for (int shift = 28, left = V; shift >= 0; shift -= 2, weights = near.data()) {
    __m512 thresholds[3], sums[3];
    for (uint32_t digit = 1; digit <= 3; ++digit) {
      thresholds[digit - 1] = _mm512_set1_ps(std::max(number(bits | digit << shift), least));
      sums[digit - 1] = _mm512_setzero_ps();
    }
    auto some = [&](int v) { return _mm512_maskz_loadu_ps(Between(0, left - v), weights + v); };
    for (int v = 0; v < left; v += kLanes) {
      for (int i = 0; i < 3; ++i) {
        const __mmask16 kept = _mm512_cmp_ps_mask(some(v), thresholds[i], _CMP_GE_OQ);
        sums[i] = _mm512_mask_add_ps(sums[i], kept, sums[i], counted ? one : some(v));
      }
    }
    uint32_t chosen = 0;
    float beyond = above;
    for (uint32_t digit = 3; digit >= 1 && !chosen; --digit) {
      const float sum = above + _mm512_reduce_add_ps(sums[digit - 1]);
      if (sum >= enough)
        chosen = digit;
      else
        beyond = sum;
    }
    // A weight below `least` reaches no threshold, whatever bits it has.
    const __m512 from = _mm512_set1_ps(number(bits | chosen << shift));
    const __m512 to = chosen < 3 ? thresholds[chosen] : _mm512_set1_ps(INFINITY);
    int stay = 0;
    for (int v = 0; v < left; v += kLanes) {
      const __m512 weight = some(v);
      const __mmask16 reach = _mm512_cmp_ps_mask(weight, from, _CMP_GE_OQ);
      const __mmask16 kept = _mm512_mask_cmp_ps_mask(reach, weight, to, _CMP_LT_OQ);
      _mm512_storeu_ps(&near[stay], _mm512_maskz_compress_ps(kept, weight));  // over none that is still to come
      stay += __builtin_popcount(kept);
    }
    bits |= chosen << shift, above = beyond, left = stay;
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_amx_draw, Draw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Ret<Int32>()
                                  .Ret<Float32>()
                                  .Ret<Float32>());
