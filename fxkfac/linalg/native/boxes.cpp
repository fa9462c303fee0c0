// Sums of boxes -> those of windows: what two taps take of all boxes, for any two channels.

namespace vectors {
namespace {

// The positions of a box are some pieces; partners are `shift` rows further on. `turned` is the
// box whose positions are these partners, or it is the box itself.
struct Box {
  int64_t begin, end, shift, turned;
};

// What two taps take of a box: 1 or -1 times its sum.
struct Term {
  int64_t box, sign;
};

// What there is to know of images and windows. As many images as have so many rows are taken
// together, of which pieces are parts. Terms of a pair of taps follow those of the one before.
struct Plan {
  int64_t rows;
  const Piece* pieces;
  const Box* boxes;
  int64_t number;
  const Term* terms;
  const int64_t* begins;
  int64_t taps;
};

// Two panels, not above the diagonal, and how many such pairs come before.
struct Pair {
  int64_t p, q, before;
};

// Panels of channels: as few as there can be, all of them as wide as is needed.
template <class T>
struct Channels {
  int64_t d, panels, width;

  explicit Channels(int64_t d)
      : d(d),
        panels(panels_in<T>(d)),
        width((d + panels * LANES<T> - 1) / (panels * LANES<T>) * LANES<T>) {}

  int in(int64_t p) const { return std::min(width, d - p * width); }

  std::vector<Pair> pairs() const {
    std::vector<Pair> found;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t q = 0; q <= p; ++q) found.push_back({p, q, int64_t(found.size())});
    return found;
  }
};

// The sum over windows: rows are taps of one channel after the other, and so are columns.
template <class T>
class Windows {
 public:
  const Total<T>& total;

  Windows(const Plan& plan, Channels<T> channels, const Total<T>& total)
      : total(total), plan(plan), channels(channels) {}

  // Put the sums of two panels where they belong, in both triangles. Returns their trace.
  T finish(Pair pair, bool adds, Tile<T>* tiles) const {
    const auto [p, q, _] = pair;
    if (p == q) {
      complete(tiles, channels.in(p));
      return put(p, p, adds, tiles);
    }
    put(p, q, adds, tiles);
    turn(tiles, channels.in(p), channels.in(q));
    put(q, p, adds, tiles);
    return 0;
  }

 private:
  const Plan& plan;
  const Channels<T> channels;

  // What was left out of the products of a panel with itself.
  void complete(Tile<T>* tiles, int size) const {
    for (int64_t b = 0; b < plan.number; ++b) {
      const int64_t other = plan.boxes[b].turned;
      if (other == b) tiles[b].mirror(size);
      if (other > b) tiles[other].set_transpose(tiles[b], size, size);
    }
  }

  // Sums with the panels the other way round.
  void turn(Tile<T>* tiles, int rows, int columns) const {
    for (int64_t b = 0; b < plan.number; ++b) {
      const int64_t other = plan.boxes[b].turned;
      if (other < b) continue;
      const Tile<T> kept = tiles[b];
      if (other > b) tiles[b].set_transpose(tiles[other], rows, columns);
      tiles[other].set_transpose(kept, rows, columns);
    }
  }

  // Rows of the sum are taps of one channel after the other, and so are columns.
  T put(int64_t p, int64_t q, bool adds, const Tile<T>* tiles) const {
    const int64_t taps = plan.taps, number = channels.in(q) * taps;
    const bool passes = BYTES == LINE && total.passes_cache(adds);
    std::vector<T> found(WIDTH<T> * (taps + LANES<T>)), line(WIDTH<T> * taps + LANES<T>);
    const int vectors = (channels.in(q) + LANES<T> - 1) / LANES<T>;
    const auto add_up = vectors == 1   ? &Windows::add_up<1>
                        : vectors == 2 ? &Windows::add_up<2>
                                       : &Windows::add_up<3>;
    T trace = 0;
    for (int c = 0; c < channels.in(p); ++c)
      for (int64_t k = 0; k < taps; ++k) {
        (this->*add_up)(k * taps, tiles, c, found.data());
        interleave(found.data(), channels.in(q), line.data());
        const int64_t row = (p * channels.width + c) * taps + k;
        T* to = total.start + row * total.step + q * channels.width * taps;
        put_line(line.data(), number, adds, passes, to);
        if (p == q) trace += adds ? to[c * taps + k] : total.scale * line[c * taps + k];
      }
    return trace;
  }

  // What pairs of a tap and any other take of all boxes, for a row of their tiles: its first N
  // vectors.
  template <int N>
  void add_up(int64_t pair, const Tile<T>* tiles, int row, T* to) const {
    for (const int64_t end = pair + plan.taps; pair < end; ++pair, to += WIDTH<T>) {
      Vector<T> sum[N]{};
      const Term* stop = plan.terms + plan.begins[pair + 1];
      for (const Term* term = plan.terms + plan.begins[pair]; term < stop; ++term) {
        const T* from = tiles[term->box].sums + row * WIDTH<T>;
        const T sign = term->sign;
        for (int j = 0; j < N; ++j) sum[j] += sign * read(from + j * LANES<T>);
      }
      for (int j = 0; j < N; ++j) write(sum[j], to + j * LANES<T>);
    }
  }

  // Channels of each tap -> taps of each channel. What is behind the last tap comes first, and is
  // written over.
  void interleave(const T* found, int64_t number, T* line) const {
    for (int64_t l = (plan.taps - 1) / LANES<T> * LANES<T>; l >= 0; l -= LANES<T>)
      for (int j = 0; j < number; j += LANES<T>)
        transpose(found + l * WIDTH<T> + j, WIDTH<T>, line + j * plan.taps + l, plan.taps);
  }

  void put_line(const T* line, int64_t number, bool adds, bool passes, T* to) const {
    const T scale = total.scale;
    int64_t i = 0;
    for (; i + LANES<T> <= number; i += LANES<T>) {
      const Vector<T> found = scale * read(line + i);
      pass<T>(adds ? read(to + i) + found : found, passes, to + i);
    }
    for (; i < number; ++i) to[i] = (adds ? to[i] : T(0)) + scale * line[i];
  }
};

}  // namespace
}  // namespace vectors
