// A step of a program, prepared for the shapes of one call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/sparse_conv/code_store.h"
#include "cpu/sparse_conv/kernels.h"
#include "cpu/sparse_conv/layout.h"
#include "cpu/sparse_conv/program.h"
#include "cpu/sparse_conv/shapes.h"

namespace fastprune {
namespace sparse {

// An activation, and its place in the arena.
struct Slot {
  Shape shape;
  Layout layout;
  int64_t group_stride;  // floats from a group to the next one; 0 where groups take turns
  int64_t offset;        // floats; set after the stages are made
};

struct InputTensor {
  const float* data;
  int64_t stride[4];
};

struct Call {
  const InputTensor* inputs;
  float* const* outputs;
  float* arena;
  const KernelTable& kernels;
  ParallelFor parallel_for;

  float* at(const Slot& slot, int64_t group) const {
    return arena + slot.offset + group * slot.group_stride;
  }
};

class Stage {
 public:
  virtual ~Stage() = default;
  // Groups are those of the layout it writes; where it writes a tensor, of the one it reads.
  virtual void run(const Call& call, int64_t group) const = 0;

  int64_t scratch_size = 0;  // floats that it needs while it runs
  int64_t scratch_offset = 0;
};

// What a stage is made from. It keeps the slots' addresses.
struct StageSource {
  const Step& step;
  const std::vector<WeightArray>& weights;
  const KernelTable& kernels;
  const Slot* in;
  const Slot* second;  // or null
  const Slot* out;     // or null
  CodeStore* code;     // null: no code can be generated
};

std::unique_ptr<Stage> make_conv(const StageSource& source);
std::unique_ptr<Stage> make_pool(const StageSource& source);
std::unique_ptr<Stage> make_global_average(const StageSource& source);
std::unique_ptr<Stage> make_scale_add(const StageSource& source);  // add and affine
std::unique_ptr<Stage> make_gate(const StageSource& source);
std::unique_ptr<Stage> make_concat(const StageSource& source);
std::unique_ptr<Stage> make_import(const Slot* out, int64_t input, const InputTensor& tensor);
std::unique_ptr<Stage> make_export(const Slot* in, int64_t output);

// Tasks that go to one thread together, each of `cost` steps of a vector.
inline int64_t grain_of(int64_t cost) {
  constexpr int64_t kWorthThread = 20000;
  return cost <= 0 ? kWorthThread : kWorthThread / cost + 1;
}

// Fills a scratch buffer with the windows of a group's blocks, row by row like both lie in memory.
inline void run_gather(const Call& call, const Gather& gather, const float* from, int64_t group,
                       int64_t channels, float fill, float* to) {
  const GatherMap& map = gather.map(group);
  from += gather.shift_of_group[group];
  const int64_t rows = static_cast<int64_t>(map.size());
  const int64_t cost = gather.target_stride / call.kernels.lanes * 2;
  call.parallel_for(rows * channels, grain_of(cost), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % channels;
      call.kernels.gather(map[i / channels], from + c * gather.source_stride,
                          to + c * gather.target_stride, fill);
    }
  });
}

inline Source source_of(const Slot& slot) { return {&slot.layout, slot.group_stride, {}}; }

}  // namespace sparse
}  // namespace fastprune
