// What a region of a network computes: a list of steps over numbered slots, and their weights.
#pragma once

#include <cstdint>
#include <vector>

namespace fastprune {
namespace sparse {

enum class Kind : int64_t {
  kConv,
  kLinear,
  kMaxPool,
  kAveragePool,
  kGlobalAverage,
  kAdd,
  kAffine,
  kConcat,
  kOutput,
  kScale,
};

enum class Activation : int64_t { kNone, kRelu, kRelu6, kHardswish, kSilu, kHardsigmoid, kSigmoid };

enum class Kernel : int64_t { kAutomatic, kRows, kBlocks, kGenerated };

// Kernel sizes, strides, pads and dilations by height and width.
struct Window {
  int64_t kernel[2], stride[2], pad[2], dilation[2];
};

struct Step {
  Kind kind;
  int64_t out, in, second;  // slots; second is -1 where there is none
  int64_t weights;          // the first of the step's tensors, or -1
  Window window;
  int64_t groups;
  Activation activation;
  Kernel kernel;
  bool ceil_mode, count_include_pad, flatten;
};

// A contiguous tensor of one dimension.
struct WeightArray {
  const void* data;
  int64_t size;
  bool is_float;  // else int32

  const float* floats() const { return static_cast<const float*>(data); }
  const int32_t* ints() const { return static_cast<const int32_t*>(data); }
};

// The rows of a convolution's or a linear layer's weight: the non-zeros of output o are those from
// starts[o] to starts[o + 1].
struct SparseWeight {
  const float* values;
  const int32_t* columns;  // (channel in its group * kernel height + y) * kernel width + x
  const int32_t* starts;
  const float* bias;
  int64_t outputs;
};

constexpr int64_t kStepFields = 18;
constexpr int64_t kConvTensors = 4;
constexpr int64_t kAffineTensors = 2;

SparseWeight sparse_weight(const std::vector<WeightArray>& weights, const Step& step);

// Reads `num_steps` rows of kStepFields numbers. Throws std::invalid_argument, naming the step, for
// anything that would make a kernel read or write outside its tensors; what depends on the shapes
// of the inputs is checked when a plan is made for them.
std::vector<Step> parse_program(const int64_t* rows, int64_t num_steps, int64_t num_inputs,
                                const std::vector<WeightArray>& weights);

[[noreturn]] void fail_step(int64_t step, const char* what, int64_t got);

}  // namespace sparse
}  // namespace fastprune
