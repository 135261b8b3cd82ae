// Tables that bring pixels to where a kernel wants them: from a tensor into lanes, from one layout
// into another, from blocks into blocks with their neighbours' edges around them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sparse_conv/layout.h"
#include "cpu/sparse_conv/program.h"

namespace fastprune {
namespace sparse {

// One row of one channel. Offsets count floats from the beginning of the channel; a negative one
// stands for a pixel outside of the image, which gets the fill value.
struct GatherRow {
  struct Move {
    int32_t from, to;
  };
  std::vector<Move> copies;            // vectors whose lanes stay
  std::vector<Move> permutes;          // vectors whose lanes change places
  std::vector<int32_t> permuted_from;  // for each lane of each permute its lane before, or -1
  std::vector<int32_t> fills;          // vectors outside of the image
  std::vector<int32_t> gathered_to;    // vectors out of pixels from anywhere
  std::vector<int32_t> gathered_from;
};

using GatherMap = std::vector<GatherRow>;

// For each group of the target the map and where it begins in the source.
struct Gather {
  std::vector<GatherMap> maps;
  std::vector<int32_t> map_of_group;
  std::vector<int64_t> shift_of_group;
  int64_t source_stride;  // floats from a channel to the next one
  int64_t target_stride;

  const GatherMap& map(int64_t group) const { return maps[map_of_group[group]]; }
};

struct Source {
  const Layout* layout;      // null for a tensor
  int64_t group_stride;      // of a layout: floats from a group to the next one
  int64_t tensor_stride[4];  // of a tensor: images, channels, height, width
};

// The windows of a group's blocks, in the order of a layout. Pixels that are a stride apart are
// neighbours, so that the same tap of neighbouring outputs is in neighbouring vectors: rows with
// one remainder of the division by the stride (a phase) follow each other, columns as well.
class WindowPlane {
 public:
  WindowPlane(const Window& window, const Layout& target, int64_t channels);

  int64_t size() const { return axes_[0].total() * row_stride_; }
  int64_t channel_stride() const { return channel_stride_; }
  int64_t row_stride() const { return row_stride_; }
  // Floats from the beginning of a channel to row y and column x of the window.
  int64_t offset(int64_t y, int64_t x) const {
    return axes_[0].place(y) * row_stride_ + axes_[1].place(x) * lanes_;
  }
  // The rows and columns of the window that a tap may fall on.
  std::vector<int64_t> rows() const { return axes_[0].used(); }
  std::vector<int64_t> columns() const { return axes_[1].used(); }

 private:
  struct Axis {
    int64_t stride, extent, length;  // length: of a phase
    std::vector<int64_t> phases;     // -1: no tap falls on it
    int64_t num_phases;

    int64_t total() const { return num_phases * length; }
    std::vector<int64_t> used() const;
    int64_t place(int64_t i) const { return phases[i % stride] * length + i / stride; }
  };
  static Axis make_axis(const Window& window, const Layout& target, int d);

  Axis axes_[2];
  int64_t lanes_, channel_stride_, row_stride_;
};

// `source_size`: height and width of its images. A window of 1x1 with stride 1 and no padding is a
// change of layout only.
Gather make_gather(const Source& source, const int64_t* source_size, const Layout& target,
                   const Window& window, const WindowPlane& plane);

}  // namespace sparse
}  // namespace fastprune
