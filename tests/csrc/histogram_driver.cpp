// Runs the kernels of kernels/histogram.cu and compares with loops; exit status 1 on a difference.
#include <cstdio>
#include <vector>

#include "kernels/histogram.h"

namespace {

bool equal(const char* what, const std::vector<unsigned>& got,
           const std::vector<unsigned>& expected) {
  if (got == expected) return true;
  std::fprintf(stderr, "%s differs from the host's\n", what);
  return false;
}

bool run(int n) {
  std::vector<unsigned> values(n);
  for (int i = 0; i < n; ++i) values[i] = static_cast<unsigned>(i) * 2654435761u >> 28;
  const int num_blocks = 3;

  std::vector<unsigned> counts(kBins), expected_counts(kBins);
  for (unsigned v : values) ++expected_counts[v];
  count_bins(values.data(), n, counts.data(), num_blocks, nullptr);

  const int num_tiles = (n + kThreads - 1) / kThreads;
  std::vector<unsigned> partial(num_tiles, 0xdeadu), num_finished(1), sum(1), expected_sum(1);
  for (unsigned v : values) expected_sum[0] += v;
  sum_by_last_block(values.data(), n, partial.data(), num_finished.data(), sum.data(), num_tiles,
                    nullptr);

  std::vector<unsigned> reversed(n), expected_reversed(n);
  for (int i = 0; i < n; ++i) {
    const int first = i / kThreads * kThreads;
    const int last = (first + kThreads < n ? first + kThreads : n) - 1;
    expected_reversed[i] = values[last - (i - first)];
  }
  reverse_tiles(values.data(), n, reversed.data(), nullptr);

  return equal("the histogram", counts, expected_counts) & equal("the sum", sum, expected_sum) &
         equal("the tickets", num_finished, {0}) &
         equal("the reversal", reversed, expected_reversed);
}

}  // namespace

int main() {
  bool good = true;
  for (int n : {1, 100, kThreads, 5 * kThreads + 3}) good &= run(n);
  return good ? 0 : 1;
}
