// Sparse convolutions against a plain loop in double, for the sanitizers: 0 if all agree and every
// bad program is refused. Arguments: the number of random convolutions and a seed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sparse_conv/network.h"

namespace fastprune {
namespace sparse {
namespace {

using Random = std::mt19937;

int pick(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

template <typename T>
T one_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[pick(random, 0, static_cast<int>(choices.size()) - 1)];
}

// Ranges in an order of their own, as another number of threads would take them.
void run_backwards(int64_t begin, int64_t end, int64_t grain, ParallelFor::Body body,
                   void* context) {
  const int64_t step = std::max(grain, (end - begin + 2) / 3);
  for (int64_t at = begin + (end - begin - 1) / step * step; at >= begin; at -= step) {
    body(at, std::min(at + step, end), context);
  }
}
constexpr ParallelFor kBackwards{run_backwards};

// Every array ends with its last element, so that a read behind it is seen.
struct Case {
  Shape in, out;
  Window window;
  int64_t groups;
  Kernel kernel;
  bool has_residual;
  std::vector<float> x, residual, values, bias;
  std::vector<int32_t> columns, starts;

  std::vector<WeightArray> weights() const {
    const auto size = [](const auto& v) { return static_cast<int64_t>(v.size()); };
    return {{values.data(), size(values), true},
            {columns.data(), size(columns), false},
            {starts.data(), size(starts), false},
            {bias.data(), size(bias), true}};
  }

  std::vector<int64_t> program() const {
    const Window& w = window;
    const int64_t inputs = has_residual ? 2 : 1, second = has_residual ? 1 : -1;
    return {0, inputs, 0, second, 0, w.kernel[0], w.kernel[1], w.stride[0], w.stride[1], w.pad[0],
            w.pad[1], w.dilation[0], w.dilation[1], groups, 1, static_cast<int64_t>(kernel), 0, 0,
            // the output step
            8, -1, inputs, -1, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0};
  }

  std::vector<InputSpec> inputs() const {
    const auto spec = [](const Shape& s) {
      const int64_t plane = s.height * s.width;
      return InputSpec{s, {s.channels * plane, plane, s.width, 1}};
    };
    std::vector<InputSpec> specs{spec(in)};
    if (has_residual) specs.push_back(spec(out));
    return specs;
  }
};

int64_t elements(const Shape& s) { return s.images * s.channels * s.height * s.width; }

void fill(Random& random, int64_t size, std::vector<float>* values) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < size; ++i) values->push_back(normal(random));
}

void add_weights(Random& random, Case* c) {
  const int64_t columns = c->in.channels / c->groups * c->window.kernel[0] * c->window.kernel[1];
  const double kept = one_of(random, {0.0, 0.02, 0.1, 0.3, 0.6, 1.0});
  const int block = one_of(random, {1, 1, 4});  // outputs whose zeros are the same
  std::vector<bool> keeps(columns);
  c->starts.push_back(0);
  for (int64_t o = 0; o < c->out.channels; ++o) {
    for (int64_t i = 0; i < columns; ++i) {
      if (o % block == 0) keeps[i] = std::bernoulli_distribution(kept)(random);
      if (!keeps[i]) continue;
      c->columns.push_back(static_cast<int32_t>(i));
      fill(random, 1, &c->values);
    }
    c->starts.push_back(static_cast<int32_t>(c->values.size()));
  }
  fill(random, c->out.channels, &c->bias);
}

// False where the kernel is larger than the padded image.
bool make_case(Random& random, Case* c) {
  c->groups = one_of(random, {1, 1, 1, 2, 3});
  const bool depthwise = pick(random, 0, 5) == 0;
  const int64_t inputs = depthwise ? pick(random, 1, 20) : c->groups * pick(random, 1, 20);
  const int64_t outputs = depthwise ? inputs : c->groups * pick(random, 1, 36);
  if (depthwise) c->groups = inputs;
  c->in = {one_of(random, {1, 1, 2, 5, 16, 17}), inputs, pick(random, 1, 30), pick(random, 1, 30)};
  c->out = {c->in.images, outputs, 0, 0};
  const int64_t size[2] = {c->in.height, c->in.width};
  for (int d = 0; d < 2; ++d) {
    Window& w = c->window;
    w.kernel[d] = one_of(random, {1, 1, 2, 3, 3, 5});
    w.stride[d] = one_of(random, {1, 1, 2, 3});
    w.pad[d] = one_of<int64_t>(random, {0, w.kernel[d] / 2, 2});
    w.dilation[d] = one_of(random, {1, 1, 2});
    const int64_t room = size[d] + 2 * w.pad[d] - (w.kernel[d] - 1) * w.dilation[d] - 1;
    if (room < 0) return false;
    (d == 0 ? c->out.height : c->out.width) = room / w.stride[d] + 1;
  }
  c->kernel = static_cast<Kernel>(pick(random, 0, 3));
  c->has_residual = pick(random, 0, 2) == 0;
  fill(random, elements(c->in), &c->x);
  if (c->has_residual) fill(random, elements(c->out), &c->residual);
  add_weights(random, c);
  return true;
}

// Output number `index` and the sum of what it adds up, without signs.
double expected(const Case& c, int64_t index, double* size) {
  const int64_t x = index % c.out.width, y = index / c.out.width % c.out.height;
  const int64_t o = index / (c.out.width * c.out.height) % c.out.channels;
  const int64_t image = index / (c.out.width * c.out.height * c.out.channels);
  const int64_t taps = c.window.kernel[0] * c.window.kernel[1];
  const int64_t first_channel = o / (c.out.channels / c.groups) * (c.in.channels / c.groups);
  double sum = c.bias[o];
  *size = std::abs(sum);
  const auto add = [&](double term) {
    sum += term;
    *size += std::abs(term);
  };
  if (c.has_residual) add(c.residual[index]);
  for (int32_t i = c.starts[o]; i < c.starts[o + 1]; ++i) {
    const int64_t tap = c.columns[i] % taps, channel = first_channel + c.columns[i] / taps;
    const Window& w = c.window;
    const int64_t iy = y * w.stride[0] - w.pad[0] + tap / w.kernel[1] * w.dilation[0];
    const int64_t ix = x * w.stride[1] - w.pad[1] + tap % w.kernel[1] * w.dilation[1];
    if (iy < 0 || iy >= c.in.height || ix < 0 || ix >= c.in.width) continue;
    add(double{c.values[i]} *
        c.x[((image * c.in.channels + channel) * c.in.height + iy) * c.in.width + ix]);
  }
  return std::max(sum, 0.0);
}

bool run_case(const Case& c, Isa isa) {
  const auto weights = c.weights();
  const auto program = c.program();
  const auto steps = parse_program(program.data(), 2, c.has_residual ? 2 : 1, weights);
  const Plan plan(steps, weights, c.inputs(), isa);
  std::vector<const float*> inputs{c.x.data()};
  if (c.has_residual) inputs.push_back(c.residual.data());
  std::vector<float> result(elements(c.out), NAN);
  plan.run(inputs, {result.data()}, kBackwards);
  double worst = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    double size = 0;
    const double error = std::abs(result[i] - expected(c, static_cast<int64_t>(i), &size));
    if (!(error <= 1e-5 * size))
      worst = std::max(worst, std::isnan(error) ? INFINITY : error / size);
  }
  if (worst == 0) return true;
  std::fprintf(stderr, "%s: kernel %d, [%ld, %ld, %ld, %ld] to %ld: off by %g\n", isa_name(isa),
               static_cast<int>(c.kernel), static_cast<long>(c.in.images),
               static_cast<long>(c.in.channels), static_cast<long>(c.in.height),
               static_cast<long>(c.in.width), static_cast<long>(c.out.channels), worst);
  return false;
}

// A small network of every kind of step, for its memory accesses; its results are tested elsewhere.
std::vector<int64_t> every_kind() {
  const std::vector<std::vector<int64_t>> rows = {
      {0, 1, 0, -1, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1, 3, 0, 0, 0},
      {2, 2, 1, -1, -1, 3, 3, 2, 2, 1, 1, 1, 1, 1, 0, 0, 1, 0},
      {3, 3, 2, -1, -1, 2, 2, 2, 2, 0, 0, 1, 1, 1, 0, 0, 2, 0},
      {4, 4, 3, -1, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0},
      {9, 5, 3, 4, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 5, 0, 0, 0},
      {5, 6, 5, 3, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 4, 0, 0, 0},
      {6, 7, 6, -1, 4, 1, 1, 1, 1, 0, 0, 1, 1, 1, 6, 0, 0, 0},
      {7, 8, 7, 3, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0},
      {1, 9, 4, -1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 2, 0, 0, 0},
      {8, -1, 8, -1, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0},
      {8, -1, 9, -1, -1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 4, 0},
  };
  std::vector<int64_t> program;
  for (const auto& row : rows) program.insert(program.end(), row.begin(), row.end());
  return program;
}

struct SmallNetwork {
  std::vector<float> values = {1, -2, 0.5f, 3}, bias = {0, 1, -1, 2}, scale = {1, 2, 3, 4};
  std::vector<int32_t> columns = {0, 3, 1, 2}, starts = {0, 2, 2, 3, 4};
  std::vector<WeightArray> weights() const {
    return {{values.data(), 4, true}, {columns.data(), 4, false}, {starts.data(), 5, false},
            {bias.data(), 4, true},   {scale.data(), 4, true},    {bias.data(), 4, true}};
  }

  void run(const std::vector<int64_t>& program, const std::vector<WeightArray>& arrays,
           int64_t images) const {
    const Shape shape{images, 4, 21, 13};
    const auto steps = parse_program(program.data(), program.size() / kStepFields, 1, arrays);
    const Plan plan(steps, arrays, {{shape, {4 * 21 * 13, 21 * 13, 13, 1}}}, supported_isa());
    const std::vector<float> x(elements(shape), 1);
    std::vector<std::vector<float>> results;
    std::vector<float*> outputs;
    for (const Output& output : plan.outputs()) results.emplace_back(elements(output.shape));
    for (auto& result : results) outputs.push_back(result.data());
    plan.run({x.data()}, outputs, kBackwards);
  }
};

// One number of the program, or of the weights' indices, changed at a time: refused with a message
// or run, but never a memory fault.
bool survives_changes() {
  const SmallNetwork network;
  const std::vector<int64_t> program = every_kind();
  for (const int64_t images : {1, 3, 40}) network.run(program, network.weights(), images);
  int refused = 0;
  const auto attempt = [&](const std::vector<int64_t>& changed,
                           const SmallNetwork& changed_weights) {
    try {
      changed_weights.run(changed, changed_weights.weights(), 2);
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  };
  for (size_t i = 0; i < program.size(); ++i) {
    for (const int64_t value : {INT64_MIN, int64_t{-2}, int64_t{-1}, int64_t{0}, int64_t{1},
                                int64_t{2}, int64_t{5}, int64_t{100}, INT64_MAX}) {
      std::vector<int64_t> changed = program;
      changed[i] = value;
      attempt(changed, network);
    }
  }
  for (size_t i = 0; i < 5; ++i) {
    for (const int32_t value : {INT32_MIN, -1, 0, 1, 3, 4, 35, 36, INT32_MAX}) {
      SmallNetwork changed = network;
      if (i < 4) changed.columns[i] = value;
      attempt(program, changed);
      changed = network;
      changed.starts[i] = value;
      attempt(program, changed);
    }
  }
  return refused > 800;
}

bool run_all(int number, unsigned seed) {
  Random random(seed);
  bool right = survives_changes();
  if (!right) std::fprintf(stderr, "bad programs are accepted\n");
  while (number > 0) {
    Case c;
    if (!make_case(random, &c)) continue;
    --number;
    for (const Isa isa : {Isa::Baseline, Isa::Avx2, Isa::Avx512}) {
      if (isa <= supported_isa()) right = run_case(c, isa) && right;
    }
  }
  return right;
}

}  // namespace
}  // namespace sparse
}  // namespace fastprune

int main(int, char** arguments) {
  return fastprune::sparse::run_all(std::atoi(arguments[1]), std::atoi(arguments[2])) ? 0 : 1;
}
