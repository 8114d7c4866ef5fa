// Pages of keys and values: attention of each row's new token to those that it reads, and the writing of a token.

#pragma once

#include <vector>

#include "attention.h"
#include "threads.h"

namespace {

constexpr int kQueries = 4;     // heads that read a page together
constexpr int kMostHead = 256;  // numbers of a head

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

// Key head k of some pages, S tokens of H numbers each; what is read after a page's keys, and after its values.
template <class T>
struct Head {
  const std::vector<Seen<T>>& seen;
  size_t room;
  int k, H;
  const T* then;  // what is read after the last page

  const T* key(const Seen<T>& page) const { return page.key + static_cast<size_t>(k) * H * page.S; }
  const T* value(const Seen<T>& page) const { return page.value + static_cast<size_t>(k) * H * page.S; }
  const T* after_key(const Seen<T>& page) const {
    return &page == &seen.back() ? value(seen.front()) : key(*(&page + 1));
  }
  const T* after_value(const Seen<T>& page) const {
    return &page == &seen.back() ? then : value(*(&page + 1));
  }
};

// How far what is read soon lies from what is read now; and asks for it, line by line: as many at once have to wait.
template <class T>
intptr_t Away(const T* soon, const T* now) {
  return reinterpret_cast<intptr_t>(soon) - reinterpret_cast<intptr_t>(now);
}

template <class T>
void Ask(const T* now, intptr_t away) {
  for (size_t line = 0; line < 2 * kLanes * sizeof(T); line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<intptr_t>(now) + away + line), _MM_HINT_T1);
}

// The logits of n queries and a page's tokens, by 16 tokens [n, 16]; raises the highest of each lane.
template <int n, class T>
void Score(const float (&query)[n][kMostHead], const Head<T>& head, const Seen<T>& page, Rule rule, float* logits,
           __m512 (&highest)[n]) {
  const intptr_t soon = Away(head.after_key(page), head.key(page));
  for (int s = page.first / kLanes * kLanes; s < page.end; s += 2 * kLanes) {
    const __mmask32 there = page.S - s < 2 * kLanes ? 0xffff : ~0u;
    Two sums[n];
    For<n>([&](auto i) { sums[i].first = sums[i].second = _mm512_setzero_ps(); });
    const T* at = head.key(page) + s;
    for (int h = 0; h < head.H; ++h, at += page.S) {
      const Two key = WideTwo(at, there);
      Ask(at, soon);
      For<n>([&](auto i) {
        const __m512 query_h = _mm512_set1_ps(query[i][h]);
        sums[i].first = _mm512_fmadd_ps(query_h, key.first, sums[i].first);
        sums[i].second = _mm512_fmadd_ps(query_h, key.second, sums[i].second);
      });
    }
    For<n>([&](auto i) {
      const Two products = InOrder<T>(sums[i]);
      auto put = [&](__m512 product, int from) {
        const __m512 mine = Masked(Between(page.first - from, page.end - from), Logits(product, rule));
        highest[i] = _mm512_max_ps(highest[i], mine);
        _mm512_storeu_ps(logits + from * n + i * kLanes, mine);
      };
      put(products.first, s);
      if (s + kLanes < page.S) put(products.second, s + kLanes);
    });
  }
}

// Logits → exp(logit − highest), which are added to the total; 0 of what is not seen.
template <int n, class T>
void WeighPage(const Seen<T>& page, const __m512 (&highest)[n], float* logits, __m512 (&total)[n]) {
  for (int s = page.first / kLanes * kLanes; s < page.end; s += kLanes) {
    for (int i = 0; i < n; ++i) {
      float* at = logits + s * n + i * kLanes;
      const __m512 weights = Exp(_mm512_sub_ps(_mm512_loadu_ps(at), highest[i]));
      const __m512 seen = _mm512_maskz_mov_ps(Between(page.first - s, page.end - s), weights);
      total[i] = _mm512_add_ps(total[i], seen);
      _mm512_storeu_ps(at, seen);
    }
  }
}

// Of n heads the 32 · w numbers of the output from h on: weights times values, of pages' tokens and of the own one, by
// the weights' total.
template <int n, int w, class T, class Q>
void ReadValues(const Head<T>& head, int h, const float* weights, const __m512 (&own)[n], const Q* value,
                const __m512 (&total)[n], Q* output) {
  Two sums[n][w];
  For<n>([&](auto i) { For<w>([&](auto j) { sums[i][j].first = sums[i][j].second = _mm512_setzero_ps(); }); });
  for (const Seen<T>& page : head.seen) {
    const intptr_t soon = Away(head.after_value(page), head.value(page));
    const T* at = head.value(page) + static_cast<size_t>(page.first) * head.H + h;
    for (int s = page.first; s < page.end; ++s, at += head.H) {
      Two values[w];
      For<w>([&](auto j) {
        values[j] = WideTwo(at + j * 2 * kLanes);
        Ask(at + j * 2 * kLanes, soon);
      });
      const float* mine = weights + (page.logits + (s & -kLanes)) * n + (s & (kLanes - 1));
      For<n>([&](auto i) {
        const __m512 weight = _mm512_set1_ps(mine[i * kLanes]);
        For<w>([&](auto j) {
          sums[i][j].first = _mm512_fmadd_ps(weight, values[j].first, sums[i][j].first);
          sums[i][j].second = _mm512_fmadd_ps(weight, values[j].second, sums[i][j].second);
        });
      });
    }
  }
  For<n>([&](auto i) {
    For<w>([&](auto j) {
      const Two read = InOrder<T>(sums[i][j]);
      auto put = [&](__m512 sum, int at) {
        const __m512 all = _mm512_fmadd_ps(own[i], Wide(value + at), sum);
        Store(output + i * head.H + at, _mm512_div_ps(all, total[i]));
      };
      put(read.first, h + j * 2 * kLanes);
      put(read.second, h + j * 2 * kLanes + kLanes);
    });
  });
}

// n heads of one row that share a key head read its pages and the row's own new token.
template <int n, class T, class Q>
void Read(const Q* query, const Q* key, const Q* value, const Head<T>& head, Rule rule, Q* output) {
  static thread_local Lines<float> buffer;
  buffer.resize(std::max(buffer.size(), head.room * n));
  float *logits = buffer.data(), wide[n][kMostHead];
  const int H = head.H;
  __m512 own[n], highest[n], total[n];
  for (int i = 0; i < n; ++i) {
    __m512 product = _mm512_setzero_ps();
    for (int h = 0; h < H; h += kLanes) {
      const __m512 mine = Wide(query + i * H + h);
      _mm512_storeu_ps(&wide[i][h], mine);
      product = _mm512_fmadd_ps(mine, Wide(key + h), product);
    }
    own[i] = highest[i] = _mm512_set1_ps(Logit(_mm512_reduce_add_ps(product), rule));
  }
  for (const Seen<T>& page : head.seen) Score(wide, head, page, rule, logits + page.logits * n, highest);
  for (int i = 0; i < n; ++i) {
    highest[i] = _mm512_set1_ps(_mm512_reduce_max_ps(highest[i]));
    own[i] = Exp(_mm512_sub_ps(own[i], highest[i]));
    total[i] = _mm512_maskz_mov_ps(1, own[i]);
  }
  for (const Seen<T>& page : head.seen) WeighPage(page, highest, logits + page.logits * n, total);
  for (int i = 0; i < n; ++i) total[i] = _mm512_set1_ps(_mm512_reduce_add_ps(total[i]));
  int h = 0;
  for (; h + 4 * kLanes <= H; h += 4 * kLanes) ReadValues<n, 2>(head, h, logits, own, value, total, output);
  if (h < H) ReadValues<n, 1>(head, h, logits, own, value, total, output);
}

// What the row sees, of its first key head.
template <class T>
size_t Look(const std::vector<Pages>& pools, int r, int place, int window, int K, int H, std::vector<Seen<T>>& seen) {
  size_t room = 0;
  seen.clear();
  for (const Pages& pages : pools) {
    for (int j = 0; j < pages.J; ++j) {
      const int p = pages.page[static_cast<size_t>(r) * pages.J + j];
      if (p < 0) continue;
      const int start = pages.start[p], oldest = window > place ? 0 : place - window + 1;
      const int first = std::max(0, oldest - start);
      const int end = std::min(pages.S, std::min(pages.end[p], place) - start);
      if (first >= end) continue;
      const size_t at = static_cast<size_t>(p) * K * H * pages.S;
      auto *keys = static_cast<const T*>(pages.key) + at, *values = static_cast<const T*>(pages.value) + at;
      seen.push_back({keys, values, first, end, pages.S, room});
      room += pages.S;
    }
  }
  return room;
}

// A guess of the keys that a row reads first: its first page's.
template <class T>
const T* FirstKeys(const std::vector<Pages>& pools, int r, int K, int H) {
  for (const Pages& pages : pools) {
    const int p = pages.J ? pages.page[static_cast<size_t>(r) * pages.J] : -1;
    if (p >= 0) return static_cast<const T*>(pages.key) + static_cast<size_t>(p) * K * H * pages.S;
  }
  return nullptr;
}

template <class T, class Q>
void ReadByAll(ffi::ThreadPool& pool, const Q* query, const Q* key, const Q* value, const int32_t* place, int window,
               const std::vector<Pages>& pools, Rule rule, int R, int N, int K, int H, Q* output) {
  auto shared = std::make_shared<std::vector<Pages>>(pools);
  ShareOut(pool, R, [=](auto next) {
    static thread_local std::vector<Seen<T>> seen;
    for (int r; (r = next()) >= 0;) {
      const size_t room = Look(*shared, r, place[r], window, K, H, seen);
      const T* next_row = FirstKeys<T>(*shared, std::min(r + 1, R - 1), K, H);
      for (int k = 0, group = N / K; k < K; ++k) {
        Head<T> head{seen, room, k, H, next_row};
        if (k + 1 < K && !seen.empty()) head.then = head.key(seen.front()) + H * seen.front().S;
        for (int i = 0; i < group; i += kQueries) {
          const size_t row = r, at = (row * N + k * group + i) * H, own = (row * K + k) * H;
          auto read = [&](auto f) { f(query + at, key + own, value + own, head, rule, output + at); };
          switch (group - i) {
            case 1: read(Read<1, T, Q>); break;
            case 2: read(Read<2, T, Q>); break;
            case 3: read(Read<3, T, Q>); break;
            default: read(Read<kQueries, T, Q>);
          }
        }
      }
    }
  });
}

ffi::Error Paged(ffi::ThreadPool pool, float scale, float softcap, ffi::AnyBuffer query, ffi::AnyBuffer key,
                 ffi::AnyBuffer value, Int32 place, Int32 window, ffi::RemainingArgs pools,
                 ffi::Result<ffi::AnyBuffer> output) {
  const int R = query.dimensions()[0], N = query.dimensions()[1], H = query.dimensions()[2], K = key.dimensions()[1];
  std::vector<Pages> all;
  for (size_t i = 0; i < pools.size(); i += 5) {
    auto get = [&](size_t part) { return *pools.get<ffi::AnyBuffer>(i + part); };
    auto ints = [&](size_t part) { return Data<int32_t>(get(part)); };
    all.push_back({get(0).untyped_data(), get(1).untyped_data(), ints(2), ints(3), ints(4),
                   static_cast<int>(get(4).dimensions()[1]), static_cast<int>(get(0).dimensions()[3])});
  }
  ByType(query, [&](auto Q) {
    ByType(*pools.get<ffi::AnyBuffer>(0), [&](auto T) {
      auto data = [](ffi::AnyBuffer x) { return Data<decltype(Q)>(x); };
      auto* read = Data<decltype(Q)>(output);
      ReadByAll<decltype(T)>(pool, data(query), data(key), data(value), place.typed_data(), *window.typed_data(), all,
                             Rule{scale, softcap}, R, N, K, H, read);
    });
  });
  return ffi::Error::Success();
}

// R tokens, which of X each is, and where it goes: the page, none unless there is such a one, and the slot.
struct Tokens {
  const int32_t *token, *page, *slot;
  int R, X;
};

// Of one layer keys and values [X, K, H] into pages [P, K, H, S] and [P, K, S, H]; values that are not finite become 0.
template <class T, class New>
void PutTokens(const Tokens& tokens, const New* new_key, const New* new_value, int P, int K, int H, int S, T* keys,
               T* values) {
  auto put = [](New x, T* to) {
    if constexpr (sizeof(T) > sizeof(New))
      *to = One(x);
    else if constexpr (std::is_same_v<T, New>)  // narrower pools are not written
      *to = x;
  };
  for (int r = 0; r < tokens.R; ++r) {
    const int token = std::clamp(tokens.token[r], 0, tokens.X - 1), page = tokens.page[r], slot = tokens.slot[r];
    if (page < 0 || page >= P) continue;
    for (int k = 0; k < K; ++k) {
      const size_t own = (static_cast<size_t>(token) * K + k) * H, at = (static_cast<size_t>(page) * K + k) * H * S;
      for (int h = 0; h < H; ++h) put(new_key[own + h], keys + at + static_cast<size_t>(h) * S + slot);
      for (int h = 0; h < H; h += kLanes) {
        const __m512 x = Wide(new_value + own + h);
        const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), _mm512_setzero_ps(), _CMP_EQ_OQ);
        Store(values + at + static_cast<size_t>(slot) * H + h, _mm512_maskz_mov_ps(finite, x));
      }
    }
  }
}

// Of L layers first the pools, keys and values in turn, which are the results too, then what is new.
ffi::Error Write(ffi::ThreadPool pool, Int32 token, Int32 page, Int32 slot, ffi::RemainingArgs arrays,
                 ffi::RemainingRets written) {
  const int results = written.size();
  auto pools = std::make_shared<std::vector<void*>>();
  auto fresh = std::make_shared<std::vector<const void*>>();
  for (int i = 0; i < results; ++i) {
    pools->push_back((*written.get<ffi::AnyBuffer>(i))->untyped_data());
    fresh->push_back((*arrays.get<ffi::AnyBuffer>(results + i)).untyped_data());
    if (pools->back() != (*arrays.get<ffi::AnyBuffer>(i)).untyped_data())
      return ffi::Error::Internal("a pool's pages would be lost: what is written lies elsewhere");
  }
  auto keys = *arrays.get<ffi::AnyBuffer>(0), new_keys = *arrays.get<ffi::AnyBuffer>(results);
  const int P = keys.dimensions()[0], K = keys.dimensions()[1], H = keys.dimensions()[2], S = keys.dimensions()[3];
  const int R = page.element_count(), X = new_keys.element_count() / (K * H);
  const Tokens tokens{token.typed_data(), page.typed_data(), slot.typed_data(), R, X};
  ByType(keys, [&](auto T) {
    ByType(new_keys, [&](auto New) {
      Each(pool, results / 2, [=](int layer) {
        auto fresh_of = [&](int i) { return static_cast<const decltype(New)*>((*fresh)[2 * layer + i]); };
        auto pool_of = [&](int i) { return static_cast<decltype(T)*>((*pools)[2 * layer + i]); };
        PutTokens(tokens, fresh_of(0), fresh_of(1), P, K, H, S, pool_of(0), pool_of(1));
      });
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_paged, Paged,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Int32>()
                                  .Arg<Int32>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(advgame_cpu_write, Write,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Int32>()
                                  .Arg<Int32>()
                                  .Arg<Int32>()
                                  .RemainingArgs()
                                  .RemainingRets());
