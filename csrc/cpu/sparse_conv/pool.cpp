// Maximum, average and global average pools.
#include <algorithm>
#include <limits>

#include "cpu/sparse_conv/memory.h"
#include "cpu/sparse_conv/stage.h"

namespace fastprune {
namespace sparse {
namespace {

// As in PyTorch: padding counts where the caller wants it, what hangs over the padded image never.
int64_t covered(const Window& w, int d, int64_t output, int64_t size, bool count_pad) {
  const int64_t begin = output * w.stride[d] - w.pad[d];
  const int64_t end = std::min(begin + w.kernel[d], size + w.pad[d]);
  return count_pad ? end - begin : std::min(end, size) - std::max<int64_t>(begin, 0);
}

class Pool : public Stage {
 public:
  explicit Pool(const StageSource& source);
  void run(const Call& call, int64_t group) const override;

 private:
  void set_divisors(const Step& step);
  void pool_rows(const Call& call, int64_t group, int64_t begin, int64_t end) const;

  const Slot *in_, *out_;
  bool is_max_;
  Window window_;
  WindowPlane plane_;
  Gather gather_;
  std::vector<int64_t> map_row_;  // of each row of the window
  std::vector<int64_t> taps_;
  Buffer divisors_;
};

Pool::Pool(const StageSource& source)
    : in_(source.in),
      out_(source.out),
      is_max_(source.step.kind == Kind::kMaxPool),
      window_(source.step.window),
      plane_(source.step.window, source.out->layout, 1) {
  gather_ = make_gather(source_of(*in_), in_->layout.size, out_->layout, window_, plane_);
  const std::vector<int64_t> rows = plane_.rows();
  map_row_.resize(rows.back() + 1);
  for (size_t i = 0; i < rows.size(); ++i) map_row_[rows[i]] = static_cast<int64_t>(i);
  for (int64_t y = 0; y < window_.kernel[0]; ++y) {
    for (int64_t x = 0; x < window_.kernel[1]; ++x) {
      taps_.push_back(y * plane_.row_stride() + plane_.offset(0, x * window_.dilation[1]));
    }
  }
  if (!is_max_) set_divisors(source.step);
}

// The same for every group: they do not depend on the image.
void Pool::set_divisors(const Step& step) {
  const Layout& layout = out_->layout;
  divisors_ = Buffer(layout.positions() * layout.lanes * sizeof(float));
  float* divisors = reinterpret_cast<float*>(divisors_.data());
  for (int64_t position = 0; position < layout.positions(); ++position) {
    for (int64_t lane = 0; lane < layout.lanes; ++lane) {
      const Pixel first = layout.first_pixel(0, lane);
      const int64_t y = first.y + position / layout.block[1];
      const int64_t x = first.x + position % layout.block[1];
      const bool inside = y < layout.size[0] && x < layout.size[1];
      const int64_t count =
          !inside ? 1
                  : covered(step.window, 0, y, in_->layout.size[0], step.count_include_pad) *
                        covered(step.window, 1, x, in_->layout.size[1], step.count_include_pad);
      divisors[position * layout.lanes + lane] = static_cast<float>(count);
    }
  }
}

void Pool::run(const Call& call, int64_t group) const {
  const int64_t cost = out_->layout.block[1] * static_cast<int64_t>(taps_.size()) * 2;
  call.parallel_for(out_->layout.block[0] * out_->layout.channels, grain_of(cost),
                    [&](int64_t begin, int64_t end) { pool_rows(call, group, begin, end); });
}

// A row of one channel after the other, each with the rows of its windows in a small buffer.
void Pool::pool_rows(const Call& call, int64_t group, int64_t begin, int64_t end) const {
  const Layout& layout = out_->layout;
  const float fill = is_max_ ? -std::numeric_limits<float>::infinity() : 0;
  const float* input = call.arena + in_->offset + gather_.shift_of_group[group];
  float* output = call.at(*out_, group);
  const Buffer buffer(window_.kernel[0] * plane_.row_stride() * sizeof(float));
  float* rows = reinterpret_cast<float*>(buffer.data());
  PoolWork work{};
  work.input = rows;
  work.taps = taps_.data();
  work.num_taps = static_cast<int64_t>(taps_.size());
  work.vectors = layout.block[1];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = i / layout.channels, c = i % layout.channels;
    for (int64_t k = 0; k < window_.kernel[0]; ++k) {
      const int64_t row = y * window_.stride[0] + k * window_.dilation[0];
      // The map counts from the beginning of a whole plane.
      call.kernels.gather(gather_.map(group)[map_row_[row]], input + c * gather_.source_stride,
                          rows + k * plane_.row_stride() - plane_.offset(row, 0), fill);
    }
    work.output = output + i * layout.channel_stride();
    if (!is_max_) {
      work.divisors =
          reinterpret_cast<const float*>(divisors_.data()) + y * layout.block[1] * layout.lanes;
    }
    call.kernels.pool(work);
  }
}

class GlobalAverage : public Stage {
 public:
  explicit GlobalAverage(const StageSource& source);
  void run(const Call& call, int64_t group) const override;

 private:
  void average_channel(const Call& call, int64_t first_image, int64_t end_image, const float* input,
                       float* output) const;

  const Slot *in_, *out_;
  Buffer kept_;  // -1 for the pixels of an image, 0 for what hangs over its edge
};

GlobalAverage::GlobalAverage(const StageSource& source) : in_(source.in), out_(source.out) {
  const Layout& layout = in_->layout;
  kept_ = Buffer(layout.positions() * layout.lanes * sizeof(int32_t));
  int32_t* kept = reinterpret_cast<int32_t*>(kept_.data());
  for (int64_t y = 0; y < layout.size[0]; ++y) {
    for (int64_t x = 0; x < layout.size[1]; ++x) {
      for (int64_t image = 0; image < layout.group_images; ++image) {
        const Place place = layout.place({image, y, x});
        kept[place.position * layout.lanes + place.lane] = -1;
      }
    }
  }
}

void GlobalAverage::average_channel(const Call& call, int64_t first_image, int64_t end_image,
                                    const float* input, float* output) const {
  const Layout& layout = in_->layout;
  const int64_t lanes_per_image = layout.grid[0] * layout.grid[1];
  const float pixels = static_cast<float>(layout.size[0] * layout.size[1]);
  alignas(kAlignment) float sums[kAlignment / sizeof(float)];
  int64_t summed_group = -1;
  for (int64_t image = first_image; image < end_image; ++image) {
    const int64_t group = image / layout.group_images;
    if (group != summed_group) {
      call.kernels.sum(input + group * in_->group_stride, layout.row_stride(),
                       reinterpret_cast<const int32_t*>(kept_.data()), layout.block, sums);
      summed_group = group;
    }
    float sum = 0;
    for (int64_t l = 0; l < lanes_per_image; ++l) {
      sum += sums[image % layout.group_images * lanes_per_image + l];
    }
    output[out_->layout.place({image, 0, 0}).lane] = sum / pixels;
  }
}

void GlobalAverage::run(const Call& call, int64_t group) const {
  const int64_t first = group * out_->layout.group_images;
  const int64_t end = std::min(first + out_->layout.group_images, out_->layout.images);
  // Where groups take turns the only one in memory is this one.
  const float* input = call.arena + in_->offset;
  float* output = call.at(*out_, group);
  const int64_t cost = in_->layout.positions() * (end - first);
  call.parallel_for(in_->shape.channels, grain_of(cost), [&](int64_t begin, int64_t stop) {
    for (int64_t c = begin; c < stop; ++c) {
      average_channel(call, first, end, input + c * in_->layout.channel_stride(),
                      output + c * out_->layout.channel_stride());
    }
  });
}

}  // namespace

std::unique_ptr<Stage> make_pool(const StageSource& source) {
  return std::make_unique<Pool>(source);
}

std::unique_ptr<Stage> make_global_average(const StageSource& source) {
  return std::make_unique<GlobalAverage>(source);
}

}  // namespace sparse
}  // namespace fastprune
