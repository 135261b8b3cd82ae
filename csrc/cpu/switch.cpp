// One pass over the activations; the backward pass sums by channel on its way. An activation is cut
// into tiles whose borders depend on its shape alone, and the sums of the tiles are added in their
// order, so the number of threads changes no bit.
#include "cpu/switch.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/narrow.h"
#include "cpu/advanced.h"
#include "cpu/isa.h"

namespace fastprune {
namespace {

// Rows of an activation, or a part of each.
struct SwitchTile {
  const void* from;   // what is multiplied: the input, or the gradient
  const void* input;  // backward only, as is `sums`
  const void* scale;  // of each row, or of each column
  void* to;
  void* sums = nullptr;  // likewise
  int64_t rows = 0, width = 0;
  int64_t stride = 0;      // from a row to the next
  int64_t last_width = 0;  // of the last row
};

constexpr int64_t kSwitchLaneBytes = 128;  // sums of a row: two registers of AVX-512

using SwitchMove = void (*)(const SwitchTile& tile);

template <typename T>
inline T stored(typename ScoreTraits<T>::Score x) {
  if constexpr (std::is_same_v<T, typename ScoreTraits<T>::Score>) {
    return x;
  } else {
    return narrowed<T>(x);
  }
}

}  // namespace
}  // namespace fastprune

#define FASTPRUNE_ISA_BODY "cpu/switch.inc"
#include "cpu/foreach_isa.h"

namespace fastprune {
namespace {

constexpr int64_t kTile = 1 << 14;       // elements
constexpr int64_t kTileWidth = 1 << 10;  // of columns: their factors and sums stay in the cache
constexpr int64_t kFewestRows = 64;      // a tile writes a sum for each of its columns
constexpr int64_t kShortRow = 64;        // of one channel: beginning and ending it would dominate
constexpr int64_t kFewestExamples = 8;   // that are worth a factor for each column
constexpr int64_t kGrain = 1 << 15;

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// An activation as `groups` blocks of [rows, width]. Channels are rows, the same in all blocks, or
// they are columns, with factors of their own in each block. Short rows of single channels count as
// one row of columns; so do several positions of few channels, and then the last row may be short.
struct Blocks {
  DType dtype, wide;
  bool columns;
  int64_t channels;                   // or those of all examples, where they are rows
  int64_t repeats = 1;                // neighbouring columns of one channel
  int64_t groups, size, rows, width;  // size: elements of a group
  int64_t tile_rows, tile_width;      // of a whole tile
  int64_t row_tiles, width_tiles;

  explicit Blocks(const SwitchShape& s)
      : dtype(s.dtype),
        wide(s.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32),
        channels(s.channels) {
    const bool short_rows = !s.channels_last && !s.per_example && s.positions < kShortRow &&
                            s.examples >= kFewestExamples;
    columns = s.channels_last || short_rows;
    groups = columns == s.per_example ? s.examples : 1;
    size = s.examples * s.channels * s.positions / groups;
    if (columns) {
      repeats = short_rows ? s.positions : 1;
      width = channels * (short_rows ? s.positions : parts(kShortRow, channels));
      rows = parts(size, width);
      tile_rows = std::min(rows, std::max(kFewestRows, kTile / width));
      tile_width = std::min(width, kTileWidth);
    } else {
      width = s.positions;
      rows = channels = size / width;
      tile_rows = std::min(rows, std::max<int64_t>(1, kTile / width));
      tile_width = std::min(width, kTile);
    }
    row_tiles = parts(rows, tile_rows);
    width_tiles = parts(width, tile_width);
  }

  // Calls f(column, channel) for all columns of a group.
  template <typename F>
  void for_columns(const F& f) const {
    for (int64_t i = 0; i < width;) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t k = 0; k < repeats; ++k) f(i++, c);
      }
    }
  }
};

template <typename Wide>
std::vector<Wide> factors_of_columns(const Blocks& b, const Wide* scale) {
  std::vector<Wide> factors(b.groups * b.width);
  Wide* group = factors.data();
  for (int64_t g = 0; g < b.groups; ++g, group += b.width, scale += b.channels) {
    b.for_columns([=](int64_t i, int64_t c) { group[i] = scale[c]; });
  }
  return factors;
}

// The sums of all tiles: `tables` of [rows, width], whose rows are added.
struct Sums {
  int64_t tables, rows, width;

  explicit Sums(const Blocks& b)
      : tables(b.columns ? b.groups : 1),
        rows(b.columns ? b.row_tiles : b.groups * b.width_tiles),
        width(b.columns ? b.width : b.channels) {}

  template <typename Wide>
  void add_up(const Blocks& b, const Wide* sums, Wide* totals) const {
    std::vector<double> added(width), folded(b.columns ? b.channels : 0);
    for (int64_t t = 0; t < tables; ++t, totals += b.channels) {
      std::fill(added.begin(), added.end(), 0.0);
      for (int64_t r = 0; r < rows; ++r, sums += width) {
        for (int64_t i = 0; i < width; ++i) added[i] += sums[i];
      }
      if (b.columns) {
        std::fill(folded.begin(), folded.end(), 0.0);
        b.for_columns([&](int64_t i, int64_t c) { folded[c] += added[i]; });
      }
      std::copy_n(b.columns ? folded.data() : added.data(), b.channels, totals);
    }
  }
};

SwitchTile tile_of(const Blocks& b, const SwitchTile& all, int64_t number) {
  const int64_t across = number % b.width_tiles, down = number / b.width_tiles % b.row_tiles;
  const int64_t group = number / b.width_tiles / b.row_tiles;
  const int64_t row = down * b.tile_rows, column = across * b.tile_width;
  const int64_t rows = std::min(b.tile_rows, b.rows - row);
  const int64_t width = std::min(b.tile_width, b.width - column);
  const int64_t begin = row * b.width + column;
  const int64_t left = b.size - begin - (rows - 1) * b.width;  // from the last row of the tile on
  const int64_t element = group * b.size + begin;
  const int64_t scale = b.columns ? group * b.width + column : row;
  const int64_t sum = b.columns ? (group * b.row_tiles + down) * b.width + column
                                : (group * b.width_tiles + across) * b.rows + row;
  return {advanced(all.from, b.dtype, element),
          advanced(all.input, b.dtype, element),
          advanced(all.scale, b.wide, scale),
          advanced(all.to, b.dtype, element),
          advanced(all.sums, b.wide, sum),
          rows,
          width,
          b.width,
          std::clamp<int64_t>(left, 0, width)};
}

template <typename Wide>
void move_all(const Blocks& b, SwitchTile all, ParallelFor parallel_for, void* grad_scale) {
  std::vector<Wide> factors;
  if (b.columns && b.width != b.channels) {
    factors = factors_of_columns(b, static_cast<const Wide*>(all.scale));
    all.scale = factors.data();
  }
  const bool backward = grad_scale != nullptr;
  const Sums sums(b);
  std::unique_ptr<Wide[]> table;
  if (backward) {
    table.reset(new Wide[sums.tables * sums.rows * sums.width]);
    all.sums = table.get();
  }
  const SwitchMove move =
      FASTPRUNE_FOR_ISA(best_isa(), choose_switch_move)(b.dtype, b.columns, backward);
  const int64_t grain = std::max<int64_t>(1, kGrain / (b.tile_rows * b.tile_width));
  parallel_for(b.groups * b.row_tiles * b.width_tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) move(tile_of(b, all, i));
  });
  if (backward) sums.add_up(b, table.get(), static_cast<Wide*>(grad_scale));
}

void move_all(const SwitchShape& shape, const SwitchTile& all, ParallelFor parallel_for,
              void* grad_scale) {
  if (shape.dtype == DType::kFloat64) {
    move_all<double>(Blocks(shape), all, parallel_for, grad_scale);
  } else {
    move_all<float>(Blocks(shape), all, parallel_for, grad_scale);
  }
}

}  // namespace

void channel_switch(const SwitchShape& shape, const void* input, const void* scale,
                    ParallelFor parallel_for, void* output) {
  move_all(shape, {input, nullptr, scale, output}, parallel_for, nullptr);
}

void channel_switch_backward(const SwitchShape& shape, const void* grad, const void* input,
                             const void* scale, ParallelFor parallel_for, void* grad_input,
                             void* grad_scale) {
  move_all(shape, {grad, input, scale, grad_input}, parallel_for, grad_scale);
}

}  // namespace fastprune
