// Convolutions and linear layers: the windows gathered if need be, then sparse rows over tiles.
#include <algorithm>
#include <set>
#include <stdexcept>

#include "cpu/sparse_conv/generate.h"
#include "cpu/sparse_conv/pack.h"
#include "cpu/sparse_conv/stage.h"

namespace fastprune {
namespace sparse {
namespace {

// Neighbouring pixels of all outputs.
struct Tile {
  int64_t input, output;  // floats from the channel's beginning
  int vectors;
};

bool is_pointwise(const Window& w) {
  for (int d = 0; d < 2; ++d) {
    if (w.kernel[d] != 1 || w.stride[d] != 1 || w.pad[d] != 0) return false;
  }
  return true;
}

int largest_tile(const KernelTable& kernels, int block_index) {
  int vectors = 0;
  while (vectors < kMostVectors && kernels.rows[block_index][vectors + 1] != nullptr) ++vectors;
  return vectors;
}

// Cuts runs of `length` vectors into tiles of about equal size.
void add_tiles(int64_t length, int64_t largest, int64_t lanes, int64_t input, int64_t output,
               std::vector<Tile>* tiles) {
  const int64_t count = (length + largest - 1) / largest;
  for (int64_t i = 0, begin = 0; i < count; ++i) {
    const int64_t vectors = (length - begin) / (count - i);
    tiles->push_back({input + begin * lanes, output + begin * lanes, static_cast<int>(vectors)});
    begin += vectors;
  }
}

class Conv : public Stage {
 public:
  explicit Conv(const StageSource& source);
  void run(const Call& call, int64_t group) const override;

 private:
  bool may_generate(const StageSource& source) const;
  bool wants_generated(const StageSource& source) const;
  void set_rows(const StageSource& source);
  std::vector<int32_t> choose_panels(const StageSource& source, const SparseWeight& weight) const;
  void set_generated(const StageSource& source);
  int32_t window_offset(const Step& step, int64_t output, int32_t column) const;
  void run_rows(const Call& call, const float* input, float* output, const float* residual) const;
  void run_panels(RowKernel kernel, int64_t part, RowWork work) const;
  void run_generated(const Call& call, const float* input, float* output,
                     const float* residual) const;
  void activate(const Call& call, int64_t block, const GeneratedWork& work) const;

  const Slot *in_, *second_, *out_;
  Activation activation_;
  bool direct_;  // reads its input where it lies
  WindowPlane plane_;
  Gather gather_;

  int block_index_;
  int64_t largest_tile_;
  std::vector<Tile> tiles_;
  PackedRows rows_;

  GeneratedRows generated_;                              // or empty
  std::vector<int64_t> input_offsets_, output_offsets_;  // of each position
};

Conv::Conv(const StageSource& source)
    : in_(source.in),
      second_(source.second),
      out_(source.out),
      activation_(source.step.activation),
      direct_(is_pointwise(source.step.window)),
      plane_(source.step.window, source.out->layout, source.in->shape.channels) {
  if (!direct_) {
    gather_ =
        make_gather(source_of(*in_), in_->layout.size, out_->layout, source.step.window, plane_);
    scratch_size = plane_.size();
  }
  if (plane_.size() > INT32_MAX) {
    throw std::invalid_argument("sparse_network: the input of a layer has more than 2^31 elements");
  }
  if (wants_generated(source)) set_generated(source);
  if (generated_.empty()) set_rows(source);
}

// Floats from a window's first input to the one that a column multiplies.
int32_t Conv::window_offset(const Step& step, int64_t output, int32_t column) const {
  const Window& w = step.window;
  const int64_t taps = w.kernel[0] * w.kernel[1], tap = column % taps;
  const int64_t group = output / (out_->shape.channels / step.groups);
  const int64_t channel = group * (in_->shape.channels / step.groups) + column / taps;
  return static_cast<int32_t>(
      channel * plane_.channel_stride() +
      plane_.offset(tap / w.kernel[1] * w.dilation[0], tap % w.kernel[1] * w.dilation[1]));
}

void Conv::set_rows(const StageSource& source) {
  const SparseWeight weight = sparse_weight(source.weights, source.step);
  const Layout& layout = out_->layout;
  const int block = choose_block(weight, source.step.groups, source.step.kernel);
  block_index_ =
      static_cast<int>(std::find(kBlockSizes, kBlockSizes + kNumBlockSizes, block) - kBlockSizes);
  largest_tile_ = largest_tile(source.kernels, block_index_);
  for (int64_t y = 0; y < layout.block[0]; ++y) {
    add_tiles(layout.block[1], largest_tile_, layout.lanes, y * plane_.row_stride(),
              y * layout.row_stride(), &tiles_);
  }
  // Many tiles are work enough for all threads; the rows of a few have to be cut as well.
  constexpr int64_t kEnoughTiles = 16, kRowsPerPart = 32;
  const int64_t num_parts = std::max<int64_t>(
      1,
      std::min(kEnoughTiles / static_cast<int64_t>(tiles_.size()), weight.outputs / kRowsPerPart));
  rows_ = pack_rows(
      weight, block, num_parts, choose_panels(source, weight),
      [&](int64_t output, int32_t column) { return window_offset(source.step, output, column); });
}

// The inputs of a panel stay in the first cache while all rows read them. For that the sums leave
// their registers once more for each panel, so panels that are short do not pay.
std::vector<int32_t> Conv::choose_panels(const StageSource& source,
                                         const SparseWeight& weight) const {
  constexpr int64_t kPanelBytes = 40 << 10, kFewestEntries = 8;
  const Window& window = source.step.window;
  const int64_t taps = window.kernel[0] * window.kernel[1];
  const int64_t channels = in_->shape.channels / source.step.groups;
  std::set<int32_t> vectors;  // that a tile reads of a channel
  for (int32_t tap = 0; tap < taps; ++tap) {
    for (int32_t i = 0; i < tiles_[0].vectors; ++i) {
      vectors.insert(window_offset(source.step, 0, tap) +
                     i * static_cast<int32_t>(out_->layout.lanes));
    }
  }
  const int64_t bytes = static_cast<int64_t>(vectors.size()) * out_->layout.lanes * 4 * channels;
  const int64_t per_row = weight.starts[weight.outputs] / std::max<int64_t>(1, weight.outputs);
  const int64_t most = std::min(channels, per_row / kFewestEntries);
  const int64_t count =
      std::max<int64_t>(1, std::min((bytes + kPanelBytes - 1) / kPanelBytes, most));
  std::vector<int32_t> panels;
  for (int64_t i = 0; i <= count; ++i) {
    panels.push_back(static_cast<int32_t>(channels * i / count * taps));
  }
  return panels;
}

bool Conv::may_generate(const StageSource& source) const {
  return source.code != nullptr && source.kernels.lanes == kGeneratedLanes &&
         source.step.groups == 1 &&
         std::max(out_->layout.group_size(), plane_.size()) <
             INT32_MAX / 4;  // displacements count bytes
}

// Code costs more than it saves where few vectors pass it: it is larger than the caches by far, and
// each page of it is found anew at each call.
constexpr int64_t kFewPositions = 32;
// With more non-zeros blocks of rows do, whose weights are half as large.
constexpr double kDenseWeight = 0.5;

bool Conv::wants_generated(const StageSource& source) const {
  if (!may_generate(source)) return false;
  if (source.step.kernel != Kernel::kAutomatic) return source.step.kernel == Kernel::kGenerated;
  const SparseWeight weight = sparse_weight(source.weights, source.step);
  const double columns =
      static_cast<double>(in_->shape.channels) *
      static_cast<double>(source.step.window.kernel[0] * source.step.window.kernel[1]);
  const double kept =
      weight.starts[weight.outputs] / (columns * static_cast<double>(weight.outputs));
  return kept < kDenseWeight && out_->layout.positions() >= kFewPositions;
}

void Conv::set_generated(const StageSource& source) {
  const SparseWeight weight = sparse_weight(source.weights, source.step);
  const Layout& layout = out_->layout;
  for (int64_t y = 0; y < layout.block[0]; ++y) {
    for (int64_t x = 0; x < layout.block[1]; ++x) {
      input_offsets_.push_back(y * plane_.row_stride() + x * layout.lanes);
      output_offsets_.push_back(y * layout.row_stride() + x * layout.lanes);
    }
  }
  generated_ = GeneratedRows(
      weight,
      [&](int64_t output, int32_t column) { return window_offset(source.step, output, column); },
      layout.channel_stride(), second_ != nullptr, activation_ == Activation::kRelu, source.code);
}

void Conv::run(const Call& call, int64_t group) const {
  const float* input = call.at(*in_, group);
  if (!direct_) {
    float* scratch = call.arena + scratch_offset;
    run_gather(call, gather_, call.arena + in_->offset, group, in_->shape.channels, 0, scratch);
    input = scratch;
  }
  float* output = call.at(*out_, group);
  const float* residual = second_ == nullptr ? nullptr : call.at(*second_, group);
  if (!generated_.empty()) {
    run_generated(call, input, output, residual);
  } else {
    run_rows(call, input, output, residual);
  }
}

void Conv::run_rows(const Call& call, const float* input, float* output,
                    const float* residual) const {
  RowWork common{};
  common.channel_stride = out_->layout.channel_stride();
  common.activation = activation_;
  const int64_t parts = static_cast<int64_t>(rows_.parts.size()) - 1;
  const int64_t tasks = static_cast<int64_t>(tiles_.size()) * parts;
  const int64_t cost = rows_.num_entries * rows_.block * largest_tile_ / parts;
  call.parallel_for(tasks, grain_of(cost), [&](int64_t begin, int64_t end) {
    RowWork work = common;
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = tiles_[i / parts];
      work.input = input + tile.input;
      work.output = output + tile.output;
      work.residual = residual == nullptr ? nullptr : residual + tile.output;
      run_panels(call.kernels.rows[block_index_][tile.vectors], i % parts, work);
    }
  });
}

void Conv::run_panels(RowKernel kernel, int64_t part, RowWork work) const {
  const int64_t panels = rows_.num_panels, block = rows_.block;
  work.num_blocks = rows_.parts[part + 1] - rows_.parts[part];
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = rows_.parts[part] * panels + panel * work.num_blocks;
    work.entries = rows_.entries.data() + rows_.starts[part * panels + panel] * (1 + block) * 4;
    work.lengths = rows_.lengths.data() + first;
    work.outputs = rows_.outputs.data() + first * block;
    work.bias = rows_.bias.data() + first * block;
    work.begins = panel == 0;
    work.ends = panel == panels - 1;
    kernel(work);
  }
}

void Conv::run_generated(const Call& call, const float* input, float* output,
                         const float* residual) const {
  const int64_t positions = out_->layout.positions(), blocks = generated_.blocks();
  const int64_t tiles = (positions + kGeneratedPixels - 1) / kGeneratedPixels;
  const bool activates = activation_ != Activation::kNone && activation_ != Activation::kRelu;
  const int64_t cost = generated_.multiplications() * positions / (tiles * blocks);
  call.parallel_for(tiles * blocks, grain_of(cost), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = positions * (i / blocks) / tiles;
      const int64_t last = positions * (i / blocks + 1) / tiles;
      const GeneratedWork work{input,
                               output,
                               residual,
                               input_offsets_.data() + first,
                               output_offsets_.data() + first,
                               last - first};
      generated_.run(i % blocks, work);
      if (activates) activate(call, i % blocks, work);
    }
  });
}

// What generated code leaves to do.
void Conv::activate(const Call& call, int64_t block, const GeneratedWork& work) const {
  for (int64_t o = generated_.first_output(block); o < generated_.first_output(block + 1); ++o) {
    for (int64_t v = 0; v < work.vectors; ++v) {
      float* at = work.output + o * out_->layout.channel_stride() + work.output_offsets[v];
      call.kernels.scale_add(at, 1, 0, nullptr, at, 1, activation_);
    }
  }
}

}  // namespace

std::unique_ptr<Stage> make_conv(const StageSource& source) {
  return std::make_unique<Conv>(source);
}

}  // namespace sparse
}  // namespace fastprune
