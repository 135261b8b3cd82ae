// Runs the selection kernels on adversarial lists and compares with a sort; exit status 1 on a
// difference. Every buffer ends where its data ends, for sanitizers to see a step beyond.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/select.h"

namespace {

using namespace fastprune;

std::mt19937_64 random_bits(1);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that begins `past` bytes after a 16-byte boundary, filled with garbage.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t past = 0) : past_(past) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes + past) != 0) std::abort();
    memory_.reset(memory);
    std::fill_n(static_cast<unsigned char*>(memory), bytes + past, 0xa5);
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.get()) + past_);
  }

 private:
  size_t past_;
  std::unique_ptr<void, Free> memory_;
};

size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

uint16_t half_of(double x) {  // truncated, normal numbers only
  const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(x));
  const uint32_t sign = bits >> 16 & 0x8000u;
  const int exponent = static_cast<int>(bits >> 23 & 0xffu) - 112;
  if (exponent >= 31) return static_cast<uint16_t>(sign | (std::isnan(x) ? 0x7e00u : 0x7c00u));
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | exponent << 10 | (bits >> 13 & 0x3ffu));
}

struct TestTensor {
  std::vector<int64_t> sizes, strides;
  Buffer value, gradient, mask;
  TensorEntry entry;

  double read(const void* data, int64_t offset) const {
    if (data == nullptr) return 0;
    switch (entry.dtype) {
      case DType::kFloat64:
        return static_cast<const double*>(data)[offset];
      case DType::kFloat32:
        return static_cast<const float*>(data)[offset];
      case DType::kBFloat16:
        return widen(static_cast<const BFloat16*>(data)[offset]);
      default:
        return widen(static_cast<const Float16*>(data)[offset]);
    }
  }
  void write(void* data, int64_t offset, double x) const {
    const float f = static_cast<float>(x);
    switch (entry.dtype) {
      case DType::kFloat64:
        static_cast<double*>(data)[offset] = x;
        break;
      case DType::kFloat32:
        static_cast<float*>(data)[offset] = f;
        break;
      case DType::kBFloat16:
        static_cast<BFloat16*>(data)[offset].bits = bit_cast<uint32_t>(f) >> 16;
        break;
      default:
        static_cast<Float16*>(data)[offset].bits = half_of(x);
    }
  }
  int64_t offset(int64_t position) const {
    int64_t result = 0;
    for (size_t d = sizes.size(); d-- > 0; position /= sizes[d]) {
      result += position % sizes[d] * strides[d];
    }
    return result;
  }
  double score(ScoreKind kind, int64_t at) const {
    const double value = read(entry.value, at);
    if (kind == ScoreKind::kValue) return value + 0.0;
    if (kind == ScoreKind::kMagnitude) return std::fabs(value);
    const double gradient = read(entry.gradient, at);
    if (entry.dtype == DType::kFloat64) return std::fabs(value * gradient);
    return std::fabs(static_cast<float>(value) * static_cast<float>(gradient));
  }
};

struct Shape {
  std::vector<int64_t> sizes;
  std::vector<int> memory_order = {};  // dimensions, the slowest first; empty: row-major
  DType dtype = DType::kFloat32;
  int64_t past_boundary = 0;  // elements
  int64_t gradient_past_boundary = 0;
};

using Generator = std::function<double()>;

TestTensor make_tensor(const Shape& shape, const Generator& generate) {
  const int dims = static_cast<int>(shape.sizes.size());
  std::vector<int> order = shape.memory_order;
  if (order.empty()) {
    order.resize(dims);
    std::iota(order.begin(), order.end(), 0);
  }
  std::vector<int64_t> strides(dims);
  int64_t numel = 1;
  for (int i = dims - 1; i >= 0; numel *= shape.sizes[order[i]], --i) strides[order[i]] = numel;
  const size_t width = size_of(shape.dtype);
  TestTensor tensor{shape.sizes,
                    strides,
                    Buffer(numel * width, shape.past_boundary * width),
                    Buffer(numel * width, shape.gradient_past_boundary * width),
                    Buffer(numel),
                    {}};
  TensorEntry& entry = tensor.entry;
  entry.value = tensor.value.as<void>();
  entry.gradient = tensor.gradient.as<void>();
  entry.numel = numel;
  entry.dtype = shape.dtype;
  if (!make_layout(shape.sizes.data(), strides.data(), dims, &entry.layout)) std::abort();
  for (int64_t i = 0; i < numel; ++i) {
    tensor.write(tensor.value.as<void>(), i, generate());
    tensor.write(tensor.gradient.as<void>(), i, generate());
  }
  return tensor;
}

std::vector<TestTensor> make_list(const std::vector<Shape>& shapes, const Generator& generate) {
  std::vector<TestTensor> tensors;
  for (const Shape& shape : shapes) tensors.push_back(make_tensor(shape, generate));
  return tensors;
}

// ---------------------------------------------------------------- what is expected

bool is_better(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && !std::isnan(b);
  return a > b;
}

struct Expected {
  double threshold;
  int64_t num_ties, tie_end;
  std::vector<bool> kept;
};

Expected expected_of(const std::vector<double>& scores, int64_t num_kept) {
  const int64_t size = scores.size();
  num_kept = std::clamp<int64_t>(num_kept, 0, size);
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return is_better(scores[a], scores[b]); });
  Expected expected{NAN, 0, size, std::vector<bool>(size)};
  if (num_kept > 0) expected.threshold = scores[order[num_kept - 1]];
  for (int64_t i = 0; i < num_kept; ++i) {
    expected.kept[order[i]] = true;
    expected.num_ties += !is_better(scores[order[i]], expected.threshold);
  }
  for (int64_t i = size - 1; i >= 0; --i) {
    const bool is_tie =
        !is_better(scores[i], expected.threshold) && !is_better(expected.threshold, scores[i]);
    if (is_tie && !expected.kept[i]) expected.tie_end = i;
  }
  return expected;
}

int num_failures = 0;

void expect(bool good, const std::string& name, const char* what) {
  if (good) return;
  ++num_failures;
  std::fprintf(stderr, "%s: %s differs\n", name.c_str(), what);
}

bool equal(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// ---------------------------------------------------------------- one case

struct Segments {
  std::vector<std::vector<double>> scores;
  std::vector<std::vector<std::pair<const TestTensor*, int64_t>>> places;  // offsets
  int32_t flags = 0;
};

Segments segments_of(std::vector<TestTensor>& tensors, ScoreKind kind, bool segmented) {
  Segments segments;
  const size_t count = segmented ? tensors.size() : 1;
  segments.scores.resize(count);
  segments.places.resize(count);
  for (size_t t = 0; t < tensors.size(); ++t) {
    const size_t s = segmented ? t : 0;
    tensors[t].entry.segment = static_cast<int32_t>(s);
    tensors[t].entry.first_position = static_cast<int64_t>(segments.scores[s].size());
    for (int64_t p = 0; p < tensors[t].entry.numel; ++p) {
      const int64_t offset = tensors[t].offset(p);
      const double score = tensors[t].score(kind, offset);
      segments.flags |=
          (std::isinf(score) ? kInfinitySeen : 0) | (std::isnan(score) ? kNanSeen : 0);
      segments.scores[s].push_back(score);
      segments.places[s].emplace_back(&tensors[t], offset);
    }
  }
  return segments;
}

void check_selection(const std::string& name, std::vector<TestTensor>& tensors, ScoreKind kind,
                     bool segmented, const std::vector<int64_t>& num_kept, int max_blocks) {
  const Segments segments = segments_of(tensors, kind, segmented);
  const size_t count = segments.scores.size();
  std::vector<TensorEntry> entries;
  std::vector<bool*> masks;
  for (const TestTensor& tensor : tensors) {
    entries.push_back(tensor.entry);
    masks.push_back(tensor.mask.as<bool>());
  }
  const bool is_double = !entries.empty() && entries[0].dtype == DType::kFloat64;
  const Buffer counts(count * 8), threshold(count * (is_double ? 8 : 4)), num_ties(count * 8),
      tie_end(count * 8), non_finite(4);
  std::copy_n(num_kept.begin(), count, counts.as<int64_t>());
  const Buffer scratch(select_threshold_scratch(entries, segmented));
  select_threshold(entries, segmented, kind, counts.as<int64_t>(),
                   {threshold.as<void>(), num_ties.as<int64_t>(), tie_end.as<int64_t>(),
                    non_finite.as<int32_t>()},
                   scratch.as<void>(), max_blocks, nullptr);
  const Buffer table(select_masks_scratch(entries));
  select_masks(entries, kind, threshold.as<void>(), tie_end.as<int64_t>(), masks, table.as<void>(),
               max_blocks, nullptr);

  expect(*non_finite.as<int32_t>() == segments.flags, name, "non_finite");
  for (size_t s = 0; s < count; ++s) {
    const Expected expected = expected_of(segments.scores[s], num_kept[s]);
    const double found = is_double ? threshold.as<double>()[s] : threshold.as<float>()[s];
    expect(equal(found, expected.threshold), name, "threshold");
    expect(num_ties.as<int64_t>()[s] == expected.num_ties, name, "num_ties");
    expect(tie_end.as<int64_t>()[s] == expected.tie_end, name, "tie_end");
    bool same = true;
    for (size_t i = 0; i < expected.kept.size(); ++i) {
      const auto& [tensor, offset] = segments.places[s][i];
      same &= tensor->mask.as<uint8_t>()[offset] == expected.kept[i];
    }
    expect(same, name, "a mask");
  }
}

template <typename Score>
void check_blocks(const std::string& name, const std::vector<TestTensor>& tensors, ScoreKind kind,
                  int64_t block_outputs, int64_t block_inputs) {
  std::vector<BlockedWeight> weights;
  std::vector<Buffer> sums;
  std::vector<std::vector<Score>> expected;
  for (const TestTensor& tensor : tensors) {
    const int64_t outputs = tensor.sizes[0], inputs = tensor.sizes[1];
    const int64_t taps = tensor.entry.numel / (outputs * inputs);
    const int64_t rows = (outputs + block_outputs - 1) / block_outputs;
    const int64_t columns = (inputs + block_inputs - 1) / block_inputs;
    std::vector<Score>& sum = expected.emplace_back(rows * columns * taps);
    for (int64_t at = 0; at < rows * columns * taps; ++at) {
      const int64_t row = at / taps / columns, column = at / taps % columns;
      for (int64_t i = column * block_inputs; i < std::min(inputs, (column + 1) * block_inputs);
           ++i) {
        volatile Score down = 0;
        for (int64_t o = row * block_outputs; o < std::min(outputs, (row + 1) * block_outputs);
             ++o) {
          const int64_t offset = tensor.offset((o * inputs + i) * taps + at % taps);
          down = down + static_cast<Score>(tensor.score(kind, offset));
        }
        sum[at] += down;
      }
    }
    sums.emplace_back(sum.size() * sizeof(Score));
    weights.push_back({tensor.entry, outputs, inputs, taps, sums.back().as<void>()});
  }
  const Buffer scratch(block_scores_scratch(weights));
  block_scores(weights, kind, block_outputs, block_inputs, scratch.as<void>(), 2, nullptr);
  for (size_t i = 0; i < sums.size(); ++i) {
    const Score* found = sums[i].as<Score>();
    expect(std::equal(expected[i].begin(), expected[i].end(), found), name, "a block sum");
  }
}

// ---------------------------------------------------------------- the cases

double uniform() { return static_cast<double>(random_bits() >> 11) * 0x1p-53; }
double normal() {
  static std::normal_distribution<double> distribution;
  return distribution(random_bits);
}
double few_values() { return static_cast<double>(random_bits() % 7) - 3; }
double mostly_zero() { return random_bits() % 8 != 0 ? 0.0 : normal(); }
double strange() {
  static const double values[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e-40, -1e-40, 1.0, 3e38};
  return values[random_bits() % 9];
}

constexpr ScoreKind kKinds[] = {ScoreKind::kValue, ScoreKind::kMagnitude, ScoreKind::kSaliency};
const std::vector<int> kChannelsLast = {0, 2, 3, 1};

std::vector<Shape> mixed_shapes() {
  std::vector<Shape> shapes;
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (int i = 0; i < 34; ++i) {  // more than one slice of the table
    shapes.push_back({{(i * 37) % 130}, {}, dtypes[i % 3], i % 5, i % 4});
  }
  shapes.push_back({{4097}, {}, DType::kBFloat16, 0, 0});
  shapes.push_back({{5, 70, 3, 5}, kChannelsLast, DType::kFloat32, 1, 1});
  shapes.push_back({{3, 4, 5, 2, 6}, {4, 1, 3, 0, 2}, DType::kFloat16, 0, 1});
  return shapes;
}

void check_mixed() {
  for (ScoreKind kind : kKinds) {
    for (const auto& generate : {Generator(normal), Generator(strange)}) {
      std::vector<TestTensor> tensors = make_list(mixed_shapes(), generate);
      std::vector<int64_t> counts;
      int64_t total = 0;
      for (size_t i = 0; i < tensors.size(); ++i) {
        counts.push_back(static_cast<int64_t>(random_bits() % (tensors[i].entry.numel + 2)) - 1);
        total += tensors[i].entry.numel;
      }
      check_selection("mixed, segmented", tensors, kind, true, counts, 3);
      check_selection("mixed", tensors, kind, false, {total / 3}, 3);
    }
  }
}

// Candidates that fill a block's buffer again and again, and keys too frequent to be candidates.
void check_crowded_bins() {
  const auto narrow = [] { return 1 + uniform() * 0x1p-5; };
  const auto equal_values = [] { return -2.5; };
  for (const auto& generate : {Generator(narrow), Generator(equal_values), Generator(few_values)}) {
    std::vector<TestTensor> tensors = make_list({{{13000}}}, generate);
    for (int max_blocks : {1, 2}) {
      check_selection("crowded", tensors, ScoreKind::kValue, false, {6001}, max_blocks);
    }
  }
  std::vector<TestTensor> zeros = make_list({{{9000}}}, mostly_zero);
  check_selection("zeros", zeros, ScoreKind::kMagnitude, false, {4000}, 2);
  std::vector<TestTensor> spread = make_list({{{12000}}}, normal);
  for (int64_t k : {-1, 0, 1, 5000, 12000, 99999}) {
    check_selection("spread", spread, ScoreKind::kMagnitude, false, {k}, 2);
  }
}

void check_ties() {
  for (const Shape& shape : {Shape{{3, 50, 8, 8}, kChannelsLast}, Shape{{9600}}}) {
    std::vector<TestTensor> tensors = make_list({shape, shape}, few_values);
    for (int64_t k : {1, 1500, 7777, 19199}) {
      check_selection("ties", tensors, ScoreKind::kValue, false, {k}, 2);
    }
    check_selection("ties, segmented", tensors, ScoreKind::kMagnitude, true, {5000, 40}, 2);
  }
}

void check_doubles() {
  const auto close = [] { return 1 + uniform() * 0x1p-30; };
  for (ScoreKind kind : kKinds) {
    for (const auto& generate : {Generator(close), Generator(normal), Generator(strange)}) {
      std::vector<TestTensor> tensors = make_list(
          {{{5001}, {}, DType::kFloat64, 1, 0}, {{10, 7, 3, 4}, kChannelsLast, DType::kFloat64}},
          generate);
      check_selection("doubles", tensors, kind, false, {2000}, 2);
    }
  }
  const auto narrow = [] { return 1 + uniform() * 0x1p-23; };
  std::vector<TestTensor> crowded = make_list({{{9100}, {}, DType::kFloat64}}, narrow);
  check_selection("doubles, crowded", crowded, ScoreKind::kValue, false, {3000}, 1);
}

void check_empty() {
  std::vector<TestTensor> none;
  check_selection("no tensors", none, ScoreKind::kValue, false, {3}, 2);
  check_selection("no tensors, segmented", none, ScoreKind::kValue, true, {}, 2);
  std::vector<TestTensor> empty = make_list({{{0}}, {{0, 3}}}, normal);
  check_selection("empty tensors", empty, ScoreKind::kSaliency, false, {0}, 2);
  check_selection("empty tensors, segmented", empty, ScoreKind::kSaliency, true, {1, 0}, 2);
}

void check_block_scores() {
  std::vector<Shape> shapes;
  for (int64_t i = 1; i <= 20; ++i) shapes.push_back({{i, 2 * i + 1}});
  shapes.push_back({{13, 19, 3, 2}, kChannelsLast});
  shapes.push_back({{13, 19, 3, 2}, {1, 2, 3, 0}, DType::kBFloat16});
  shapes.push_back({{6, 5, 2, 3, 4}, {4, 1, 3, 0, 2}, DType::kFloat16});
  for (ScoreKind kind : kKinds) {
    const std::vector<TestTensor> tensors = make_list(shapes, normal);
    check_blocks<float>("blocks 4x1", tensors, kind, 4, 1);
    check_blocks<float>("blocks 5x11", tensors, kind, 5, 11);
    check_blocks<float>("blocks 1x64", tensors, kind, 1, 64);
  }
  const std::vector<TestTensor> doubles =
      make_list({{{9, 10, 2, 2}, kChannelsLast, DType::kFloat64}}, normal);
  check_blocks<double>("blocks of doubles", doubles, ScoreKind::kSaliency, 2, 3);
}

}  // namespace

int main() {
  check_empty();
  check_mixed();
  check_crowded_bins();
  check_ties();
  check_doubles();
  check_block_scores();
  return num_failures == 0 ? 0 : 1;
}
