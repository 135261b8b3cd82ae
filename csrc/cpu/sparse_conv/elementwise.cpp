// Sums of two activations, affine steps, gates and concatenations.
#include <algorithm>

#include "cpu/sparse_conv/stage.h"

namespace fastprune {
namespace sparse {
namespace {

// A row of a channel's block, whose vectors follow each other.
struct Piece {
  int64_t row, channel, offset, vectors;
};

template <typename F>
void for_pieces(const Call& call, const Slot& slot, const F& f) {
  const Layout& layout = slot.layout;
  const int64_t pieces = layout.block[0] * layout.channels;
  call.parallel_for(pieces, grain_of(layout.block[1] + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % layout.channels;
      f(Piece{i / layout.channels, channel, i * layout.channel_stride(), layout.block[1]});
    }
  });
}

class ScaleAdd : public Stage {
 public:
  explicit ScaleAdd(const StageSource& source)
      : in_(source.in),
        second_(source.second),
        out_(source.out),
        activation_(source.step.activation) {
    if (source.step.kind != Kind::kAffine || source.step.weights < 0) return;
    const WeightArray* weights = &source.weights[source.step.weights];
    scale_.assign(weights[0].floats(), weights[0].floats() + weights[0].size);
    shift_.assign(weights[1].floats(), weights[1].floats() + weights[1].size);
  }

  void run(const Call& call, int64_t group) const override {
    const float* a = call.at(*in_, group);
    const float* b = second_ == nullptr ? nullptr : call.at(*second_, group);
    float* to = call.at(*out_, group);
    for_pieces(call, *out_, [&](const Piece& piece) {
      const int64_t c = piece.channel, at = piece.offset;
      call.kernels.scale_add(a + at, scale_.empty() ? 1 : scale_[c], shift_.empty() ? 0 : shift_[c],
                             b == nullptr ? nullptr : b + at, to + at, piece.vectors, activation_);
    });
  }

 private:
  const Slot *in_, *second_, *out_;
  Activation activation_;
  std::vector<float> scale_, shift_;  // empty: a sum
};

// Every channel of every image has a gate of its own.
class Gate : public Stage {
 public:
  explicit Gate(const StageSource& source)
      : in_(source.in),
        gates_(source.second),
        out_(source.out),
        activation_(source.step.activation) {
    const Layout &layout = out_->layout, &from = gates_->layout;
    for (int64_t group = 0; group < layout.groups; ++group) {
      for (int64_t lane = 0; lane < layout.lanes; ++lane) {
        const int64_t image =
            std::min(layout.first_pixel(group, lane).image, layout.images - 1);  // or any other
        const Place place = from.place({image, 0, 0});
        gate_from_.push_back(place.group * gates_->group_stride + place.lane);
      }
    }
  }

  void run(const Call& call, int64_t group) const override {
    const float* gates = call.arena + gates_->offset;
    const int64_t* gate_from = gate_from_.data() + group * out_->layout.lanes;
    const float* from = call.at(*in_, group);
    float* to = call.at(*out_, group);
    for_pieces(call, *out_, [&](const Piece& piece) {
      alignas(kAlignment) float gate[kAlignment / sizeof(float)];
      const float* channel = gates + piece.channel * gates_->layout.channel_stride();
      for (int64_t l = 0; l < out_->layout.lanes; ++l) gate[l] = channel[gate_from[l]];
      call.kernels.scale(from + piece.offset, gate, to + piece.offset, piece.vectors, activation_);
    });
  }

 private:
  const Slot *in_, *gates_, *out_;
  Activation activation_;
  std::vector<int64_t> gate_from_;  // floats from the gates' first channel, for each lane
};

class Concat : public Stage {
 public:
  explicit Concat(const StageSource& source)
      : in_(source.in),
        second_(source.second),
        out_(source.out),
        activation_(source.step.activation) {}

  void run(const Call& call, int64_t group) const override {
    const Slot* const parts[] = {in_, second_};
    const float* const from[] = {call.at(*in_, group), call.at(*second_, group)};
    float* to = call.at(*out_, group);
    for_pieces(call, *out_, [&](const Piece& piece) {
      const int part = piece.channel < in_->shape.channels ? 0 : 1;
      const int64_t channel = piece.channel - (part == 0 ? 0 : in_->shape.channels);
      const Layout& layout = parts[part]->layout;
      call.kernels.scale_add(
          from[part] + piece.row * layout.row_stride() + channel * layout.channel_stride(), 1, 0,
          nullptr, to + piece.offset, piece.vectors, activation_);
    });
  }

 private:
  const Slot *in_, *second_, *out_;
  Activation activation_;
};

}  // namespace

std::unique_ptr<Stage> make_scale_add(const StageSource& source) {
  return std::make_unique<ScaleAdd>(source);
}

std::unique_ptr<Stage> make_gate(const StageSource& source) {
  return std::make_unique<Gate>(source);
}

std::unique_ptr<Stage> make_concat(const StageSource& source) {
  return std::make_unique<Concat>(source);
}

}  // namespace sparse
}  // namespace fastprune
