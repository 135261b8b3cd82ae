// The floor of every operator that has to look at its inputs: one pass that only reads them.
// Bench only and torch-free; bench/floor.py compiles it and calls read_floor through ctypes.
//
// Each thread reads one span of the concatenated bytes. Eight independent accumulators keep loads
// in flight. They end in a checksum that depends on every byte, so the compiler must do all the
// loads: the sum of each buffer's 64-bit words, the last one padded with zeros.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Reader = std::uint64_t (*)(const unsigned char*, std::size_t);

constexpr std::size_t kLine = 64;   // bytes of a cache line
constexpr std::size_t kStep = 512;  // bytes of one unrolled iteration, the same in every variant
static_assert(kStep % (8 * sizeof(std::uint64_t)) == 0, "whole words for each of 8 accumulators");

std::uint64_t read_tail(const unsigned char* data, std::size_t size) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < size; i += sizeof(sum)) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + i, std::min(sizeof(word), size - i));
    sum += word;
  }
  return sum;
}

std::uint64_t read_baseline(const unsigned char* data, std::size_t size) {
  std::uint64_t sums[8] = {};
  const std::size_t whole = size - size % kStep;
  for (std::size_t i = 0; i < whole; i += sizeof(sums)) {
    std::uint64_t words[8];
    std::memcpy(words, data + i, sizeof(words));
    for (int lane = 0; lane < 8; ++lane) sums[lane] += words[lane];
  }
  std::uint64_t sum = read_tail(data + whole, size - whole);
  for (const std::uint64_t part : sums) sum += part;
  return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) std::uint64_t read_avx2(const unsigned char* data,
                                                        std::size_t size) {
  constexpr std::size_t kWidth = 32;
  __m256i sums[8];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  const std::size_t whole = size - size % kStep;
  for (std::size_t i = 0; i < whole; i += 8 * kWidth)
    for (std::size_t lane = 0; lane < 8; ++lane) {
      const void* from = data + i + lane * kWidth;
      sums[lane] =
          _mm256_add_epi64(sums[lane], _mm256_loadu_si256(static_cast<const __m256i*>(from)));
    }
  std::uint64_t parts[8 * kWidth / sizeof(std::uint64_t)];
  std::memcpy(parts, sums, sizeof(parts));
  std::uint64_t sum = read_tail(data + whole, size - whole);
  for (const std::uint64_t part : parts) sum += part;
  return sum;
}

__attribute__((target("avx512f"))) std::uint64_t read_avx512(const unsigned char* data,
                                                             std::size_t size) {
  constexpr std::size_t kWidth = 64;
  __m512i sums[8];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  const std::size_t whole = size - size % kStep;
  for (std::size_t i = 0; i < whole; i += 8 * kWidth)
    for (std::size_t lane = 0; lane < 8; ++lane)
      sums[lane] = _mm512_add_epi64(sums[lane], _mm512_loadu_si512(data + i + lane * kWidth));
  std::uint64_t parts[8 * kWidth / sizeof(std::uint64_t)];
  std::memcpy(parts, sums, sizeof(parts));
  std::uint64_t sum = read_tail(data + whole, size - whole);
  for (const std::uint64_t part : parts) sum += part;
  return sum;
}
#endif

// isa: 0 baseline, 1 AVX2, 2 AVX-512; lowered to what this processor has.
Reader choose(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa >= 2 && __builtin_cpu_supports("avx512f")) return read_avx512;
  if (isa >= 1 && __builtin_cpu_supports("avx2")) return read_avx2;
#endif
  (void)isa;
  return read_baseline;
}

// Reads about bytes [begin, end) of the concatenation of the buffers: ends inside a buffer are
// moved to the same line start for both neighbours, so no line and no word is read by two threads.
std::uint64_t read_span(const unsigned char* const* buffers, const std::size_t* sizes,
                        std::size_t count, std::size_t begin, std::size_t end, Reader reader) {
  std::uint64_t sum = 0;
  std::size_t start = 0;
  for (std::size_t i = 0; i < count && start < end; start += sizes[i++]) {
    const auto inside = [&](std::size_t position) {
      if (position <= start) return std::size_t{0};
      return position >= start + sizes[i] ? sizes[i] : (position - start) / kLine * kLine;
    };
    const std::size_t from = inside(begin), to = inside(end);
    if (from < to) sum += reader(buffers[i] + from, to - from);
  }
  return sum;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) std::uint64_t read_floor(
    const unsigned char* const* buffers, const std::size_t* sizes, std::size_t count, int threads,
    int isa) {
  const Reader reader = choose(isa);
  std::size_t total = 0;
  for (std::size_t i = 0; i < count; ++i) total += sizes[i];
  const std::size_t parts = static_cast<std::size_t>(std::max(threads, 1));
  std::vector<std::uint64_t> sums(parts, 0);
  const auto work = [&](std::size_t part) {
    const auto cut = [&](std::size_t p) { return p == parts ? total : total / parts * p; };
    sums[part] = read_span(buffers, sizes, count, cut(part), cut(part + 1), reader);
  };
  // Plain threads: a second OpenMP runtime beside torch's would spin on the cores being measured.
  std::vector<std::thread> pool;
  for (std::size_t part = 1; part < parts; ++part) pool.emplace_back(work, part);
  work(0);
  for (std::thread& thread : pool) thread.join();
  std::uint64_t sum = 0;
  for (const std::uint64_t part : sums) sum += part;
  return sum;
}
