#include "cpu/sparse_conv/layout.h"

#include <algorithm>
#include <vector>

namespace fastprune {
namespace sparse {
namespace {

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kTile = 8;           // vectors a kernel takes at a time
constexpr double kTileOverhead = 1.5;  // of a tile, in vectors: the weight and its offset
constexpr double kWorthIt = 1.05;      // a smaller difference in work decides nothing

// Work per channel of all groups, in vectors.
double work(const Layout& layout) {
  const double row =
      layout.block[1] + kTileOverhead * static_cast<double>(divided_up(layout.block[1], kTile));
  return static_cast<double>(layout.groups * layout.block[0]) * row;
}

// Vectors that a window of 3x3 reads.
int64_t halo(const Layout& layout) { return (layout.block[0] + 2) * (layout.block[1] + 2); }

Layout with_grid(int64_t lanes, int64_t images, int64_t height, int64_t width, int64_t group_images,
                 int64_t grid_h) {
  Layout layout{};
  layout.lanes = lanes;
  layout.images = images;
  layout.size[0] = height;
  layout.size[1] = width;
  layout.group_images = group_images;
  layout.grid[0] = grid_h;
  layout.grid[1] = lanes / group_images / grid_h;
  for (int d = 0; d < 2; ++d) layout.block[d] = divided_up(layout.size[d], layout.grid[d]);
  layout.groups = divided_up(images, group_images);
  return layout;
}

// Of the grids with about the least work the one with the smallest halo: a square one where there
// is a choice, which images of half the size then have too.
Layout best_grid(int64_t lanes, int64_t images, int64_t height, int64_t width,
                 int64_t group_images) {
  std::vector<Layout> layouts;
  for (int64_t grid_h = 1; grid_h <= lanes / group_images; grid_h *= 2) {
    layouts.push_back(with_grid(lanes, images, height, width, group_images, grid_h));
  }
  double least = work(layouts[0]);
  for (const Layout& layout : layouts) least = std::min(least, work(layout));
  const Layout* best = nullptr;
  for (const Layout& layout : layouts) {
    if (work(layout) > least * kWorthIt) continue;
    if (best == nullptr || halo(layout) < halo(*best)) best = &layout;
  }
  return *best;
}

}  // namespace

int64_t spread_columns(int64_t columns) {
  constexpr int64_t kSharing = 8;  // lines of 64 bytes
  return columns > kTile && columns % kSharing == 0 ? columns + 1 : columns;
}

int64_t Layout::channel_stride() const { return spread_columns(block[1]) * lanes; }

Pixel Layout::first_pixel(int64_t group, int64_t lane) const {
  const int64_t blocks = grid[0] * grid[1], block_index = lane % blocks;
  return {group * group_images + lane / blocks, block_index / grid[1] * block[0],
          block_index % grid[1] * block[1]};
}

Place Layout::place(const Pixel& p) const {
  const int64_t lane =
      (p.image % group_images * grid[0] + p.y / block[0]) * grid[1] + p.x / block[1];
  return {p.image / group_images, p.y % block[0] * block[1] + p.x % block[1], lane};
}

Layout choose_layout(int64_t lanes, int64_t images, int64_t channels, int64_t height,
                     int64_t width) {
  Layout best = best_grid(lanes, images, height, width, 1);
  for (int64_t group_images = 2; group_images <= lanes; group_images *= 2) {
    const Layout layout = best_grid(lanes, images, height, width, group_images);
    if (work(layout) * kWorthIt < work(best)) best = layout;
  }
  best.channels = channels;
  return best;
}

}  // namespace sparse
}  // namespace fastprune
