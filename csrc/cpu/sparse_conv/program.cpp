#include "cpu/sparse_conv/program.h"

#include <stdexcept>
#include <string>

namespace fastprune {
namespace sparse {

void fail_step(int64_t step, const char* what, int64_t got) {
  throw std::invalid_argument("sparse_network: step " + std::to_string(step) + ": " + what +
                              ", got " + std::to_string(got));
}

namespace {

constexpr int64_t kMostOutputs = 1 << 24;
constexpr int64_t kLargest = 1024;  // of sizes, strides, pads: tables grow with their products

void check_between(int64_t step, const char* what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail_step(step, what, value);
}

Step read_step(int64_t index, const int64_t* row) {
  check_between(index, "kind must be 0 to 9", row[0], 0, 9);
  check_between(index, "activation must be 0 to 6", row[14], 0, 6);
  check_between(index, "kernel choice must be 0 to 3", row[15], 0, 3);
  check_between(index, "flags must be 0 to 7", row[16], 0, 7);
  check_between(index, "the last field must be 0", row[17], 0, 0);
  Step step{};
  step.kind = static_cast<Kind>(row[0]);
  step.out = row[1];
  step.in = row[2];
  step.second = row[3];
  step.weights = row[4];
  for (int d = 0; d < 2; ++d) {
    step.window.kernel[d] = row[5 + d];
    step.window.stride[d] = row[7 + d];
    step.window.pad[d] = row[9 + d];
    step.window.dilation[d] = row[11 + d];
  }
  step.groups = row[13];
  step.activation = static_cast<Activation>(row[14]);
  step.kernel = static_cast<Kernel>(row[15]);
  step.ceil_mode = (row[16] & 1) != 0;
  step.count_include_pad = (row[16] & 2) != 0;
  step.flatten = (row[16] & 4) != 0;
  return step;
}

bool is_pool(Kind kind) { return kind == Kind::kMaxPool || kind == Kind::kAveragePool; }

bool has_rows(Kind kind) { return kind == Kind::kConv || kind == Kind::kLinear; }

void check_window(int64_t index, const Step& step) {
  const Window& w = step.window;
  for (int d = 0; d < 2; ++d) {
    check_between(index, "kernel size must be 1 to 1024", w.kernel[d], 1, kLargest);
    check_between(index, "stride must be 1 to 1024", w.stride[d], 1, kLargest);
    check_between(index, "padding must be 0 to 1024", w.pad[d], 0, kLargest);
    check_between(index, "dilation must be 1 to 1024", w.dilation[d], 1, kLargest);
    if (!is_pool(step.kind)) continue;
    check_between(index, "padding of a pool must be at most half its kernel", w.pad[d], 0,
                  w.kernel[d] / 2);
    if (step.kind == Kind::kAveragePool) {
      check_between(index, "an average pool has no dilation", w.dilation[d], 1, 1);
    }
  }
}

const WeightArray& array_of(int64_t index, const std::vector<WeightArray>& weights, int64_t at,
                            bool is_float) {
  const WeightArray& array = weights[at];
  if (array.is_float != is_float) {
    fail_step(index, is_float ? "this tensor must be float32" : "this tensor must be int32", at);
  }
  return array;
}

void check_rows(int64_t index, const Step& step, const std::vector<WeightArray>& weights) {
  check_between(index, "weights must name 4 tensors", step.weights, 0,
                static_cast<int64_t>(weights.size()) - kConvTensors);
  const WeightArray& values = array_of(index, weights, step.weights, true);
  const WeightArray& columns = array_of(index, weights, step.weights + 1, false);
  const WeightArray& starts = array_of(index, weights, step.weights + 2, false);
  const WeightArray& bias = array_of(index, weights, step.weights + 3, true);
  const int64_t outputs = starts.size - 1;
  check_between(index, "row_starts must have one entry more than outputs", outputs, 1,
                kMostOutputs);
  check_between(index, "bias must have one entry per output", bias.size, outputs, outputs);
  check_between(index, "columns must have one entry per value", columns.size, values.size,
                values.size);
  check_between(index, "row_starts must begin with 0", starts.ints()[0], 0, 0);
  check_between(index, "row_starts must end with the number of values", starts.ints()[outputs],
                values.size, values.size);
  for (int64_t o = 0; o < outputs; ++o) {
    const int32_t begin = starts.ints()[o], end = starts.ints()[o + 1];
    check_between(index, "row_starts must ascend", end, begin, values.size);
    for (int32_t i = begin, last = -1; i < end; last = columns.ints()[i++]) {
      check_between(index, "columns must ascend in a row", columns.ints()[i], int64_t{last} + 1,
                    INT32_MAX);
    }
  }
  check_between(index, "groups must be positive", step.groups, 1, outputs);
  check_between(index, "outputs must be a multiple of groups, remainder", outputs % step.groups, 0,
                0);
}

void check_affine(int64_t index, const Step& step, const std::vector<WeightArray>& weights) {
  check_between(index, "weights must name 2 tensors", step.weights, 0,
                static_cast<int64_t>(weights.size()) - kAffineTensors);
  const WeightArray& scale = array_of(index, weights, step.weights, true);
  const WeightArray& shift = array_of(index, weights, step.weights + 1, true);
  check_between(index, "scale and shift must be equally long", shift.size, scale.size, scale.size);
}

// Every slot is written once and read afterwards only.
void check_slots(int64_t index, const Step& step, std::vector<bool>* written) {
  const int64_t slots = static_cast<int64_t>(written->size());
  const auto check_read = [&](const char* what, int64_t slot) {
    if (slot < 0 || slot >= slots || !(*written)[slot]) fail_step(index, what, slot);
  };
  check_read("`in` must be a slot written before", step.in);
  const bool needs_second =
      step.kind == Kind::kAdd || step.kind == Kind::kConcat || step.kind == Kind::kScale;
  if (needs_second || (has_rows(step.kind) && step.second != -1)) {
    check_read("`second` must be a slot written before", step.second);
  } else if (step.second != -1) {
    fail_step(index, "`second` must be -1 in a step of this kind", step.second);
  }
  if (step.kind == Kind::kOutput) return;
  check_between(index, "`out` must be a slot number", step.out, 0, slots - 1);
  if ((*written)[step.out]) fail_step(index, "`out` must be a slot not written before", step.out);
  (*written)[step.out] = true;
}

}  // namespace

SparseWeight sparse_weight(const std::vector<WeightArray>& weights, const Step& step) {
  const WeightArray* w = &weights[step.weights];
  return {w[0].floats(), w[1].ints(), w[2].ints(), w[3].floats(), w[2].size - 1};
}

std::vector<Step> parse_program(const int64_t* rows, int64_t num_steps, int64_t num_inputs,
                                const std::vector<WeightArray>& weights) {
  std::vector<Step> steps;
  std::vector<bool> written(num_inputs + num_steps, false);
  for (int64_t i = 0; i < num_inputs; ++i) written[i] = true;
  for (int64_t i = 0; i < num_steps; ++i) {
    const Step step = read_step(i, rows + i * kStepFields);
    check_slots(i, step, &written);
    if (has_rows(step.kind) || is_pool(step.kind)) check_window(i, step);
    if (has_rows(step.kind)) check_rows(i, step, weights);
    if (step.kind == Kind::kAffine && step.weights != -1) check_affine(i, step, weights);
    const bool activates = step.activation != Activation::kNone;
    if (activates && (is_pool(step.kind) || step.kind == Kind::kOutput)) {
      fail_step(i, "pools and outputs have no activation", static_cast<int64_t>(step.activation));
    }
    steps.push_back(step);
  }
  return steps;
}

}  // namespace sparse
}  // namespace fastprune
