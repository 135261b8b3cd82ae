// The caller's thread pool: bindings pass torch's, tests a plain loop. Kernels own no threads.
#pragma once

#include <cstdint>

namespace fastprune {

struct ParallelFor {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  using Run = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  Run run;

  // Calls f(begin, end) on ranges that cover 0..size, each of at least `grain` but for the last.
  template <typename F>
  void operator()(int64_t size, int64_t grain, const F& f) const {
    if (size <= 0) return;
    const Body body = [](int64_t begin, int64_t end, void* context) {
      (*static_cast<const F*>(context))(begin, end);
    };
    run(0, size, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
  }
};

}  // namespace fastprune
