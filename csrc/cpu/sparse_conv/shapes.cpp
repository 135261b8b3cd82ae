#include "cpu/sparse_conv/shapes.h"

namespace fastprune {
namespace sparse {
namespace {

bool equal_pictures(const Shape& a, const Shape& b) {
  return a.images == b.images && a.height == b.height && a.width == b.width;
}

int64_t window_extent(const Window& w, int d) { return (w.kernel[d] - 1) * w.dilation[d] + 1; }

// As in PyTorch: with ceil_mode a window may hang over the end, but has to begin before it.
int64_t slid(int64_t index, const Window& w, int d, int64_t size, bool ceil_mode) {
  const int64_t room = size + 2 * w.pad[d] - window_extent(w, d);
  if (room < 0) fail_step(index, "the padded input must be as large as the kernel", size);
  int64_t count = (room + (ceil_mode ? w.stride[d] - 1 : 0)) / w.stride[d] + 1;
  if (ceil_mode && (count - 1) * w.stride[d] >= size + w.pad[d]) --count;
  return count;
}

Shape conv_shape(int64_t index, const Step& step, const std::vector<WeightArray>& weights,
                 const Shape& in, const Shape* second) {
  const SparseWeight w = sparse_weight(weights, step);
  const Window& window = step.window;
  const int64_t groups = step.groups;
  if (in.channels % groups != 0) {
    fail_step(index, "the input's channels must be a multiple of groups", in.channels);
  }
  const int64_t columns = in.channels / groups * window.kernel[0] * window.kernel[1];
  for (int64_t o = 0; o < w.outputs; ++o) {
    if (w.starts[o] == w.starts[o + 1]) continue;
    const int64_t last = w.columns[w.starts[o + 1] - 1];
    if (last >= columns) fail_step(index, "the input has too few channels for column", last);
  }
  const Shape out{in.images, w.outputs, slid(index, window, 0, in.height, false),
                  slid(index, window, 1, in.width, false)};
  if (second != nullptr && !(equal_pictures(out, *second) && second->channels == out.channels)) {
    fail_step(index, "`second` must have the shape of the output; its channels", second->channels);
  }
  return out;
}

}  // namespace

Shape output_shape(int64_t index, const Step& step, const std::vector<WeightArray>& weights,
                   const Shape& in, const Shape* second) {
  switch (step.kind) {
    case Kind::kConv:
    case Kind::kLinear:
      return conv_shape(index, step, weights, in, second);
    case Kind::kMaxPool:
    case Kind::kAveragePool:
      return {in.images, in.channels, slid(index, step.window, 0, in.height, step.ceil_mode),
              slid(index, step.window, 1, in.width, step.ceil_mode)};
    case Kind::kGlobalAverage:
      return {in.images, in.channels, 1, 1};
    case Kind::kAdd:
      if (!equal_pictures(in, *second) || in.channels != second->channels) {
        fail_step(index, "both inputs must have one shape; channels of the second",
                  second->channels);
      }
      return in;
    case Kind::kAffine:
      if (step.weights != -1 && weights[step.weights].size != in.channels) {
        fail_step(index, "scale must have one entry per channel", weights[step.weights].size);
      }
      return in;
    case Kind::kConcat:
      if (!equal_pictures(in, *second)) {
        fail_step(index, "both inputs must have one height and width; height of the second",
                  second->height);
      }
      return {in.images, in.channels + second->channels, in.height, in.width};
    case Kind::kScale:
      if (in.images != second->images || in.channels != second->channels || second->height != 1 ||
          second->width != 1) {
        fail_step(index, "`second` must be one pixel with the channels of `in`; its channels",
                  second->channels);
      }
      return in;
    default:
      return in;
  }
}

}  // namespace sparse
}  // namespace fastprune
