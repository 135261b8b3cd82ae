#include "cpu/sparse_conv/plan.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace fastprune {
namespace sparse {

namespace {

// Adds the time of its life to a sum, if there is one.
class Timer {
 public:
  explicit Timer(double* seconds) : seconds_(seconds) {
    if (seconds_ != nullptr) begin_ = Clock::now();
  }
  ~Timer() {
    if (seconds_ == nullptr) return;
    *seconds_ += std::chrono::duration<double>(Clock::now() - begin_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* seconds_;
  Clock::time_point begin_;
};

}  // namespace

bool operator==(const InputSpec& a, const InputSpec& b) {
  return a.shape.images == b.shape.images && a.shape.channels == b.shape.channels &&
         a.shape.height == b.shape.height && a.shape.width == b.shape.width &&
         std::equal(a.stride, a.stride + 4, b.stride);
}

Plan::Plan(const std::vector<Step>& steps, const std::vector<WeightArray>& weights,
           const std::vector<InputSpec>& inputs, Isa isa)
    : kernels_(kernel_table(isa)), inputs_(inputs) {
  set_shapes(steps, weights);
  set_segments();
  code_ = std::make_unique<CodeStore>();
  make_stages(steps, weights);
  if (!code_->seal()) {
    code_ = nullptr;
    make_stages(steps, weights);
  }
  place_activations();
}

// The first stages bring the inputs into lanes; then there is one per step.
void Plan::set_shapes(const std::vector<Step>& steps, const std::vector<WeightArray>& weights) {
  slots_.resize(inputs_.size() + steps.size());
  const auto write = [&](int64_t slot, const Shape& shape) {
    const Layout layout =
        choose_layout(kernels_.lanes, shape.images, shape.channels, shape.height, shape.width);
    slots_[slot] = std::make_unique<Slot>(Slot{shape, layout, 0, 0});
    return slots_[slot].get();
  };
  for (size_t i = 0; i < inputs_.size(); ++i) {
    stages_.push_back({nullptr, {}, write(static_cast<int64_t>(i), inputs_[i].shape), 0});
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    Slot* in = slots_[step.in].get();
    Slot* second = step.second < 0 ? nullptr : slots_[step.second].get();
    Planned planned{nullptr, {in}, nullptr, static_cast<int64_t>(i)};
    if (second != nullptr) planned.reads.push_back(second);
    if (step.kind == Kind::kOutput) {
      outputs_.push_back({in->shape, step.flatten});
    } else {
      planned.written =
          write(step.out, output_shape(static_cast<int64_t>(i), step, weights, in->shape,
                                       second == nullptr ? nullptr : &second->shape));
    }
    stages_.push_back(std::move(planned));
  }
}

void Plan::set_segments() {
  for (size_t i = 0; i < stages_.size(); ++i) {
    const int64_t end = static_cast<int64_t>(i) + 1;
    const Layout& layout = stages_[i].layout();
    const bool continues = i > 0 && stages_[i - 1].layout().group_images == layout.group_images &&
                           stages_[i - 1].layout().groups == layout.groups;
    if (continues) {
      segments_.back().end = end;
    } else {
      segments_.push_back({end - 1, end, layout.groups});
    }
  }
  // What lives in one segment only needs the memory of one group.
  for (const Segment& segment : segments_) {
    for (int64_t i = segment.begin; i < segment.end; ++i) {
      Slot* slot = stages_[i].written;
      if (slot == nullptr || slot->layout.groups == 1) continue;
      if (last_reader(*slot) >= segment.end) slot->group_stride = slot->layout.group_size();
    }
  }
}

// The stage that reads a slot last, -1 if none does.
int64_t Plan::last_reader(const Slot& slot) const {
  for (int64_t i = static_cast<int64_t>(stages_.size()) - 1; i >= 0; --i) {
    const auto& reads = stages_[i].reads;
    if (std::find(reads.begin(), reads.end(), &slot) != reads.end()) return i;
  }
  return -1;
}

void Plan::make_stages(const std::vector<Step>& steps, const std::vector<WeightArray>& weights) {
  const int64_t num_inputs = static_cast<int64_t>(inputs_.size());
  const int64_t num_steps = static_cast<int64_t>(steps.size());
  for (int64_t i = 0; i < num_inputs; ++i) {
    InputTensor tensor{};
    std::copy(inputs_[i].stride, inputs_[i].stride + 4, tensor.stride);
    stages_[i].stage = make_import(stages_[i].written, i, tensor);
    for (int64_t s = num_steps - 1; s >= 0; --s) {  // its time counts for the first that reads it
      if (steps[s].in == i || steps[s].second == i) stages_[i].step = s;
    }
  }
  int64_t outputs = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    Planned& planned = stages_[num_inputs + i];
    const Slot* second = planned.reads.size() < 2 ? nullptr : planned.reads[1];
    const StageSource source{steps[i], weights,         kernels_,   planned.reads[0],
                             second,   planned.written, code_.get()};
    switch (steps[i].kind) {
      case Kind::kConv:
      case Kind::kLinear:
        planned.stage = make_conv(source);
        break;
      case Kind::kMaxPool:
      case Kind::kAveragePool:
        planned.stage = make_pool(source);
        break;
      case Kind::kGlobalAverage:
        planned.stage = make_global_average(source);
        break;
      case Kind::kAdd:
      case Kind::kAffine:
        planned.stage = make_scale_add(source);
        break;
      case Kind::kScale:
        planned.stage = make_gate(source);
        break;
      case Kind::kConcat:
        planned.stage = make_concat(source);
        break;
      case Kind::kOutput:
        planned.stage = make_export(planned.reads[0], outputs++);
        break;
    }
  }
}

void Plan::place_activations() {
  std::vector<Lifetime> lifetimes;
  std::vector<int64_t*> offsets;
  std::vector<int64_t> segment_of(stages_.size());
  for (size_t s = 0; s < segments_.size(); ++s) {
    for (int64_t i = segments_[s].begin; i < segments_[s].end; ++i) {
      segment_of[i] = static_cast<int64_t>(s);
    }
  }
  for (int64_t i = 0; i < static_cast<int64_t>(stages_.size()); ++i) {
    const Planned& planned = stages_[i];
    if (planned.stage->scratch_size > 0) {
      lifetimes.push_back({planned.stage->scratch_size, i, i});
      offsets.push_back(&planned.stage->scratch_offset);
    }
    Slot* slot = planned.written;
    if (slot == nullptr) continue;
    const int64_t last = std::max(i, last_reader(*slot));
    // A segment's stages all run again for the next group.
    const bool leaves = segment_of[last] != segment_of[i];
    const int64_t groups = slot->group_stride > 0 ? slot->layout.groups : 1;
    lifetimes.push_back({slot->layout.group_size() * groups,
                         leaves ? segments_[segment_of[i]].begin : i,
                         leaves ? segments_[segment_of[last]].end - 1 : last});
    offsets.push_back(&slot->offset);
  }
  constexpr int64_t kAlignedFloats = kAlignment / static_cast<int64_t>(sizeof(float));
  const std::vector<int64_t> placed = place_tensors(lifetimes, kAlignedFloats, &arena_size_);
  for (size_t i = 0; i < placed.size(); ++i) *offsets[i] = placed[i];
}

Buffer Plan::take_arena() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_arenas_.empty()) {
      Buffer arena = std::move(idle_arenas_.back());
      idle_arenas_.pop_back();
      return arena;
    }
  }
  return Buffer(arena_size_ * static_cast<int64_t>(sizeof(float)));
}

void Plan::run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
               ParallelFor parallel_for, std::vector<double>* seconds) const {
  Buffer arena = take_arena();
  std::vector<InputTensor> tensors(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) tensors[i].data = inputs[i];
  const Call call{tensors.data(), outputs.data(), reinterpret_cast<float*>(arena.data()), kernels_,
                  parallel_for};
  for (const Segment& segment : segments_) {
    for (int64_t group = 0; group < segment.groups; ++group) {
      for (int64_t i = segment.begin; i < segment.end; ++i) {
        const Timer timer(seconds == nullptr ? nullptr : &(*seconds)[stages_[i].step]);
        stages_[i].stage->run(call, group);
      }
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_arenas_.push_back(std::move(arena));
}

}  // namespace sparse
}  // namespace fastprune
