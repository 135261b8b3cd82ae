// A program prepared for inputs of given sizes and strides: layouts, tables, packed weights.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sparse_conv/memory.h"
#include "cpu/sparse_conv/stage.h"

namespace fastprune {
namespace sparse {

struct InputSpec {
  Shape shape;
  int64_t stride[4];

  friend bool operator==(const InputSpec& a, const InputSpec& b);
};

struct Output {
  Shape shape;
  bool flatten;  // [images, channels] outside
};

class Plan {
 public:
  Plan(const std::vector<Step>& steps, const std::vector<WeightArray>& weights,
       const std::vector<InputSpec>& inputs, Isa isa);

  const std::vector<InputSpec>& inputs() const { return inputs_; }
  const std::vector<Output>& outputs() const { return outputs_; }

  // From several threads at once too: each call has activations of its own. Adds the seconds of
  // each step to `seconds`, if it is not null.
  void run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
           ParallelFor parallel_for, std::vector<double>* seconds = nullptr) const;

 private:
  struct Planned {
    std::unique_ptr<Stage> stage;
    std::vector<Slot*> reads;
    Slot* written;  // or null
    int64_t step;   // its time counts for this one

    const Layout& layout() const { return written == nullptr ? reads[0]->layout : written->layout; }
  };
  // Stages with the same groups of images. They run group after group, so that a group's
  // activations stay in the caches.
  struct Segment {
    int64_t begin, end, groups;
  };

  void set_shapes(const std::vector<Step>& steps, const std::vector<WeightArray>& weights);
  void set_segments();
  int64_t last_reader(const Slot& slot) const;
  void make_stages(const std::vector<Step>& steps, const std::vector<WeightArray>& weights);
  void place_activations();
  Buffer take_arena() const;

  const KernelTable& kernels_;
  std::vector<InputSpec> inputs_;
  std::vector<Output> outputs_;
  std::vector<std::unique_ptr<Slot>> slots_;  // stages keep their addresses
  std::unique_ptr<CodeStore> code_;           // null where the system refuses executable pages
  std::vector<Planned> stages_;
  std::vector<Segment> segments_;
  int64_t arena_size_ = 0;

  mutable std::mutex mutex_;
  mutable std::vector<Buffer> idle_arenas_;
};

}  // namespace sparse
}  // namespace fastprune
