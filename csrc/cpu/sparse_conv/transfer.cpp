// From tensors into lanes and back.
#include <algorithm>

#include "cpu/sparse_conv/stage.h"

namespace fastprune {
namespace sparse {
namespace {

class Import : public Stage {
 public:
  Import(const Slot* out, int64_t input, const InputTensor& tensor) : out_(out), input_(input) {
    Source source{};
    std::copy(tensor.stride, tensor.stride + 4, source.tensor_stride);
    const Window window{{1, 1}, {1, 1}, {0, 0}, {1, 1}};
    gather_ = make_gather(source, out->layout.size, out->layout, window,
                          WindowPlane(window, out->layout, out->layout.channels));
  }

  void run(const Call& call, int64_t group) const override {
    run_gather(call, gather_, call.inputs[input_].data, group, out_->shape.channels, 0,
               call.at(*out_, group));
  }

 private:
  const Slot* out_;
  int64_t input_;
  Gather gather_;
};

class Export : public Stage {
 public:
  Export(const Slot* in, int64_t output) : in_(in), output_(output) {
    const Layout& layout = in->layout;
    for (int64_t image = 0; image < layout.group_images; ++image) {
      for (int64_t y = 0; y < layout.size[0]; ++y) {
        for (int64_t x = 0; x < layout.size[1]; ++x) {
          const Place place = layout.place({image, y, x});
          from_.push_back(static_cast<int32_t>(layout.offset(place.position) + place.lane));
        }
      }
    }
  }

  void run(const Call& call, int64_t group) const override {
    const Layout& layout = in_->layout;
    const int64_t first = group * layout.group_images, channels = in_->shape.channels;
    const int64_t images = std::min(layout.group_images, layout.images - first);
    const int64_t pixels = layout.size[0] * layout.size[1];
    const float* input = call.at(*in_, group);
    float* output = call.outputs[output_] + first * channels * pixels;
    call.parallel_for(channels, grain_of(pixels * images), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const float* plane = input + c * layout.channel_stride();
        for (int64_t image = 0; image < images; ++image) {
          const int32_t* from = from_.data() + image * pixels;
          float* to = output + (image * channels + c) * pixels;
          for (int64_t i = 0; i < pixels; ++i) to[i] = plane[from[i]];
        }
      }
    });
  }

 private:
  const Slot* in_;
  int64_t output_;
  std::vector<int32_t> from_;  // for each pixel of a group's images its place in a channel
};

}  // namespace

std::unique_ptr<Stage> make_import(const Slot* out, int64_t input, const InputTensor& tensor) {
  return std::make_unique<Import>(out, input, tensor);
}

std::unique_ptr<Stage> make_export(const Slot* in, int64_t output) {
  return std::make_unique<Export>(in, output);
}

}  // namespace sparse
}  // namespace fastprune
