// How an activation lies in memory: [group][row of a block][channel][column of a block][lane].
//
// A lane holds one spatial block of one image, so a vector holds the pixels at one position of as
// many blocks as it has lanes, and a tap of a convolution is a whole aligned vector. What a tile of
// pixels needs of all channels is in few pages, one behind the other. A group holds
// `group_images` images, each cut into grid[0] x grid[1] blocks of block[0] x block[1] pixels. The
// last blocks may hang over the image's edge and the last group over the batch: nobody reads what
// lies there.
#pragma once

#include <cstdint>

namespace fastprune {
namespace sparse {

struct Pixel {
  int64_t image, y, x;
};

struct Place {
  int64_t group, position, lane;
};

struct Layout {
  int64_t lanes, images, channels, size[2];  // size: height and width of an image
  int64_t group_images, grid[2], block[2];
  int64_t groups;

  int64_t positions() const { return block[0] * block[1]; }
  // Floats from a channel, a row, a group to the next one.
  int64_t channel_stride() const;
  int64_t row_stride() const { return channels * channel_stride(); }
  int64_t group_size() const { return block[0] * row_stride(); }
  // Of a position in the first channel.
  int64_t offset(int64_t position) const {
    return position / block[1] * row_stride() + position % block[1] * lanes;
  }
  // The image may lie behind the batch, y and x behind the image.
  Pixel first_pixel(int64_t group, int64_t lane) const;
  Place place(const Pixel& pixel) const;
};

// Vectors from a channel to the next one if `columns` belong to it: more where tiles of channels
// would else share a part of the cache.
int64_t spread_columns(int64_t columns);

// The layout with the least work for these images. But for the channels' number it depends on the
// images' number and size only, so that a step's operands fit together.
Layout choose_layout(int64_t lanes, int64_t images, int64_t channels, int64_t height,
                     int64_t width);

}  // namespace sparse
}  // namespace fastprune
