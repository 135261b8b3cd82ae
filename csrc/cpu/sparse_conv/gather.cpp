#include "cpu/sparse_conv/gather.h"

#include <stdexcept>

namespace fastprune {
namespace sparse {

WindowPlane::Axis WindowPlane::make_axis(const Window& window, const Layout& target, int d) {
  Axis axis{};
  axis.stride = window.stride[d];
  axis.extent =
      (target.block[d] - 1) * axis.stride + (window.kernel[d] - 1) * window.dilation[d] + 1;
  axis.length = (axis.extent + axis.stride - 1) / axis.stride;
  axis.phases.assign(axis.stride, -1);
  for (int64_t i = 0; i < window.kernel[d]; ++i) {
    int64_t& phase = axis.phases[i * window.dilation[d] % axis.stride];
    if (phase < 0) phase = axis.num_phases++;
  }
  return axis;
}

std::vector<int64_t> WindowPlane::Axis::used() const {
  std::vector<int64_t> places;
  for (int64_t i = 0; i < extent; ++i) {
    if (phases[i % stride] >= 0) places.push_back(i);
  }
  return places;
}

WindowPlane::WindowPlane(const Window& window, const Layout& target, int64_t channels)
    : axes_{make_axis(window, target, 0), make_axis(window, target, 1)},
      lanes_(target.lanes),
      channel_stride_(spread_columns(axes_[1].total()) * lanes_),
      row_stride_(channels * channel_stride_) {}

namespace {

constexpr int64_t kOutside = -1;

// Where the pixels that a group of the target needs lie in a channel of the source.
struct PixelFinder {
  const Source& source;
  const int64_t* size;  // height and width of an image of the source
  int64_t images;
  int64_t first_image;  // tensors are seen from the group's first image
  // The source groups the same images: it is seen from its own group, whose lanes are all there.
  bool same_groups;

  int64_t offset(const Pixel& p) const {
    if (p.y < 0 || p.y >= size[0] || p.x < 0 || p.x >= size[1]) return kOutside;
    if (same_groups) return lane_offset({p.image - first_image, p.y, p.x});
    if (p.image >= images) return kOutside;
    if (source.layout != nullptr) return lane_offset(p);
    const int64_t* stride = source.tensor_stride;
    return (p.image - first_image) * stride[0] + p.y * stride[2] + p.x * stride[3];
  }

  int64_t lane_offset(const Pixel& p) const {
    const Place place = source.layout->place(p);
    return place.group * source.group_stride + source.layout->offset(place.position) + place.lane;
  }
};

int32_t narrow(int64_t offset) {
  if (offset > INT32_MAX) {
    throw std::invalid_argument("sparse_network: an activation has more than 2^31 elements");
  }
  return static_cast<int32_t>(offset);
}

// Sorts a vector into the list of the cheapest way to make it.
void add_vector(const int64_t* from, int64_t lanes, int64_t to, bool from_lanes, GatherRow* row) {
  int64_t base = kOutside;
  bool all_outside = true, one_vector = from_lanes, in_place = true;
  for (int64_t l = 0; l < lanes; ++l) {
    if (from[l] != kOutside) {
      const int64_t vector = from[l] / lanes * lanes;
      all_outside = false;
      if (base == kOutside) base = vector;
      one_vector = one_vector && vector == base;
    }
    in_place = in_place && from[l] == base + l;
  }
  const int32_t target = narrow(to);
  if (all_outside) {
    row->fills.push_back(target);
  } else if (one_vector && in_place) {
    row->copies.push_back({narrow(base), target});
  } else if (one_vector) {
    row->permutes.push_back({narrow(base), target});
    for (int64_t l = 0; l < lanes; ++l) {
      row->permuted_from.push_back(
          static_cast<int32_t>(from[l] == kOutside ? kOutside : from[l] - base));
    }
  } else {
    row->gathered_to.push_back(target);
    for (int64_t l = 0; l < lanes; ++l) row->gathered_from.push_back(narrow(from[l]));
  }
}

GatherMap make_map(const PixelFinder& finder, const Layout& target, int64_t group,
                   const Window& window, const WindowPlane& plane) {
  std::vector<Pixel> first(target.lanes);
  for (int64_t l = 0; l < target.lanes; ++l) first[l] = target.first_pixel(group, l);
  const std::vector<int64_t> columns = plane.columns();
  std::vector<int64_t> from(target.lanes);
  GatherMap map;
  for (const int64_t y : plane.rows()) {
    map.emplace_back();
    for (const int64_t x : columns) {
      for (int64_t l = 0; l < target.lanes; ++l) {
        from[l] = finder.offset({first[l].image, first[l].y * window.stride[0] - window.pad[0] + y,
                                 first[l].x * window.stride[1] - window.pad[1] + x});
      }
      add_vector(from.data(), target.lanes, plane.offset(y, x), finder.source.layout != nullptr,
                 &map.back());
    }
  }
  return map;
}

}  // namespace

Gather make_gather(const Source& source, const int64_t* source_size, const Layout& target,
                   const Window& window, const WindowPlane& plane) {
  const bool same_groups =
      source.layout != nullptr && source.layout->group_images == target.group_images;
  const bool is_tensor = source.layout == nullptr;
  Gather gather;
  gather.source_stride = is_tensor ? source.tensor_stride[1] : source.layout->channel_stride();
  gather.target_stride = plane.channel_stride();
  const auto add_map = [&](int64_t group) {
    const int64_t first_image = group * target.group_images;
    const PixelFinder finder{source, source_size, target.images, first_image, same_groups};
    gather.maps.push_back(make_map(finder, target, group, window, plane));
  };
  for (int64_t g = 0; g < target.groups; ++g) {
    const bool is_full = (g + 1) * target.group_images <= target.images;
    const bool like_before = g > 0 && (same_groups || (is_tensor && is_full));
    if (!like_before) add_map(g);
    gather.map_of_group.push_back(static_cast<int32_t>(gather.maps.size() - 1));
    gather.shift_of_group.push_back(same_groups ? g * source.group_stride
                                    : is_tensor ? g * target.group_images * source.tensor_stride[0]
                                                : 0);
  }
  return gather;
}

}  // namespace sparse
}  // namespace fastprune
