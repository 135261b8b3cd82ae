// One program with every check of the simulator: `simulator_checks NAME...` runs those named,
// without a name all. A check that is a mistake must be ended by the simulator or a sanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/block.cuh"

using namespace fastprune;

namespace {

constexpr unsigned kAll = 0xffffffffu;

void expect(bool condition, const char* what) {
  if (!condition) throw std::logic_error(std::string("not so: ") + what);
}

// ---------------------------------------------------------------- indices

__global__ void write_indices(uint3* threads, uint3* blocks) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  threads[i] = {threadIdx.x, threadIdx.y, threadIdx.z};
  blocks[i] = {blockIdx.x, blockIdx.y, blockIdx.z};
}

void indices() {
  const dim3 grid(3, 2, 4), block(5, 3, 2);
  std::vector<uint3> threads(24 * 30, {9, 9, 9}), blocks(24 * 30, {9, 9, 9});
  launch(write_indices, grid, block, 0, nullptr, threads.data(), blocks.data());
  for (unsigned i = 0; i < threads.size(); ++i) {
    const unsigned t = i % 30, b = i / 30;
    expect(threads[i].x == t % 5 && threads[i].y == t / 5 % 3 && threads[i].z == t / 15, "thread");
    expect(blocks[i].x == b % 3 && blocks[i].y == b / 3 % 2 && blocks[i].z == b / 6, "block");
  }
}

// ---------------------------------------------------------------- barriers

__global__ void vote(const int* predicates, int* any, int* all, int* count) {
  any[threadIdx.x] = __syncthreads_or(predicates[threadIdx.x]);
  all[threadIdx.x] = __syncthreads_and(predicates[threadIdx.x]);
  count[threadIdx.x] = __syncthreads_count(predicates[threadIdx.x]);
}

void barrier_votes() {
  for (int num_set : {0, 1, 37, 70}) {
    std::vector<int> predicates(70), any(70), all(70), count(70);
    std::fill_n(predicates.rbegin(), num_set, 5);
    launch(vote, 1, 70, 0, nullptr, predicates.data(), any.data(), all.data(), count.data());
    for (int i = 0; i < 70; ++i) {
      expect(any[i] == (num_set > 0) && all[i] == (num_set == 70) && count[i] == num_set, "votes");
    }
  }
}

__global__ void halve_until_small(int* values) {
  while (__syncthreads_or(values[threadIdx.x] > 1)) {
    if (values[threadIdx.x] > 1) values[threadIdx.x] /= 2;
  }
}

void loop_until_all_agree() {
  std::vector<int> values(96);
  for (int i = 0; i < 96; ++i) values[i] = i * i;
  launch(halve_until_small, 1, 96, 0, nullptr, values.data());
  for (int i = 0; i < 96; ++i) expect(values[i] == (i != 0), "halved to one");
}

__global__ void early_return(int n, unsigned* neighbour) {
  __shared__ unsigned shared[128];
  if (static_cast<int>(threadIdx.x) >= n) return;
  shared[threadIdx.x] = threadIdx.x * 3;
  __syncthreads();
  const unsigned next = shared[(threadIdx.x + 1) % n];
  // The lanes that are gone do not hold up the warp either.
  neighbour[threadIdx.x] = next + (__ballot_sync(kAll, 1) & 1);
}

void early_returning_threads() {
  for (int n : {1, 31, 32, 77, 128}) {
    std::vector<unsigned> neighbour(128, 0);
    launch(early_return, 1, 128, 0, nullptr, n, neighbour.data());
    for (int i = 0; i < 128; ++i) {
      expect(neighbour[i] == (i < n ? (i + 1) % n * 3 + 1u : 0u), "neighbour");
    }
  }
}

// ---------------------------------------------------------------- warps

template <class T>
__global__ void shuffle_all(T* out, int width) {
  const T mine = static_cast<T>(threadIdx.x) * 1000 + static_cast<T>(0.5);
  T* row = out + threadIdx.x * 4;
  row[0] = __shfl_sync(kAll, mine, 5 + threadIdx.x, width);
  row[1] = __shfl_up_sync(kAll, mine, 3, width);
  row[2] = __shfl_down_sync(kAll, mine, 3, width);
  row[3] = __shfl_xor_sync(kAll, mine, 6, width);
}

template <class T>
void check_shuffles(int width) {
  std::vector<T> out(64 * 4);
  launch(shuffle_all<T>, 1, 64, 0, nullptr, out.data(), width);
  for (int i = 0; i < 64; ++i) {
    const auto value = [&](int from) { return static_cast<T>(from) * 1000 + static_cast<T>(0.5); };
    const int first = i / width * width, last = first + width - 1;
    const int crossed = i / 32 * 32 + (i % 32 ^ 6);
    expect(out[i * 4] == value(first + (5 + i) % width), "shfl");
    expect(out[i * 4 + 1] == value(i - 3 < first ? i : i - 3), "shfl_up");
    expect(out[i * 4 + 2] == value(i + 3 > last ? i : i + 3), "shfl_down");
    expect(out[i * 4 + 3] == value(crossed > last ? i : crossed), "shfl_xor");
  }
}

void shuffles() {
  for (int width : {1, 2, 8, 16, 32}) {
    check_shuffles<int>(width);
    check_shuffles<unsigned>(width);
    check_shuffles<float>(width);
    check_shuffles<double>(width);
    check_shuffles<long long>(width);
    check_shuffles<uint64_t>(width);
  }
}

__global__ void vote_in_halves(unsigned* ballots, int* any, int* all) {
  const unsigned lane = threadIdx.x % 32;
  // Two groups of one warp at the same line, each with its own mask.
  const unsigned mask = lane < 20 ? 0x000fffffu : 0xfff00000u;
  const int odd_or_high = lane % 2 == 1 || lane >= 20;
  ballots[threadIdx.x] = __ballot_sync(mask, odd_or_high);
  any[threadIdx.x] = __any_sync(mask, lane == 3);
  all[threadIdx.x] = __all_sync(mask, odd_or_high);
  __syncwarp(mask);
}

void warp_votes() {
  std::vector<unsigned> ballots(64);
  std::vector<int> any(64), all(64);
  launch(vote_in_halves, 1, 64, 0, nullptr, ballots.data(), any.data(), all.data());
  for (int i = 0; i < 64; ++i) {
    const bool low = i % 32 < 20;
    expect(ballots[i] == (low ? 0x000aaaaau : 0xfff00000u), "ballot");
    expect(any[i] == low && all[i] == !low, "any and all");
  }
}

__global__ void pass_around_warp(unsigned* out) {
  __shared__ unsigned shared[64];
  const unsigned warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  unsigned value = lane;
  for (int round = 0; round < 100; ++round) {
    shared[threadIdx.x] = value;
    __syncwarp();
    value = shared[warp + (lane + 1) % 32];
    __syncwarp();
  }
  out[threadIdx.x] = value;
}

void syncwarp_orders_memory() {
  std::vector<unsigned> out(64);
  launch(pass_around_warp, 1, 64, 0, nullptr, out.data());
  for (unsigned i = 0; i < 64; ++i) expect(out[i] == (i % 32 + 100) % 32, "passed on");
}

__global__ void read_absent_lane(unsigned* out) {
  out[threadIdx.x] = __shfl_down_sync(kAll, threadIdx.x, 16);
}

void absent_lanes_give_garbage() {
  std::vector<unsigned> out(16);
  launch(read_absent_lane, 1, 16, 0, nullptr, out.data());
  for (unsigned v : out) expect(v > 1000, "no plausible value");
}

// ---------------------------------------------------------------- block primitives

template <class T, int kThreads>
__global__ void all_primitives(const T* in, T* out) {
  __shared__ BlockScratch<T, kThreads> scratch;
  const T mine = in[blockIdx.x * kThreads + threadIdx.x];
  T* row = out + (blockIdx.x * kThreads + threadIdx.x) * 5;
  row[0] = block_sum(mine, scratch);
  row[1] = block_max(mine, scratch);
  const Scanned<T> inclusive = block_inclusive_sum(mine, scratch);
  row[2] = inclusive.prefix;
  row[3] = inclusive.total;
  row[4] = block_exclusive_sum(mine, scratch).prefix;
}

template <class T, int kThreads>
void check_primitives() {
  const int num_blocks = 3;
  std::vector<T> in(kThreads * num_blocks), out(in.size() * 5);
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<T>(i * 2654435761u) - static_cast<T>(1u << 31);
  }
  launch(all_primitives<T, kThreads>, num_blocks, kThreads, 0, nullptr,
         static_cast<const T*>(in.data()), out.data());
  for (int block = 0; block < num_blocks; ++block) {
    const T* values = in.data() + block * kThreads;
    const T largest = *std::max_element(values, values + kThreads);
    T total = 0;
    for (int i = 0; i < kThreads; ++i) total += values[i];
    T before = 0;
    for (int i = 0; i < kThreads; ++i) {
      const T* row = &out[(block * kThreads + i) * 5];
      expect(row[0] == total && row[1] == largest && row[3] == total, "sum, maximum, total");
      expect(row[2] == static_cast<T>(before + values[i]) && row[4] == before, "prefix sums");
      before += values[i];
    }
  }
}

template <class T>
void check_primitives_of() {
  check_primitives<T, 32>();
  check_primitives<T, 96>();
  check_primitives<T, 256>();
  if (!sim::kThreadSanitizer) check_primitives<T, 1024>();  // as many fibers take it seconds
}

void block_primitives() {
  check_primitives_of<unsigned>();
  check_primitives_of<int64_t>();
  check_primitives_of<uint64_t>();
}

// ---------------------------------------------------------------- shared memory

template <int kSize>
__device__ __forceinline__ unsigned* scratch_of_template() {
  __shared__ unsigned scratch[kSize];
  return scratch;
}

__global__ void count_known_values(unsigned known, unsigned* num_known) {
  FASTPRUNE_DYNAMIC_SHARED(unsigned, dynamic);
  __shared__ unsigned fixed[100];
  unsigned* templated = scratch_of_template<50>();
  unsigned found = 0;
  for (unsigned v : {dynamic[threadIdx.x], fixed[threadIdx.x], templated[threadIdx.x]}) {
    found += v == known || v == 0;
  }
  if (found != 0) atomicAdd(num_known, found);
  dynamic[threadIdx.x] = fixed[threadIdx.x] = templated[threadIdx.x] = known;
}

void every_block_finds_garbage_in_shared_memory() {
  unsigned num_known = 0;
  launch(count_known_values, 20, 50, 50 * sizeof(unsigned), nullptr, 12345u, &num_known);
  expect(num_known == 0, "nothing of an earlier block is left, and nothing is zero");
}

__global__ void reverse_block(double* values) {
  FASTPRUNE_DYNAMIC_SHARED(double, tile);
  double* mine = values + blockIdx.x * blockDim.x;
  tile[threadIdx.x] = mine[threadIdx.x];
  __syncthreads();
  mine[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

void dynamic_shared_memory() {
  std::vector<double> values(5 * 64);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i);
  launch(reverse_block, 5, 64, 64 * sizeof(double), nullptr, values.data());
  for (size_t i = 0; i < values.size(); ++i) {
    expect(values[i] == static_cast<double>(i / 64 * 64 + 63 - i % 64), "reversed");
  }
}

// ---------------------------------------------------------------- atomics

struct Counters {
  int add_int, sub;
  unsigned add_unsigned, smallest, largest, bits_or, bits_and, bits_xor, ring, last;
  unsigned long long add_long, largest_long;
  long long smallest_signed;
  float add_float;
  double add_double;
  unsigned by_cas;
};

__global__ void all_atomics(Counters* c) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&c->add_int, -1);
  atomicSub(&c->sub, 2);
  atomicAdd(&c->add_unsigned, i);
  atomicMin(&c->smallest, i + 3);
  atomicMax(&c->largest, i);
  atomicOr(&c->bits_or, 1u << i % 32);
  atomicAnd(&c->bits_and, ~(1u << i % 16));
  atomicXor(&c->bits_xor, i);
  atomicInc(&c->ring, 9);
  atomicExch(&c->last, i);
  atomicAdd(&c->add_long, 1ull << 33);
  atomicMax(&c->largest_long, static_cast<unsigned long long>(i) << 40);
  atomicMin(&c->smallest_signed, -static_cast<long long>(i));
  atomicAdd(&c->add_float, 0.5f);
  atomicAdd(&c->add_double, 0.25);
  unsigned seen = 0, expected;
  do {
    expected = seen;
    seen = atomicCAS(&c->by_cas, expected, expected + 3);
  } while (seen != expected);
}

void atomics() {
  Counters c{};
  c.smallest = kAll;
  c.bits_and = kAll;
  launch(all_atomics, 4, 64, 0, nullptr, &c);
  unsigned bits_xor = 0;
  for (unsigned i = 0; i < 256; ++i) bits_xor ^= i;
  expect(c.add_int == -256 && c.sub == -512 && c.add_unsigned == 255 * 128, "added");
  expect(c.smallest == 3 && c.largest == 255 && c.last < 256, "least and largest");
  expect(c.bits_or == kAll && c.bits_and == 0xffff0000u && c.bits_xor == bits_xor, "bits");
  expect(c.ring == 256 % 10 && c.add_long == 256ull << 33, "counted");
  expect(c.largest_long == 255ull << 40 && c.smallest_signed == -255, "64 bits");
  expect(c.add_float == 128.0f && c.add_double == 64.0 && c.by_cas == 768, "floats, swaps");
}

__global__ void publish_and_collect(unsigned* partial, unsigned* num_finished, unsigned* sum) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = blockIdx.x;
  __threadfence();
  if (atomicAdd(num_finished, 1) != gridDim.x - 1) return;
  __threadfence();
  for (unsigned b = 0; b < gridDim.x; ++b) *sum += partial[b];
}

void fences_publish() {
  std::vector<unsigned> partial(10);
  unsigned num_finished = 0, sum = 0;
  launch(publish_and_collect, 10, 32, 0, nullptr, partial.data(), &num_finished, &sum);
  expect(sum == 45, "all partial sums");
}

__global__ void double_values(int* values) { values[blockIdx.x * blockDim.x + threadIdx.x] *= 2; }

void launches_are_ordered_with_the_host() {
  std::vector<int> values(128, 1);
  for (int round = 0; round < 3; ++round) {
    launch(double_values, 4, 32, 0, nullptr, values.data());
    launch(double_values, 2, 64, 0, nullptr, values.data());
    for (int& v : values) v += 1;
  }
  for (int v : values) expect(v == ((1 * 4 + 1) * 4 + 1) * 4 + 1, "six launches");
  fill_zero_async(values.data(), values.size() * sizeof(int), nullptr);
  expect(values[0] == 0 && values[127] == 0, "zeroed");
}

// ---------------------------------------------------------------- functions

void intrinsics() {
  expect(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64, "popc");
  expect(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0, "clz");
  expect(__clzll(0) == 64 && __clzll(1) == 63, "clzll");
  expect(__ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41, "ffs");
  expect(__brev(1) == 0x80000000u && __brev(0x0000a000u) == 0x00050000u, "brev");
  expect(__umulhi(kAll, kAll) == 0xfffffffeu && __umul64hi(1ull << 63, 6) == 3, "mulhi");
  expect(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f, "float");
  expect(__float_as_int(-0.0f) == std::numeric_limits<int>::min(), "float as int");
  expect(__int_as_float(0x7f800000) == std::numeric_limits<float>::infinity(), "int as float");
  expect(__longlong_as_double(__double_as_longlong(-1.5)) == -1.5, "double");
  const float a = 1.0f + 0x1p-12f, c = -(1.0f + 0x1p-11f);
  expect(__fadd_rn(__fmul_rn(a, a), c) == 0.0f && __fmaf_rn(a, a, c) == 0x1p-24f, "roundings");
  const double b = 1.0 + 0x1p-30, d = -(1.0 + 0x1p-29);
  expect(__dadd_rn(__dmul_rn(b, b), d) == 0.0 && __fma_rn(b, b, d) == 0x1p-60, "double roundings");
  expect(__fdiv_rn(1.0f, 3.0f) == 1.0f / 3.0f && __fsub_rn(3.0f, 1.0f) == 2.0f, "division");
  expect(__fsqrt_rn(9.0f) == 3.0f && __ldg(&a) == a, "square root");
  expect(min(3, -4) == -4 && max(3u, 4u) == 4u && max(NAN, 1.0f) == 1.0f, "min and max");
}

// ---------------------------------------------------------------- schedules

__global__ void record_order(unsigned* order, unsigned* next) {
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

std::vector<unsigned> order_under(uint64_t seed, sim::Order mode) {
  sim::set_schedule(seed, mode);
  std::vector<unsigned> order(8 * 16);
  unsigned next = 0;
  launch(record_order, 8, 16, 0, nullptr, order.data(), &next);
  return order;
}

void schedules() {
  const auto first = order_under(1, sim::Order::kRandom);
  expect(first == order_under(1, sim::Order::kRandom), "a seed repeats its order");
  expect(first != order_under(2, sim::Order::kRandom), "another seed has another order");
  std::vector<unsigned> blocks;
  for (unsigned i = 0; i < 128; i += 16) blocks.push_back(order_under(1, sim::Order::kForward)[i]);
  for (unsigned i = 0; i < 8; ++i) expect(blocks[i] / 16 == i, "forward");
  const auto reversed = order_under(1, sim::Order::kReversed);
  for (unsigned i = 0; i < 8; ++i) expect(reversed[i * 16] / 16 == 7 - i, "reversed");
  auto sorted = first;
  std::sort(sorted.begin(), sorted.end());
  for (unsigned i = 0; i < 128; ++i) expect(sorted[i] == i, "every thread once");
}

void refuse(Grid grid, dim3 block, size_t shared_bytes) {
  int value = 0;
  try {
    launch(double_values, grid, block, shared_bytes, nullptr, &value);
  } catch (const std::runtime_error& error) {
    const std::string message = error.what();
    expect(message.find("invalid configuration") != std::string::npos, "says what");
    expect(message.find("simulator_checks.cu:") != std::string::npos, "says where");
    return;
  }
  expect(false, "an invalid launch is refused");
}

void invalid_launches() {
  refuse(0, 32, 0);
  refuse(dim3(1, 0), 32, 0);
  refuse(dim3(1, 65536), 32, 0);
  refuse(1, 0, 0);
  refuse(1, 1025, 0);
  refuse(1, dim3(32, 33), 0);
  refuse(1, dim3(1, 1, 65), 0);
  refuse(1, 32, (227 << 10) + 1);
}

// ---------------------------------------------------------------- mistakes, each to be caught

__global__ void mistaken_barrier_in_branch() {
  if (threadIdx.x != 7) __syncthreads();
  __syncwarp();
}

__global__ void mistaken_two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void mistaken_full_mask_in_branch(unsigned* out) {
  if (threadIdx.x < 8) *out = __shfl_sync(kAll, threadIdx.x, 0);
  __syncthreads();
}

__global__ void mistaken_mask_without_self() { __syncwarp(threadIdx.x == 4 ? 0xfu : kAll); }

__global__ void mistaken_width(unsigned* out) { *out = __shfl_sync(kAll, 1u, 0, 12); }

__global__ void mistaken_no_barrier(unsigned* out) {
  __shared__ unsigned shared[64];
  shared[threadIdx.x] = threadIdx.x;
  out[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void mistaken_no_atomic_between_blocks(unsigned* out) {
  __syncthreads();  // orders threads of a block, never blocks
  if (threadIdx.x == 0) *out += 1;
}

__global__ void mistaken_no_fence(unsigned* partial, unsigned* num_finished) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = 1;
  if (atomicAdd(num_finished, 1) != gridDim.x - 1) return;
  for (unsigned b = 0; b < gridDim.x; ++b) partial[gridDim.x] += partial[b];
}

__global__ void mistaken_shuffle_for_syncwarp(unsigned* out) {
  __shared__ unsigned shared[32];
  shared[threadIdx.x] = threadIdx.x;
  __shfl_sync(kAll, 0, 0);
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

__global__ void mistaken_dynamic_index(unsigned* out) {
  FASTPRUNE_DYNAMIC_SHARED(unsigned, dynamic);
  dynamic[threadIdx.x + 1] = 1;
  *out = 1;
}

__global__ void mistaken_static_index(unsigned* out) {
  __shared__ unsigned fixed[32];
  fixed[threadIdx.x + 1] = 1;
  *out = fixed[threadIdx.x];
}

__global__ void mistaken_global_index(unsigned* out) { out[threadIdx.x] = 1; }

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int threads, Arguments... arguments) {
  launch(kernel, 4, threads, 32 * sizeof(unsigned), nullptr, arguments...);
}

struct Check {
  const char* name;
  void (*run)();
};

const Check kChecks[] = {
    {"indices", indices},
    {"barrier_votes", barrier_votes},
    {"loop_until_all_agree", loop_until_all_agree},
    {"early_returning_threads", early_returning_threads},
    {"shuffles", shuffles},
    {"warp_votes", warp_votes},
    {"syncwarp_orders_memory", syncwarp_orders_memory},
    {"absent_lanes_give_garbage", absent_lanes_give_garbage},
    {"block_primitives", block_primitives},
    {"every_block_finds_garbage_in_shared_memory", every_block_finds_garbage_in_shared_memory},
    {"dynamic_shared_memory", dynamic_shared_memory},
    {"atomics", atomics},
    {"fences_publish", fences_publish},
    {"launches_are_ordered_with_the_host", launches_are_ordered_with_the_host},
    {"intrinsics", intrinsics},
    {"schedules", schedules},
    {"invalid_launches", invalid_launches},
};

unsigned memory[512];
std::vector<unsigned> heap(32);

const Check kMistakes[] = {
    {"barrier_in_branch", [] { run(mistaken_barrier_in_branch, 64); }},
    {"two_barriers", [] { run(mistaken_two_barriers, 64); }},
    {"full_mask_in_branch", [] { run(mistaken_full_mask_in_branch, 64, memory); }},
    {"mask_without_self", [] { run(mistaken_mask_without_self, 32); }},
    {"width", [] { run(mistaken_width, 32, memory); }},
    {"no_barrier", [] { run(mistaken_no_barrier, 64, memory); }},
    {"no_atomic_between_blocks", [] { run(mistaken_no_atomic_between_blocks, 64, memory); }},
    {"no_fence", [] { run(mistaken_no_fence, 64, memory, memory + 100); }},
    {"shuffle_for_syncwarp", [] { run(mistaken_shuffle_for_syncwarp, 32, memory); }},
    {"dynamic_index", [] { run(mistaken_dynamic_index, 32, memory); }},
    {"static_index", [] { run(mistaken_static_index, 32, memory); }},
    {"global_index", [] { run(mistaken_global_index, 33, heap.data()); }},
};

bool named(const Check& check, int count, char** names) {
  return std::any_of(names, names + count,
                     [&](const char* name) { return check.name == std::string(name); });
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (const Check& check : kChecks) {
      if (argc == 1 || named(check, argc, argv)) check.run();
      if (argc == 1) std::printf("%s\n", check.name);
    }
    for (const Check& mistake : kMistakes) {
      if (named(mistake, argc, argv)) mistake.run();
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
