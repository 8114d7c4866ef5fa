// The draw of a token from each row's logits.

#pragma once

#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int kBlock = 128;  // words of the vocabulary: the first level of a draw

// The weights of n from `first` on and below `end`, one behind the other, with room for zeros behind them → how many.
// May be in place.
int Within(const float* weights, int n, float first, float end, float* kept) {
  const __m512 low = _mm512_set1_ps(first), high = _mm512_set1_ps(end);
  int count = 0;
  for (int v = 0; v < n; v += kLanes) {
    const __m512 weight = _mm512_maskz_loadu_ps(Between(0, n - v), weights + v);
    const __mmask16 reach = _mm512_mask_cmp_ps_mask(Between(0, n - v), weight, low, _CMP_GE_OQ);
    const __mmask16 here = _mm512_mask_cmp_ps_mask(reach, weight, high, _CMP_LT_OQ);
    _mm512_storeu_ps(kept + count, _mm512_maskz_compress_ps(here, weight));  // over none that is still to come
    count += __builtin_popcount(here);
  }
  return count;
}

// The largest threshold from 0 to 1 by which the weights that reach it, and `least`, sum to `enough`, or are so many;
// else 0. Two bits of the threshold at a time, as in scoring.py; each time only those of the n weights stay, in place,
// whose bits so far are the threshold's.
float Largest(float* weights, int n, float least, float enough, bool counted) {
  auto number = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  const __m512 one = _mm512_set1_ps(1.0f);
  uint32_t bits = 0;
  float above = 0;  // what those weights give that did not stay for being too large
  for (int shift = 28; shift >= 0; shift -= 2) {
    float thresholds[5] = {number(bits), 0, 0, 0, INFINITY};
    __m512 sums[4];
    for (uint32_t digit = 1; digit <= 3; ++digit) {
      thresholds[digit] = std::max(number(bits | digit << shift), least);
      sums[digit] = _mm512_setzero_ps();
    }
    for (int v = 0; v < n; v += kLanes) {
      const __mmask16 there = Between(0, n - v);
      const __m512 weight = _mm512_maskz_loadu_ps(there, weights + v);
      for (int digit = 1; digit <= 3; ++digit) {
        const __mmask16 kept = _mm512_mask_cmp_ps_mask(there, weight, _mm512_set1_ps(thresholds[digit]), _CMP_GE_OQ);
        sums[digit] = _mm512_mask_add_ps(sums[digit], kept, sums[digit], counted ? one : weight);
      }
    }
    int digit = 3;
    float beyond = above;
    for (; digit > 0; --digit) {
      const float sum = above + _mm512_reduce_add_ps(sums[digit]);
      if (sum >= enough) break;
      beyond = sum;
    }
    bits |= static_cast<uint32_t>(digit) << shift, above = beyond;
    n = Within(weights, n, number(bits), thresholds[digit + 1], weights);
  }
  return std::min(number(bits), 1.0f);  // all bits are set where `enough` is 0
}

float Sum(const float* weights, int V, float least) {
  __m512 sum = _mm512_setzero_ps();
  for (int v = 0; v < V; v += kLanes) {
    const __m512 weight = _mm512_loadu_ps(weights + v);
    sum = _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(weight, _mm512_set1_ps(least), _CMP_GE_OQ), sum, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

struct Choice {
  float temperature, top_p, top_k, min_p;
};

// The logarithm of the sum of exp(logit) over the whole vocabulary, and the weight below which words are cut off.
struct Weighed {
  float log_total, threshold;
};

// Of one row of logits the weights that a token is drawn by, the greatest 1.
Weighed Weigh(const float* logits, int V, const Choice& choice, float* weights) {
  __m512 greatest = _mm512_set1_ps(-INFINITY), all = _mm512_setzero_ps();
  for (int v = 0; v < V; v += kLanes) greatest = _mm512_max_ps(greatest, _mm512_loadu_ps(logits + v));
  const float most = _mm512_reduce_max_ps(greatest);
  const bool heated = choice.temperature > 0 && choice.temperature != 1;
  const __m512 scale = _mm512_set1_ps(heated ? 1 / choice.temperature : 1);
  for (int v = 0; v < V; v += kLanes) {
    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(logits + v), _mm512_set1_ps(most)), plain = Exp(below);
    all = _mm512_add_ps(all, plain);
    _mm512_storeu_ps(weights + v, heated ? Exp(_mm512_mul_ps(below, scale)) : plain);
  }
  const float log_total = most + std::log(_mm512_reduce_add_ps(all));
  if (choice.temperature <= 0) {
    std::fill_n(weights, V, 0.0f);
    const float* first = std::find(logits, logits + V, most);
    if (first < logits + V) weights[first - logits] = 1;
    return {log_total, 0};
  }
  static thread_local std::vector<float> near;
  near.resize(V + kLanes);
  float least = 0, nucleus = 0;
  if (choice.top_k > 0) {
    const int n = Within(weights, V, 0, INFINITY, near.data());
    least = Largest(near.data(), n, 0, choice.top_k, true);
  }
  if (choice.top_p < 1) {
    // Words whose weights are this small are together less than what the nucleus leaves out, so below its threshold; by
    // half of that, whatever sums are rounded to.
    const float total = Sum(weights, V, least), small = (1 - choice.top_p) * total / V / 2;
    const int n = Within(weights, V, std::max(small, least), INFINITY, near.data());
    nucleus = Largest(near.data(), n, least, choice.top_p * total, false);
  }
  return {log_total, std::max({nucleus, least, choice.min_p})};
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
    const Weighed weighed = Weigh(mine, V, {how[0], how[1], how[2], how[3]}, weights.data());
    float total = 0;
    for (int v = 0; v < V; v += kBlock) {
      masses.push_back(Sum(&weights[v], std::min(kBlock, V - v), weighed.threshold));
      total += masses.back();
    }
    float target = quantile[r] * total;
    const int first = Quantile(masses.data(), masses.size(), target) * kBlock, words = std::min(kBlock, V - first);
    std::replace_if(&weights[first], &weights[first] + words, [&](float x) { return x < weighed.threshold; }, 0.0f);
    const int chosen = first + Quantile(&weights[first], words, target);
    drawn[r] = chosen;
    of_behaviour[r] = std::isnan(weighed.log_total) ? weighed.log_total : std::log(weights[chosen] / total);
    of_all[r] = mine[chosen] - weighed.log_total;
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_draw, Draw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Arg<Float32>()
                                  .Ret<Int32>()
                                  .Ret<Float32>()
                                  .Ret<Float32>());
